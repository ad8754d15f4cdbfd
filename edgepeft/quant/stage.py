"""The stage `quantize`: a float model folder becomes packed weights, one tensor in memory at a time.

    model folder ─► family's names ─► linears and embeddings packed ─► weights.safetensors, quantized.json
                                      biases, norms, odd ones float    config.json, tokenizer files as they are

A weight that cannot take the format stays in float32 with the reason written down; a model none of whose linears can is
refused. Errors are measured on what the stored bits decode to: relative  ‖W - Ŵ‖ / ‖W‖,  largest  max |W - Ŵ|.

Left out: calibration data (no solver reads any yet), formats chosen per layer.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.artifact import Run, write_json, write_tensors
from edgepeft.backbone.families import Family, family_of
from edgepeft.backbone.load import ModelSource, iter_tensors, resolve_model, tensor_shapes
from edgepeft.config import Config
from edgepeft.console import progress, say, table
from edgepeft.errors import ModelError
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS, Packed, WeightFormat
from edgepeft.quant.solvers import SOLVERS

FEWEST_ROWS = 16  # below, an embedding is smaller than one packed tile and not worth an error
PACKED_KINDS = ("linear", "embedding")
FRESH_DEVIATION = 0.02
WORST_SHOWN = 5


def quantize(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Write the packed backbone of the configured model below `out` and return counts, bytes and errors.

    Raises ModelError for a model that is damaged, of an unknown family, or that the format fits nowhere.
    """
    source = resolve_model(config)
    family = family_of(source.settings, str(source.path))
    kinds = family.tensors(source.settings)
    _check_names(source, family, kinds)
    work = _Work(config, family)
    for name, array in progress(_backbone(source, family, kinds), "quantize", len(kinds)):
        work.add(name, kinds[name], array)
    _tell(config, work)
    if not any(layer["kind"] == "linear" for layer in work.layers):
        reasons = "; ".join(f"{kept['name']}: {kept['reason']}" for kept in work.kept if kept["kind"] == "linear")
        raise ModelError(
            f"{source.path}: no linear layer can take the format {config.format}: {reasons}. Take another."
        )
    about = work.about(source)
    meta = {"format": "pt", "edgepeft.base": source.digest, "edgepeft.format": config.format}
    write_tensors(out / "weights.safetensors", work.tensors, meta)
    write_json(out / "quantized.json", about)
    copy_model_files(source.path, source.tokenizer_files, out)
    return _summary(about, out / "weights.safetensors")


@dataclasses.dataclass
class _Work:
    """What has been packed so far."""

    config: Config
    family: Family
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    layers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    kept: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, name: str, kind: str, array: np.ndarray) -> None:
        """Pack one tensor, or keep it in float32."""
        module = name.removesuffix(".weight")
        if kind not in PACKED_KINDS:
            self.tensors[name] = array
            return
        fmt, reason = format_for(self.config, kind, array.shape)
        if fmt is None:
            self.tensors[name] = array
            self.kept.append({"name": module, "kind": kind, "shape": list(array.shape), "reason": reason})
            return
        double = self.config.double_quant and kind == "linear"
        packed = SOLVERS[self.config.solver](fmt, array, double)
        self.layers.append({"name": module, "kind": kind, **describe(fmt, packed, array)})
        self.tensors.update(packed_tensors(module, packed))

    def about(self, source: ModelSource) -> dict[str, Any]:
        """Return quantized.json."""
        config, family = self.config, self.family
        return {
            "base_digest": source.digest,
            "model": source.path.name if Path(config.model).exists() else config.model,
            "family": family.tag, "prefix": family.prefix, "format": config.format,
            "embedding_format": config.embedding_format, "double_quant": config.double_quant, "solver": config.solver,
            "layers": self.layers, "kept": self.kept,
        }  # fmt: skip


def format_for(config: Config, kind: str, shape: Sequence[int]) -> tuple[WeightFormat | None, str]:
    """Return the format that a tensor of this kind and shape takes, or None and why it stays in float32."""
    if kind not in PACKED_KINDS:
        return None, "no matrix"
    tag = config.format if kind == "linear" else config.embedding_format
    if tag == "float":
        return None, "--embedding-format float"
    if kind == "embedding" and shape[0] < FEWEST_ROWS:
        return None, f"{shape[0]} rows are not worth packing"
    fmt = FORMATS[tag] if kind == "linear" else EMBEDDING_FORMATS[tag]
    reason = fmt.check_shape(*shape)
    return (None, reason) if reason else (fmt, "")


def packed_tensors(module: str, packed: Packed) -> dict[str, np.ndarray]:
    """Return a packed weight's tensors under their names on disk."""
    parts = {"qweight": packed.w, "qscale": packed.scale, **packed.extra}
    return {f"{module}.{name}": array for name, array in parts.items()}


