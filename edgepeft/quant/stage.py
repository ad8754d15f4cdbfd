"""The stage `quantize`: a float model folder becomes packed weights, one tensor in memory at a time.

    model folder ─► family's names ─► linears, embeddings, head packed ─► weights.safetensors, quantized.json
                                      biases, norms, odd ones float       config.json, tokenizer files as they are

A weight that cannot take the format stays in float32 with the reason written down; a model none of whose linears can is
refused. A head that is tied to the word embedding is stored as that alone, in tiles as a linear needs them; its entry
in quantized.json says so (`tied_to`, 0 bytes). Errors are measured on what the stored bits decode to:

    relative_error = ‖W - Ŵ‖ / ‖W‖        max_error = max |W - Ŵ|        output_error = ‖(W - Ŵ) X‖ / ‖W X‖

Solvers that look at calibration texts X, and formats chosen per layer for a size, go along the model (`walk`), one
layer in memory at a time; the others tensor by tensor, in the order of the checkpoint. A model whose columns a solver
scaled is a base of its own, with a digest of its own.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.artifact import Run, key_of, write_json, write_tensors
from edgepeft.backbone.check import check_length, check_model, fast_tokenizer
from edgepeft.backbone.checkpoint import backbone_names, iter_tensors
from edgepeft.backbone.families import Family, check_task
from edgepeft.backbone.load import ModelSource, resolve_model
from edgepeft.config import Config
from edgepeft.console import progress, say, table
from edgepeft.errors import ModelError
from edgepeft.quant.budget import check_size
from edgepeft.quant.calibration import calibrated
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS, TIED_FORMATS, TILE_ROWS, Packed, WeightFormat
from edgepeft.quant.solvers import SOLVERS

if TYPE_CHECKING:
    from edgepeft.quant.statistics import Statistics

FEWEST_ROWS = 16  # below, an embedding is smaller than one packed tile and not worth an error
PACKED_KINDS = ("linear", "embedding", "head")
PIECE = 1 << 22  # how many weights are decoded at a time to measure their error
FRESH_DEVIATION = 0.02
MIXED = "mixed"  # what is said of a model whose formats were chosen per layer


def quantize(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Write the packed backbone of the configured model below `out` and return counts, bytes and errors.

    Raises ModelError for a model that is damaged, of an unknown family, or that the format fits nowhere; ConfigError
    for one that is not of the task.
    """
    source = resolve_model(config)
    family = check_model(source)
    check_task(family, config.task, str(source.path))
    if config.size:
        check_size(config, source, family)
    config = config.replace(max_length=check_length(config, source))
    kinds = family.tensors(source.settings)
    work = Work(config, family, family.tied(source.settings))
    if calibrated(config):
        from edgepeft.quant.walk import calibrate

        calibrate(source, work, kinds)
    else:
        for name, array in progress(_backbone(source, family, kinds), "quantize", len(kinds)):
            work.add(name, kinds[name], array)
    _tell(work)
    if not any(layer["kind"] == "linear" for layer in work.layers):
        counts = Counter(kept["reason"] for kept in work.kept if kept["kind"] == "linear")
        reasons = "; ".join(f"{reason} ({count} linears)" for reason, count in counts.items())
        raise ModelError(
            f"{source.path}: no linear layer can take the format {config.format}: {reasons}. Take another."
        )
    about = work.about(source)
    meta = {"format": "pt", "edgepeft.base": about["base_digest"], "edgepeft.format": about["format"]}
    write_tensors(out / "weights.safetensors", work.tensors, meta)
    write_json(out / "quantized.json", about)
    copy_model_files(source.path, source.tokenizer_files, out)
    return _summary(about, out / "weights.safetensors")


