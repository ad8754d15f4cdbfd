"""What an adapter can be held against: a bundle, the output of a build, or a model folder, as shapes and names.

bundle          shapes of the graph's adapter inputs, digest from the manifest
build output    quantized/: shapes of the packed weights, digest of what was packed
model folder    headers of the weight files, their digest
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepeft.adapt.terms import PREFIX
from edgepeft.artifact import read_json, tensor_header
from edgepeft.errors import ArtifactError

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclasses.dataclass(frozen=True)
class Base:
    """A base: `linears` are {module: (N, K)}, `tensors` {name: shape} of what else is known of it.

    format: of its packed weights, "" for float ones.  tokens: how many its tokenizer knows, None where there is none.
    """

    kind: str
    path: Path
    digest: str
    format: str
    settings: Mapping[str, Any]
    linears: Mapping[str, tuple[Any, ...]]
    tensors: Mapping[str, tuple[Any, ...]]
    tokens: int | None = None

    @property
    def vocabulary(self) -> int | None:
        """Return how many tokens the base has embeddings for."""
        return self.settings.get("vocab_size")

    @property
    def heads(self) -> dict[str, int]:
        """Return how many heads q and k have."""
        q = int(self.settings.get("num_attention_heads") or 0)
        return {"q": q, "k": int(self.settings.get("num_key_value_heads") or q)}


def open_base(path: Path) -> Base:
    """Read a base. Raises EdgePeftError when the path is none of the three, or is damaged."""
    if (path / "manifest.json").is_file():
        return _bundle(path)
    if (path / "run.json").is_file():
        return _packed(path / "quantized", "build output")
    if (path / "quantized.json").is_file():
        return _packed(path, "packed weights")
    if (path / "config.json").is_file():
        return _model(path)
    what = "no such folder" if not path.is_dir() else "neither a bundle, nor a build's output, nor a model folder"
    raise ArtifactError(f"{path}: {what}. Give one of them as BASE.")


def token_count(folder: Path) -> int | None:
    """Return how many tokens the tokenizer.json of a folder knows, the added ones included."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        vocab = found["model"]["vocab"]
        names = set(vocab) if isinstance(vocab, dict) else {piece[0] for piece in vocab}
        return len(names | {token["content"] for token in found.get("added_tokens") or ()})
    except (KeyError, TypeError, IndexError):
        return None


def _bundle(path: Path) -> Base:
    from edgepeft import runtime
    from edgepeft.runtime.adapters import slots

    model = runtime.load(path, threads=1)
    places = {name.removeprefix(PREFIX): slot.shape for name, slot in slots(model.session).items()}
    downs = {name.removesuffix(DOWN): shape[1] for name, shape in places.items() if name.endswith(DOWN)}
    linears = {module: (places[module + UP][1], k) for module, k in downs.items() if module + UP in places}
    others = {name: shape for name, shape in places.items() if not name.endswith((DOWN, UP))}
    manifest = model.manifest
    settings = read_json(path / "config.json")
    digest, tag = manifest["base_digest"], manifest["format"]
    return Base("bundle", path, digest, tag, settings, linears, others, token_count(path))


def _packed(path: Path, kind: str) -> Base:
    about = read_json(path / "quantized.json")
    header = tensor_header(path / "weights.safetensors")[0]
    parts = [*about["layers"], *about["kept"]]
    linears = {part["name"]: tuple(part["shape"]) for part in parts if part["kind"] == "linear"}
    packed = {f"{part['name']}.weight": tuple(part["shape"]) for part in parts if part["kind"] != "linear"}
    others = {
        name: tuple(entry["shape"])
        for name, entry in header.items()
        if not name.endswith(("qweight", "qscale", "qoffset"))
    }
    settings = read_json(path / "config.json")
    digest, tag = about["base_digest"], about["format"]
    return Base(kind, path, digest, tag, settings, linears, {**others, **packed}, token_count(path))


def _model(path: Path) -> Base:
    from edgepeft.backbone.checkpoint import tensor_shapes
    from edgepeft.backbone.families import FAMILIES
    from edgepeft.backbone.load import open_folder

    source = open_folder(path)
    kind = source.settings.get("model_type")
    family = next((row for row in FAMILIES.values() if kind in row.model_types), None)
    shapes = {}
    for name, shape in tensor_shapes(source).items():
        if new := family.rename(name) if family else name:
            shapes[new] = shape
    known = {name for name, _ in family.modules(family.linears, source.settings)} if family else None
    linears = {
        module: shape for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and (module := name.removesuffix(".weight"))
        and (module in known if known is not None else "embed" not in module)
    }  # fmt: skip
    others = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in linears}
    return Base("model folder", path, source.digest, "", source.settings, linears, others, token_count(path))
