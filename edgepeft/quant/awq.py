"""AWQ: columns that see large inputs get finer steps, at no cost when the model runs.

    W x = (W diag(s)) (x / s)        s = magnitude^a, over its geometric middle;  magnitude_k = mean |x_k|

(https://arxiv.org/abs/2306.00978). The exponent a is the one of EXPONENTS whose rounded weights keep the outputs of all
linears that share x best. 1 / s goes, exactly, into what made x, so no operator is added:

| linears | what takes 1 / s | because |
|---|---|---|
| q, k, v | the weight of the norm before them | x = norm * weight |
| o | the rows of v, s alike for the heads that share one | attention mixes tokens, never columns |
| gate, up | the weight of the norm before them | the same |
| down | the rows of up | x = act(gate) * up |

Where there is no such part the linears stay as they are: an encoder's norms feed the sum beside the linears too, and
its activation lies between up and down. Scaled weights belong to a base of their own: an adapter of one is none of the
other's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepeft.quant.formats import WeightFormat

if TYPE_CHECKING:
    from edgepeft.backbone.families import Family
    from edgepeft.quant.statistics import Statistics

EXPONENTS = np.linspace(0.0, 1.0, 11)
SMALLEST = 1e-4


@dataclasses.dataclass(frozen=True)
class Fold:
    """Roles that share an input, and what takes their scale back: a norm, or the last rows of a linear, by role."""

    roles: tuple[str, ...]
    norms: tuple[str, ...] = ()
    rows_of: tuple[str, ...] = ()


FOLDS = (
    Fold(("q", "k", "v", "qkv"), norms=("input",)),
    Fold(("o",), rows_of=("v", "qkv")),
    Fold(("gate", "up", "gate_up"), norms=("pre_feedforward", "post_attention")),
    Fold(("down",), rows_of=("up", "gate_up")),
)


def folds(family: Family) -> list[Fold]:
    """Return what can be folded in a family, each with the one part that it has."""
    kept = []
    for fold in FOLDS:
        roles = tuple(role for role in fold.roles if role in family.linears)
        norms = tuple(role for role in fold.norms if role in family.norms)[:1] if family.kind == "decoder" else ()
        rows = tuple(role for role in fold.rows_of if role in family.linears)
        if family.kind == "encoder" and roles == ("down",):
            rows = ()
        if roles and (norms or rows):
            kept.append(Fold(roles, norms, rows))
    return kept


def fold_layer(
    family: Family,
    settings: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    name: Callable[[str], str],
    seen: Callable[[str], Statistics],
    formats: Callable[[str], WeightFormat | None],
) -> dict[str, list[float]]:
    """Scale a layer's tensors in place, and return {first linear: s} of what was scaled.

    name(role) -> module;  seen(module) -> what its inputs say;  formats(module) -> its format, None for float.
    """
    done = {}
    for fold in folds(family):
        modules = [name(role) for role in fold.roles]
        found = [fmt for module in modules if (fmt := formats(module)) is not None]
        if len(found) < len(modules):
            continue
        magnitude, spread = _shared(family, settings, fold, seen(modules[0]))
        weights = [torch.from_numpy(tensors[f"{module}.weight"]) for module in modules]
        s_k = _search(magnitude, weights, found, seen(modules[0]).hessian)
        if s_k is None:
            continue
        for module, w in zip(modules, weights, strict=True):
            tensors[f"{module}.weight"] = (w * s_k).numpy()
        _take_back(family, settings, fold, tensors, name, s_k if spread is None else spread(s_k))
        done[modules[0]] = s_k.tolist()
    return done


def _shared(
    family: Family, settings: Mapping[str, Any], fold: Fold, seen: Statistics
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor] | None]:
    """Return the magnitude [K], alike where columns must be scaled alike, and how to get v's rows of it."""
    if fold.roles != ("o",) or family.kind == "encoder":
        return seen.magnitude, None
    from edgepeft.backbone.decoder import describe

    about = describe(settings)
    shape = about.kv_heads, about.heads // about.kv_heads, about.head_dim
    mean = seen.magnitude.view(shape).mean(1, keepdim=True)
    return mean.expand(shape).reshape(-1), lambda s_k: s_k.view(shape)[:, 0].reshape(-1)


def _search(
    magnitude: torch.Tensor, weights: Iterable[torch.Tensor], formats: list[WeightFormat], h: torch.Tensor
) -> torch.Tensor | None:
    """Return the best s [K], or None where it is 1."""
    weights, best, least = list(weights), None, np.inf
    for exponent in EXPONENTS:
        s_k = magnitude.clamp(min=SMALLEST * float(magnitude.max())).pow(float(exponent))
        s_k = s_k / (s_k.max() * s_k.min()).sqrt()
        error = 0.0
        for w, fmt in zip(weights, formats, strict=True):
            missed = torch.from_numpy(fmt.dequantize(fmt.quantize((w * s_k).numpy()))) / s_k - w
            error += float(((missed @ h) * missed).sum())
        if error < least:
            best, least = (s_k if exponent else None), error
    return best


def _take_back(
    family: Family, settings: Mapping[str, Any], fold: Fold, tensors: dict[str, np.ndarray],
    name: Callable[[str], str], s_k: torch.Tensor,
) -> None:  # fmt: skip
    """Divide what makes the input by s: the last len(s) rows of a linear, bias included, or the weight of a norm."""
    s = s_k.numpy()
    if fold.rows_of:
        for part, factor in (("weight", s[:, None]), ("bias", s)):
            key = f"{name(fold.rows_of[0])}.{part}"
            if key in tensors:
                tensors[key] = tensors[key].copy()
                tensors[key][-len(s) :] /= factor
        return
    from edgepeft.backbone.decoder import describe

    key, offset = f"{name(fold.norms[0])}.weight", np.float32(describe(settings).norm_offset)
    tensors[key] = ((tensors[key] + offset) / s - offset).astype(np.float32)