@dataclasses.dataclass
class Work:
    """What has been packed so far. tied: whether the word embedding is the head too.

    chosen: {module: tag} of formats that are not the configured ones.  scaled: {linear: scales of its columns}.
    """

    config: Config
    family: Family
    tied: bool = False
    chosen: dict[str, str] = dataclasses.field(default_factory=dict)
    scaled: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    layers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    kept: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, name: str, kind: str, array: np.ndarray, seen: Statistics | None = None) -> Packed | None:
        """Pack one tensor, or keep it in float32 and return None. seen: what the inputs of a linear say."""
        module = name.removesuffix(".weight")
        if kind not in PACKED_KINDS:
            self.tensors[name] = array
            return None
        fmt, reason = self.format(module, kind, array.shape)
        head = {"name": self.family.head, "kind": "head", "tied_to": module}
        if fmt is None:
            self.tensors[name] = array
            kept = {"name": module, "kind": kind, "shape": list(array.shape), "reason": reason}
            self.kept += [kept, {**kept, **head, "reason": f"tied to {module}"}] if self._is_tied(kind) else [kept]
            return None
        double, solver = self.config.double_quant and kind != "embedding", SOLVERS[self.config.solver]
        packed = solver.round(fmt, array, double) if seen is None else solver.solve(fmt, array, double, seen)
        layer = {"name": module, "kind": kind, **describe(fmt, packed, array)}
        if seen is not None:
            layer["output_error"] = seen.output_error(array, fmt.dequantize(packed))
        self.layers += [layer, {**layer, **head, "bytes": 0}] if self._is_tied(kind) else [layer]
        self.tensors.update(packed_tensors(module, packed))
        return packed

    def format(self, module: str, kind: str, shape: Sequence[int]) -> tuple[WeightFormat | None, str]:
        """Return the format that a tensor takes, or None and why it stays in float32."""
        return format_for(self.config, kind, shape, self.tied, self.chosen.get(module))

    def _is_tied(self, kind: str) -> bool:
        return self.tied and kind == "embedding"

    def about(self, source: ModelSource) -> dict[str, Any]:
        """Return quantized.json."""
        config, family = self.config, self.family
        return {
            "base_digest": key_of([source.digest, self.scaled]) if self.scaled else source.digest,
            "source_digest": source.digest,
            "model": source.path.name if Path(config.model).exists() else config.model,
            "family": family.tag, "prefix": family.prefix, "format": MIXED if self.chosen else config.format,
            "embedding_format": config.embedding_format, "double_quant": config.double_quant, "solver": config.solver,
            "layers": self.layers, "kept": self.kept,
        }  # fmt: skip


def format_for(
    config: Config, kind: str, shape: Sequence[int], tied: bool = False, chosen: str | None = None
) -> tuple[WeightFormat | None, str]:
    """Return the format that a tensor of this kind and shape takes, or None and why it stays in float32.

    tied: whether an embedding is the head too.  chosen: a tag in place of the configured one.
    """
    if kind not in PACKED_KINDS:
        return None, "no matrix"
    tag = chosen or (config.embedding_format if kind == "embedding" else config.format)
    if tag == "float":
        return None, "--embedding-format float"
    if kind == "embedding" and shape[0] < FEWEST_ROWS:
        return None, f"{shape[0]} rows are not worth packing"
    rows = kind == "embedding" and not tied
    fmt = EMBEDDING_FORMATS[tag] if rows else FORMATS[TIED_FORMATS[tag] if kind == "embedding" else tag]
    reason = fmt.check_shape(*shape)
    return (None, reason) if reason else (fmt, "")


def packed_tensors(module: str, packed: Packed) -> dict[str, np.ndarray]:
    """Return a packed weight's tensors under their names on disk."""
    parts = {"qweight": packed.w, "qscale": packed.scale, **packed.extra}
    return {f"{module}.{name}": array for name, array in parts.items()}


def describe(fmt: WeightFormat, packed: Packed, w_nk: np.ndarray) -> dict[str, Any]:
    """Return format, shape, bytes and errors of a packed weight, against the float one."""
    squares, missed, largest = 0.0, 0.0, 0.0
    for rows, piece in _pieces(fmt, packed):
        difference = fmt.dequantize(piece)
        np.subtract(w_nk[rows], difference, out=difference)
        squares += float(np.linalg.norm(w_nk[rows])) ** 2
        missed += float(np.linalg.norm(difference)) ** 2
        largest = max(largest, float(np.abs(difference).max()))
    return {
        "format": fmt.tag,
        "layout": fmt.layout,
        "shape": [packed.n, packed.k],
        "relative_error": (missed / squares) ** 0.5 if squares else 0.0,
        "max_error": largest,
        "bytes": packed.w.nbytes + packed.scale.nbytes,
    }


