"""The stage `merge`: the adapter goes into the packed weights, and what survives is measured before anything ships.

Per adapted linear the weight is dequantized, what the adapter makes of it quantized again in the same format:

    Ŵ' = quantize(Ŵ + ΔW)        ΔW = s_out ⊙ (Ŵ ⊙ s_in + B·A) - Ŵ        moved = Ŵ' - Ŵ

A ΔW that is one number for all of a block (QA-LoRA's) need not enter the grid: it becomes the weight's offset, float32
[N, J], which the op adds from sums of x over the blocks, exactly as the adapter did, under any format.

A coarse grid swallows small changes, so two figures say what is left of ΔW, per layer and over all layers together:

    retention = 1 - ‖moved - ΔW‖ / ‖ΔW‖        1: exact; 0: as far off as without any adapter; below 0: farther
    share     = <moved, ΔW> / ‖ΔW‖²            how far the weights went in the adapter's direction; 1 is all the way

Retention counts the rounding noise against the merge, share does not. The build stops when retention over all layers is
below --min-retention, or when the validation metric of the merged model, read back from the files, falls more than
--max-metric-drop below that of base and adapter apart. A linear kept in float takes ΔW exactly.

Scales of blocks that serve best as they are stay, so a zero adapter changes no bit. Biases and whole tensors of the
adapter take the place of the base's, exactly; the head is not merged: it lies in the adapter's file, in float.

Left out: calibrated merging, and adapted embeddings, whose rows a grid would lose one by one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.adapt import choice, peft_files
from edgepeft.adapt.base import Base
from edgepeft.adapt.terms import Effect, Terms
from edgepeft.artifact import Run, read_json, read_tensors, write_json, write_tensors
from edgepeft.console import progress, say, table
from edgepeft.errors import ArtifactError, VerifyError
from edgepeft.quant import native
from edgepeft.quant.formats import FORMATS, TILE_COLUMNS, TILE_ROWS, Packed
from edgepeft.quant.solvers import SOLVERS
from edgepeft.quant.stage import describe, packed_tensors

if TYPE_CHECKING:
    from edgepeft.config import Config


def merge(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Write the merged weights below `out`, with merge.json, and return the figures.

    Raises VerifyError with the figures when too little of the adapter survives, ArtifactError for folders that do not
    belong together.
    """
    quantized, about = run.path("quantized"), read_json(run.path("quantized") / "quantized.json")
    tensors = read_tensors(quantized / "weights.safetensors")
    base = Base(dict(tensors), about, quantized)
    effect = peft_files.read(run.path("adapter"), base=base).effect(base)
    if config.adapter == choice.AUTO and (parts := unmergeable(effect, base)):
        return choice.apart(parts, out)
    check_mergeable(effect, base)
    rows, layers = [], {layer["name"]: dict(layer) for layer in about["layers"]}
    changes = {name: terms for name, terms in effect.modules.items() if set(terms.present) - {"bias"}}
    for module, terms in progress(changes.items(), "merge", len(changes)):
        figures, changed = merge_terms(module, terms, base, layers.get(module))
        tensors.update(changed)
        rows.append(figures)
    tensors.update(whole_tensors(effect, base))
    _write(quantized, out, tensors, {**about, "merged": True, "layers": list(layers.values())}, config)
    limits = {"min_retention": config.min_retention, "max_metric_drop": config.max_metric_drop}
    report = {"layers": rows, **overall(rows), "validation": _metrics(config, run, out), **limits}
    _tell(report)
    report |= choice.decide(report) if config.adapter == choice.AUTO else {}
    write_json(out / "merge.json", report)
    if report.get("ships") == "separate":
        (out / "weights.safetensors").unlink()
    elif problems := _problems(report):
        advice = "Ship the adapter apart (--adapter separate) or take a finer --format such as i8c."
        raise VerifyError(" ".join([*problems, advice]))
    return {name: value for name, value in report.items() if name != "layers"}


def check_mergeable(effect: Effect, base: Base) -> None:
    """Raise ArtifactError, naming each, for parts of an effect that cannot go into the weights."""
    if problems := unmergeable(effect, base):
        raise ArtifactError(f"cannot be merged: {'; '.join(problems)}. Ship the adapter apart (--adapter separate).")


