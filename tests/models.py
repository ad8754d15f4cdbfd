"""Damaged and odd model folders, made from a small one."""

import json
from pathlib import Path

import numpy as np

from edgepeft.artifact import read_tensors, write_tensors


def settings(folder: Path, **changes) -> Path:
    """Change config.json; None removes a key."""
    path = folder / "config.json"
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return folder


def tensors(folder: Path, change) -> Path:
    """Replace the tensors by change(tensors)."""
    path = folder / "model.safetensors"
    found = {name: np.array(array) for name, array in read_tensors(path).items()}
    write_tensors(path, change(found), {"format": "pt"})
    return folder


def shards(folder: Path, count: int = 3) -> Path:
    """Cut the weights into shards with an index, as big models have them."""
    path = folder / "model.safetensors"
    found = {name: np.array(array) for name, array in read_tensors(path).items()}
    where = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {key: found[key] for key in sorted(found)[i::count]}
        write_tensors(folder / name, part, {"format": "pt"})
        where.update(dict.fromkeys(part, name))
    path.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