def describe(fmt: WeightFormat, packed: Packed, w_nk: np.ndarray) -> dict[str, Any]:
    """Return format, shape, bytes and errors of a packed weight, against the float one."""
    difference = fmt.dequantize(packed)
    np.subtract(w_nk, difference, out=difference)
    norm = float(np.linalg.norm(w_nk))
    return {
        "format": fmt.tag,
        "shape": [packed.n, packed.k],
        "relative_error": float(np.linalg.norm(difference)) / norm if norm else 0.0,
        "max_error": float(np.abs(difference).max()),
        "bytes": packed.w.nbytes + packed.scale.nbytes,
    }


# --- reading the checkpoint ----------------------------------------------------------------------------------------


def _check_names(source: ModelSource, family: Family, kinds: Mapping[str, str]) -> None:
    """Raise ModelError when the checkpoint lacks a part of the backbone or holds one the family does not know."""
    shapes = {new: shape for old, shape in tensor_shapes(source).items() if (new := family.rename(old))}
    fresh = tuple(f"{family.prefix}.{family.linears[role]}." for role in family.fresh)
    missing = [name for name in kinds if name not in shapes and not name.startswith(fresh)]
    strange = [name for name in shapes if name not in kinds]
    flat = [n for n, shape in shapes.items() if kinds.get(n) in ("linear", "embedding") and len(shape) != 2]
    problems = [
        f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("not known to the family", strange), ("not a matrix", flat))
        if names
    ]
    if problems:
        raise ModelError(
            f"{source.path}: does not hold a {family.tag} model as its config.json describes it: {'; '.join(problems)}."
        )


def _backbone(source: ModelSource, family: Family, kinds: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name in the task model, array) of the whole backbone; parts the checkpoint lacks are drawn."""
    seen = set()
    for old, array in iter_tensors(source):
        if (name := family.rename(old)) is not None:
            seen.add(name)
            yield name, array.astype(np.float32, copy=False)
    hidden = int(source.settings["hidden_size"]) if len(seen) < len(kinds) else 0
    for name in [name for name in kinds if name not in seen]:
        say(f"{name}: not in the checkpoint, drawn anew")
        shape = (hidden, hidden) if kinds[name] == "linear" else (hidden,)
        draw = np.random.default_rng(0).normal(0, FRESH_DEVIATION, shape)
        yield name, (draw if kinds[name] == "linear" else np.zeros(shape)).astype(np.float32)


def copy_model_files(folder: Path, tokenizer_files: Sequence[Path], out: Path) -> None:
    """Copy config.json and the tokenizer; make tokenizer.json, which the device reads, where there is none."""
    for file in (folder / "config.json", *tokenizer_files):
        shutil.copyfile(file, out / file.name)
    if (out / "tokenizer.json").exists():
        return
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer.save(
            str(out / "tokenizer.json")
        )
    except (AttributeError, ValueError, OSError, ImportError) as error:
        raise ModelError(
            f"{folder}: has no tokenizer.json and its tokenizer cannot be turned into one: {error}. Save a "
            "fast tokenizer there."
        ) from None


# --- telling -------------------------------------------------------------------------------------------------------


def _tell(config: Config, work: _Work) -> None:
    """Say what was packed, what was kept and why, and which layers lost most."""
    say("quantized " + ", ".join(_counts(work, kind) for kind in ("linear", "embedding")) + _kept(work.kept))
    worst = sorted(work.layers, key=lambda layer: -layer["relative_error"])[:WORST_SHOWN]
    columns = ("name", "format", "relative_error", "max_error")
    if worst:
        say(table([{column: layer[column] for column in columns} for layer in worst]))


def _counts(work: _Work, kind: str) -> str:
    done = [layer for layer in work.layers if layer["kind"] == kind]
    total = len(done) + sum(kept["kind"] == kind for kept in work.kept)
    return f"{len(done)} of {total} {kind}s" + (f" ({done[0]['format']})" if done else "")


def _kept(kept: Sequence[Mapping[str, Any]]) -> str:
    if not kept:
        return ""
    shown = ", ".join(f"{entry['name']} ({entry['reason']})" for entry in kept[:6])
    return f"; kept float: {shown}" + (f" and {len(kept) - 6} more" if len(kept) > 6 else "")


def _summary(about: Mapping[str, Any], weights: Path) -> dict[str, Any]:
    """Return the numbers of the stage for the run's record."""
    linears = [layer for layer in about["layers"] if layer["kind"] == "linear"]
    errors = [layer["relative_error"] for layer in linears]
    return {
        "linears": len(linears), "embeddings": len(about["layers"]) - len(linears), "kept": len(about["kept"]),
        "format": about["format"], "embedding_format": about["embedding_format"],
        "bytes": weights.stat().st_size, "linear_bytes": sum(layer["bytes"] for layer in linears),
        "embedding_bytes": sum(layer["bytes"] for layer in about["layers"]) - sum(layer["bytes"] for layer in linears),
        "mean_relative_error": float(np.mean(errors)), "max_relative_error": max(errors),
    }  # fmt: skip
