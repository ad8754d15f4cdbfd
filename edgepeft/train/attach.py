"""An adapter that was trained elsewhere takes the place of training: read exactly or refused, judged, stamped.

    PEFT folder ─► checked against the packed base ─► labels in the data's order ─► figures ─► adapter folder

Such a folder names its base by a name at most, so the model given is taken for it: every module has to be there with
these shapes, and what is known of both names is printed. The folder written names the base's digest, and all later
stages treat it as one that was trained here.

A classifier's head has a row for each label, and PEFT does not save which. So the labels come from labels.json in the
folder, a JSON list in the order of the rows, unless edgepeft wrote them; rows are put into the order of the data's.

Left out: adapters of other tools (`edgepeft doctor FOLDER --convert OUT` makes a PEFT folder of them), heads for other
labels than the data has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.adapt import peft_files
from edgepeft.adapt.base import Base
from edgepeft.adapt.terms import PREFIX
from edgepeft.artifact import Run, file_digest, key_of, read_json, write_json
from edgepeft.console import say
from edgepeft.errors import ArtifactError
from edgepeft.train.data import load_splits

if TYPE_CHECKING:
    from edgepeft.config import Config

LABELS, TRAINING = "labels.json", "training.json"


def folder_digest(config: Config) -> str:
    """Return the digest of the adapter that is attached, or "" where one is trained.

    Raises ArtifactError where there is none.
    """
    if not config.adapter_from:
        return ""
    folder = Path(config.adapter_from).expanduser()
    if not all((folder / name).is_file() for name in (peft_files.SETTINGS, peft_files.TENSORS)):
        raise ArtifactError(
            f"{folder}: no adapter: expected {peft_files.SETTINGS} and {peft_files.TENSORS}. `edgepeft doctor` says "
            "what it is and, for MLX, GGUF and .onnx_adapter, converts it."
        )
    files = [folder / name for name in (peft_files.SETTINGS, peft_files.TENSORS, LABELS, TRAINING)]
    return key_of([file_digest(path) if path.is_file() else "" for path in files])


def attach(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Write the adapter of config.adapter_from and training.json to `out`, and return its figures.

    Raises ArtifactError that lists every reason against carrying it over exactly.
    """
    from edgepeft.adapt import layers
    from edgepeft.backbone.load import quantized_model
    from edgepeft.train.loop import evaluate, load_tokenizer, versions
    from edgepeft.train.watch import quiet

    folder, quantized = Path(config.adapter_from).expanduser(), run.path("quantized")
    base, splits = Base.open(quantized), load_splits(config)
    adapter = peft_files.read(folder, base=base, foreign=True)
    tensors = in_order(dict(adapter.tensors), splits.labels, base.heads, folder)
    adapter.effect(base)  # what has no terms is refused before anything is written
    peft_files.write(out, dict(adapter.settings), tensors, base.digest, base.about["format"])
    _tell(adapter, config, folder)
    with quiet():
        model = layers.load(quantized_model(quantized, splits.labels, config), out).eval()
        tokenizer = load_tokenizer(quantized)
    judged = [name for name in ("validation", "test") if len(getattr(splits, name))]
    figures = {name: evaluate(model, config, getattr(splits, name), tokenizer) for name in judged}
    settings = {**dataclasses.asdict(config), "method": str(adapter.settings["peft_type"]).lower()}
    settings["rank"] = int(adapter.settings.get("r") or 0)
    report = {**figures, "labels": list(splits.labels), "config": settings, "versions": versions()}
    write_json(out / TRAINING, report)
    return figures


def in_order(
    tensors: dict[str, np.ndarray], labels: Sequence[str], heads: Sequence[str], folder: Path
) -> dict[str, np.ndarray]:
    """Return the tensors with the rows of the heads in the order of the data's labels.

    Raises ArtifactError where the folder does not say which row is which, or has other labels than the data.
    """
    rows = [name for head in heads for name in tensors if name.startswith(f"{PREFIX}{head}.")]
    if not rows or not labels:
        return tensors
    own = _labels(folder, len(tensors[rows[0]]), labels)
    order = [own.index(label) for label in labels]
    return {**tensors, **{name: np.ascontiguousarray(tensors[name][order]) for name in rows}}


def _labels(folder: Path, count: int, labels: Sequence[str]) -> list[str]:
    """Return the labels of a head of `count` rows, in their order."""
    path = folder / LABELS
    trained = folder / TRAINING  # of an adapter that was trained here
    path = trained if not path.is_file() and trained.is_file() else path
    if not path.is_file():
        example = ", ".join(f'"{label}"' for label in labels[:2])
        raise ArtifactError(
            f"{path}: missing. The adapter's head has {count} rows and does not say which label each one is. Write "
            f"them there as a JSON list in the order of the rows: [{example}, ...]."
        )
    own = read_json(path)
    own = own.get("labels") if path == trained and isinstance(own, dict) else own
    if not isinstance(own, list) or not all(isinstance(label, str) for label in own) or len(set(own)) != len(own):
        raise ArtifactError(f"{path}: expected a list of texts, each one once, found {own!r:.60}.")
    if len(own) != count or sorted(own) != sorted(labels):
        raise ArtifactError(
            f"{path}: expected the {count} labels of the head, which are those of the data ({', '.join(labels)}); "
            f"found {', '.join(own)}."
        )
    return own


def _tell(adapter: peft_files.Adapter, config: Config, folder: Path) -> None:
    named = adapter.settings.get("base_model_name_or_path") or "no base"
    kind, count = adapter.settings["peft_type"], len(adapter.modules)
    say(f"  {folder}: {kind} on {count} modules, nothing is trained")
    if "edgepeft.base" not in adapter.metadata:
        say(f"  it names {named!r} and no digest: {config.model!r} is taken for its base, as names and shapes agree")