def unmergeable(effect: Effect, base: Base) -> list[str]:
    """Return, in words, the parts of an effect that cannot go into the weights."""
    problems = ["a prompt stands before the text and in no weight"] if effect.prompt else []
    problems += [f"{name} is an embedding" for name in effect.modules if name in base.embeddings]
    tied = [name for name in effect.modules if name in base.linears and base.stored(name) != name]
    problems += [f"{name} is the word embedding too, which would change as well" for name in tied]
    problems += [f"{name} has a branch beside its weight" for name, terms in effect.modules.items() if terms.beside]
    biases = [name for name, terms in effect.modules.items() if terms.bias is not None and base.bias(name) is None]
    return problems + [f"{name} has no bias in the model, and the adapter gives it one" for name in biases]


def whole_tensors(effect: Effect, base: Base) -> dict[str, np.ndarray]:
    """Return the biases and other float tensors that take the place of the base's, heads left out."""
    biases = {f"{name}.bias": terms.bias for name, terms in effect.modules.items() if terms.bias is not None}
    whole = {name: value for name, value in effect.replaced.items() if name.split(".")[0] not in base.heads}
    return {**biases, **whole}


def merge_terms(
    module: str, terms: Terms, base: Base, layer: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Put the terms of one linear into its weight, as an offset where they are one; else as `merge_module`."""
    if (
        layer is not None
        and terms.group
        and terms.group % TILE_COLUMNS == 0
        and not {"s_in", "s_out"} & set(terms.present)
    ):
        return offset_module(module, terms, layer)
    return merge_module(module, terms.delta(base.weight(module)), layer, base.tensors, base.about)


def offset_module(module: str, terms: Terms, layer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the figures of a linear whose ΔW is one number for each block, and that offset [16T, J]."""
    a_rk, b_nr = terms.low_rank
    delta_nj = b_nr.astype(np.float64) @ a_rk[:, :: terms.group]
    offset = np.zeros((-(-len(delta_nj) // TILE_ROWS) * TILE_ROWS, delta_nj.shape[1]), np.float32)
    offset[: len(delta_nj)] = delta_nj
    layer.update(offset_blocks=offset.shape[1], bytes=layer["bytes"] + offset.nbytes)
    moved, delta = (np.repeat(value, terms.group, axis=1) for value in (offset[: len(delta_nj)], delta_nj))
    return _figures(module, layer["format"], moved, delta), {f"{module}.qoffset": offset}


def merge_module(
    module: str, delta_nk: np.ndarray, layer: dict[str, Any] | None, tensors: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:  # fmt: skip
    """Add ΔW [N, K] to one linear; return its figures and new tensors; bring `layer` (quantized.json) up to date."""
    if layer is None:
        name = f"{module}.weight"
        if name not in tensors:
            raise ArtifactError(
                f"{module}: adapted, but the packed backbone has no such linear. Train the adapter anew."
            )
        return _figures(module, None, delta_nk, delta_nk), {name: tensors[name] + delta_nk}
    fmt, (n, k) = FORMATS[layer["format"]], layer["shape"]
    before = Packed(fmt.tag, n, k, tensors[f"{module}.qweight"], tensors[f"{module}.qscale"])
    w_nk = native.dequantize(before)
    solver = SOLVERS[about["solver"]]
    after = solver.round(fmt, w_nk + delta_nk, about["double_quant"], known_nb=fmt.unpack(before)[1])
    layer.update(describe(fmt, after, w_nk + delta_nk))
    return _figures(module, fmt.tag, native.dequantize(after) - w_nk, delta_nk), packed_tensors(module, after)


# --- figures -------------------------------------------------------------------------------------------------------


def _figures(module: str, tag: str | None, moved: np.ndarray, delta: np.ndarray) -> dict[str, Any]:
    """Return a layer's figures; the sums of squares let `overall` weigh the layers."""
    moved, delta = moved.ravel().astype(np.float64), delta.ravel().astype(np.float64)
    sums = {"square": delta @ delta, "missed": float(np.square(moved - delta).sum()), "along": float(moved @ delta)}
    return {"name": module, "format": tag or "float32", **_ratios(sums), "sums": sums}


def _ratios(sums: Mapping[str, float]) -> dict[str, float]:
    """Return retention and share; an adapter that adds nothing is retained when nothing moved."""
    if not sums["square"]:
        return {"retention": float(not sums["missed"]), "share": 1.0}
    return {
        "retention": 1 - float(np.sqrt(sums["missed"] / sums["square"])),
        "share": float(sums["along"] / sums["square"]),
    }


def overall(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return retention and share over all layers, each weighing as the square of its ΔW."""
    sums = {key: float(sum(row["sums"][key] for row in rows)) for key in ("square", "missed", "along")}
    return _ratios(sums)


def _metrics(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Return the validation metric of base and adapter apart, and of the merged model as written."""
    import torch

    from edgepeft.adapt import layers
    from edgepeft.backbone.load import quantized_model
    from edgepeft.train.data import load_splits
    from edgepeft.train.loop import load_tokenizer, predict
    from edgepeft.train.tasks import TASKS
    from edgepeft.train.watch import quiet

    if config.threads:
        torch.set_num_threads(config.threads)
    splits, task = load_splits(config), TASKS[config.task]
    with quiet():
        tokenizer = load_tokenizer(run.path("quantized"))
        apart = layers.load(quantized_model(run.path("quantized"), splits.labels, config), run.path("adapter"))
        merged = merged_model(out, run.path("adapter"), splits.labels, config)
    labels = np.asarray(splits.validation.labels)
    answers = [predict(model, config, splits.validation, tokenizer) for model in (apart, merged)]
    before, after = (task.metrics(answer, labels)[task.select] for answer in answers)
    noise = choice.noise(*(task.scores(answer, labels) for answer in answers))
    found = {"metric": task.select, "separate": before, "merged": after, "drop": task.drop(before, after)}
    return {**found, "noise": noise}


def merged_model(folder: Path, adapter: Path, labels: Sequence[str], config: Config) -> Any:
    """Return the PyTorch model on merged weights, with the head that was trained with the adapter."""
    import torch

    from edgepeft.backbone.load import quantized_model

    model = quantized_model(folder, labels, config)
    heads = {name: torch.from_numpy(value.copy()) for name, value in merged_heads(adapter, Base.open(folder)).items()}
    model.load_state_dict(heads, strict=False)
    return model


def merged_heads(adapter: Path, base: Base) -> dict[str, np.ndarray]:
    """Return the tensors of the trained head under their names in the task model."""
    whole = peft_files.read(adapter).whole
    return {name: value for name, value in whole.items() if name.split(".")[0] in base.heads}


def _problems(report: Mapping[str, Any]) -> list[str]:
    """Return what falls short of the limits, with the figures."""
    found, problems = report["validation"], []
    if not report["retention"] >= report["min_retention"]:
        problems.append(
            f"merging retains {report['retention']:.3f} of the adapter (share {report['share']:.3f}); at least "
            f"{report['min_retention']:g} is asked for (--min-retention): the grid of the weights is too coarse for it."
        )
    if not found["drop"] <= report["max_metric_drop"]:
        moves = "raises" if found["merged"] > found["separate"] else "lowers"
        problems.append(
            f"merging {moves} validation {found['metric']} from {found['separate']:.4f} to {found['merged']:.4f}; at "
            f"most {report['max_metric_drop']:g} is allowed (--max-metric-drop)."
        )
    return problems


# --- writing and telling -------------------------------------------------------------------------------------------


def _write(
    quantized: Path, out: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any], config: Config
) -> None:
    """Write a folder that `quantized_model` and the export read like a quantized one."""
    meta = {"format": "pt", "edgepeft.base": about["base_digest"], "edgepeft.format": about["format"]}
    write_tensors(out / "weights.safetensors", tensors, {**meta, "edgepeft.merged": config.method})
    write_json(out / "quantized.json", about)
    shutil.copyfile(quantized / "config.json", out / "config.json")


def _tell(report: Mapping[str, Any]) -> None:
    rows = sorted(report["layers"], key=lambda row: row["retention"])
    say(f"merged {len(report['layers'])} linears: retention {report['retention']:.3f}, share {report['share']:.3f}")
    say(table([{name: row[name] for name in ("name", "format", "retention", "share")} for row in rows]))
    found = report["validation"]
    say(f"validation {found['metric']}: {found['separate']:.4f} apart, {found['merged']:.4f} merged")