def _pieces(fmt: WeightFormat, packed: Packed) -> Iterator[tuple[slice, Packed]]:
    """Yield (rows, their packed weight), so that a large vocabulary need not be decoded at once."""
    step = max(PIECE // packed.k // TILE_ROWS, 1) * TILE_ROWS
    for start in range(0, packed.n, step):
        rows = slice(start, min(start + step, packed.n))
        stored = rows if fmt.layout == "rows" else slice(start // TILE_ROWS, -(-rows.stop // TILE_ROWS))
        yield rows, Packed(fmt.tag, rows.stop - start, packed.k, packed.w[stored], packed.scale[stored])


# --- reading the checkpoint ----------------------------------------------------------------------------------------


def _backbone(source: ModelSource, family: Family, kinds: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name in the task model, array) of the whole backbone; parts the checkpoint lacks are drawn."""
    names = backbone_names(source, family)
    for old, array in iter_tensors(source):
        if (name := names.get(old)) is not None:
            yield name, array.astype(np.float32, copy=False)
    yield from drawn(source, names, kinds)


def drawn(source: ModelSource, names: Mapping[str, str], kinds: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) of the parts that a checkpoint lacks, the same at every call."""
    missing = [name for name in kinds if name not in set(names.values())]
    hidden = int(source.settings["hidden_size"]) if missing else 0
    for name in missing:
        say(f"{name}: not in the checkpoint, drawn anew")
        shape = (hidden, hidden) if kinds[name] == "linear" else (hidden,)
        draw = np.random.default_rng(0).normal(0, FRESH_DEVIATION, shape)
        yield name, (draw if kinds[name] == "linear" else np.zeros(shape)).astype(np.float32)


def copy_model_files(folder: Path, tokenizer_files: Sequence[Path], out: Path) -> None:
    """Copy config.json and the tokenizer; make tokenizer.json, which the device reads, where there is none."""
    for file in (folder / "config.json", *tokenizer_files):
        shutil.copyfile(file, out / file.name)
    if not (out / "tokenizer.json").exists():
        fast_tokenizer(folder).save(str(out / "tokenizer.json"))


# --- telling -------------------------------------------------------------------------------------------------------


def _tell(work: Work) -> None:
    """Say what was packed, what was kept and why, and what each layer lost, the most first."""
    kinds = PACKED_KINDS if work.family.head else ("linear", "embedding")
    say("quantized " + ", ".join(_counts(work, kind) for kind in kinds) + _kept(work.kept))
    layers = sorted((e for e in work.layers if "tied_to" not in e), key=lambda layer: -layer["relative_error"])
    columns = ("name", "format", "relative_error", "max_error", "output_error")
    if layers:
        shown = columns if any("output_error" in layer for layer in layers) else columns[:-1]
        say(table([{column: layer.get(column) for column in shown} for layer in layers]))


def _counts(work: Work, kind: str) -> str:
    done = [layer for layer in work.layers if layer["kind"] == kind]
    total = len(done) + sum(kept["kind"] == kind for kept in work.kept)
    tags = Counter(layer["format"] for layer in done)
    how = ", ".join(tags) if len(tags) < 2 else ", ".join(f"{count} {tag}" for tag, count in tags.items())
    how += "".join(f", tied to {layer['tied_to']}" for layer in done[:1] if "tied_to" in layer)
    return f"{len(done)} of {total} {kind}{'' if kind == 'head' else 's'}" + (f" ({how})" if done else "")


def _kept(kept: Sequence[Mapping[str, Any]]) -> str:
    if not kept:
        return ""
    shown = ", ".join(f"{entry['name']} ({entry['reason']})" for entry in kept[:6])
    return f"; kept float: {shown}" + (f" and {len(kept) - 6} more" if len(kept) > 6 else "")


def _summary(about: Mapping[str, Any], weights: Path) -> dict[str, Any]:
    """Return the numbers of the stage for the run's record."""
    layers = {kind: [layer for layer in about["layers"] if layer["kind"] == kind] for kind in PACKED_KINDS}
    errors = [layer["relative_error"] for layer in layers["linear"]]
    outputs = [layer["output_error"] for layer in layers["linear"] if "output_error" in layer]
    return {
        **{f"{kind}s": len(found) for kind, found in layers.items()}, "kept": len(about["kept"]),
        "format": about["format"], "embedding_format": about["embedding_format"], "bytes": weights.stat().st_size,
        **{f"{kind}_bytes": sum(layer["bytes"] for layer in found) for kind, found in layers.items()},
        "mean_relative_error": float(np.mean(errors)), "max_relative_error": max(errors),
        **({"mean_output_error": float(np.mean(outputs))} if outputs else {}),
    }  # fmt: skip
