"""Formats chosen per layer for a size: what each part loses in a coarser format, measured, against the bytes it saves.

    loss(part, format) = ‖layer(x; part packed alone) - layer(x)‖² / ‖layer(x)‖²    x: hidden states of the float model

A part is the linears of a layer that share an input (q k v; gate up): they run as one op only in one format. An
embedding's loss is that of its rows, a head's that of its logits; of one that is both it is the sum. Losses of
different parts are taken to add up. All parts begin in the finest format; then, step by step, the one goes to a coarser
format that loses least per byte, until the weights fit:

    --size    the bytes of weights.safetensors: packed weights, and what stays in float32. Adapter, tokenizer, graph and
              op libraries come on top.

Measured with round-to-nearest on SAMPLE batches, whatever solver packs afterwards. Left out: how losses of different
layers act on each other, and nf4b64, which is neither finer nor smaller than the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepeft.config import bytes_of
from edgepeft.console import progress, say
from edgepeft.quant.budget import EMBEDDINGS, FLOAT_BYTES, HEADER_BYTES, LINEARS, refuse_below
from edgepeft.quant.statistics import collect

if TYPE_CHECKING:
    from edgepeft.quant.walk import Walk

SAMPLE = 4


@dataclasses.dataclass(frozen=True)
class Choice:
    """One format of a part: what it takes and what it loses."""

    tag: str
    size: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Part:
    """Modules that take one format together, and the formats that fit, finest first."""

    modules: tuple[str, ...]
    choices: tuple[Choice, ...]


def choose(walk: Walk) -> dict[str, str]:
    """Return {module: tag} for the configured size. Raises ConfigError that says the least when it cannot be met."""
    parts = [part for part in measured(walk) if part.choices]
    budget = bytes_of(walk.work.config.size)
    assert budget is not None
    fixed = _fixed(walk, {module for part in parts for module in part.modules})
    taken = fit(parts, budget - fixed)
    if taken is None:
        least = fixed + sum(min(choice.size for choice in part.choices) for part in parts)
        most = fixed + sum(part.choices[0].size for part in parts)
        refuse_below(walk.work.config, least, most)
    assert taken is not None, "so the least fits"
    size = fixed + sum(choice.size for choice in taken)
    say(f"formats for {walk.work.config.size}: {size / 1e6:.2f} MB, loss {sum(choice.loss for choice in taken):.3g}")
    return {module: choice.tag for part, choice in zip(parts, taken, strict=True) for module in part.modules}


def fit(parts: Sequence[Part], budget: int) -> list[Choice] | None:
    """Return a choice for each part so that all fit into `budget` bytes, or None when they cannot.

    Greedy: the step that loses least per byte saved comes first; formats that save nothing are no steps.
    """
    taken = [part.choices[0] for part in parts]
    size = sum(choice.size for choice in taken)
    while size > budget:
        steps = [
            ((choice.loss - now.loss) / (now.size - choice.size), i, choice)
            for i, (part, now) in enumerate(zip(parts, taken, strict=True))
            for choice in part.choices
            if choice.size < now.size
        ]
        if not steps:
            return None
        _, i, choice = min(steps, key=lambda step: step[:2])
        size += choice.size - taken[i].size
        taken[i] = choice
    return taken


def _fixed(walk: Walk, moving: set[str]) -> int:
    """Return the bytes of the file that no choice changes: float tensors and the header."""
    from edgepeft.backbone.checkpoint import tensor_shapes

    stored = tensor_shapes(walk.tensors.source)
    shapes = {new: stored[old] for new, old in walk.tensors.old.items()}
    shapes |= {name: array.shape for name, array in walk.tensors.drawn.items()}
    kept = [math.prod(shape) for name, shape in shapes.items() if name.removesuffix(".weight") not in moving]
    return FLOAT_BYTES * sum(kept) + HEADER_BYTES * (len(shapes) + len(moving))


# --- measuring -----------------------------------------------------------------------------------------------------


def measured(walk: Walk) -> Iterator[Part]:
    """Yield every part of a model with its formats measured; one that fits no format has none."""
    outside = walk.tensors.read(walk.outside())
    hidden = walk.stream.embed(outside)[:SAMPLE]
    for i in progress(range(walk.count), "sensitivity", walk.count):
        tensors = walk.tensors.read(walk.names(i))
        layer = walk.stream.layer(i, tensors)
        after = list(walk.stream.run(i, layer, hidden))
        for group in walk.groups(i):
            yield _of_group(walk, i, group, tensors, layer, hidden, after)
        hidden = after
    top = collect(walk.stream.top(hidden), walk.stream.top(hidden))
    for name, array in outside.items():
        if walk.kinds[name] in ("linear", "head", "embedding"):
            yield _outside(walk, name, array, top)


def _of_group(
    walk: Walk, i: int, group: Sequence[str], tensors: dict[str, np.ndarray], layer: Any, hidden: Any, after: Any
) -> Part:
    choices = []
    for tag in LINEARS:
        packed = [_rounded(walk, module, "linear", tensors[f"{module}.weight"], tag) for module in group]
        if any(found is None for found in packed):
            continue
        for module, found in zip(group, packed, strict=True):
            walk.put(layer, i, module, found[1])
        loss = _distance(walk, after, walk.stream.run(i, layer, hidden))
        choices.append(Choice(tag, sum(found[0] for found in packed), loss))
    for module in group:
        walk.put(layer, i, module, tensors[f"{module}.weight"])
    return Part(tuple(group), tuple(choices))


def _rounded(walk: Walk, module: str, kind: str, array: np.ndarray, tag: str) -> Any:
    """Return (bytes, weight as it decodes) of a tensor in a format, or None where it does not fit."""
    from edgepeft.quant.stage import format_for

    fmt, _ = format_for(walk.work.config, kind, array.shape, walk.work.tied, tag)
    return None if fmt is None else (fmt.size_bytes(*array.shape), fmt.dequantize(fmt.quantize(array)))


def _distance(walk: Walk, exact: Sequence[torch.Tensor], other: Iterator[torch.Tensor]) -> float:
    """Return ‖other - exact‖² / ‖exact‖² over the tokens of a sample."""
    missed = whole = 0.0
    for x, y, mask in zip(exact, other, walk.stream.masks, strict=False):
        missed += float((y - x)[mask].square().sum())
        whole += float(x[mask].square().sum())
    return missed / whole if whole else 0.0


def _outside(walk: Walk, name: str, array: np.ndarray, top: Any) -> Part:
    """Measure an embedding, a head or a linear behind the layers."""
    module, kind, choices = name.removesuffix(".weight"), walk.kinds[name], []
    head = kind != "embedding" or (walk.work.tied and name == walk.word)
    for tag in EMBEDDINGS if kind == "embedding" else LINEARS:
        found = _rounded(walk, module, kind, array, tag)
        if found is not None:
            rows = float(np.square(found[1] - array).sum() / np.square(array).sum()) if kind == "embedding" else 0.0
            choices.append(Choice(tag, found[0], rows + (top.output_error(array, found[1]) ** 2 if head else 0.0)))
    return Part((module,), tuple(choices))
