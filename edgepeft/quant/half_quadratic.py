"""Scales that outliers do not drag along: half-quadratic descent on a norm below 1, without calibration texts.

    min over s of  ‖ w - s q(w / s) ‖_p^p,  p = 0.7        split as       min  ‖e‖_p^p + β/2 ‖ e - (w - s q) ‖²

In turn: e = shrink(w - s q), what is taken for an outlier; s = <w - e, q> / <q, q>; β grows (HQQ,
https://mobiusml.github.io/hqq_blog/). HQQ moves the zero point by this; ours are fixed, so the scale moves. Residuals
are measured in units of the scale, so that β means the same for every block. Of all scales met, as stored, the one of
the least norm is taken, so the search never loses to rounding to the nearest in its own norm.

`nearest` is the same choice without a search: what known scales do not serve best is rounded as ever.
"""

from __future__ import annotations

import numpy as np
import torch

from edgepeft.errors import ModelError
from edgepeft.quant.formats import Packed, WeightFormat
from edgepeft.quant.grid import Grid, inverse, packed

NORM, BETA, GROWTH, STEPS = 0.7, 10.0, 1.1, 20


def hqq(fmt: WeightFormat, w_nk: np.ndarray, double_quant: bool, known_nb: np.ndarray | None) -> Packed:
    """Quantize a weight [N, K] by half-quadratic descent. Raises ModelError for one that does not fit the format."""
    start = fmt.quantize(w_nk)
    grid, w = Grid(fmt, start.k), torch.tensor(w_nk)
    scale = torch.from_numpy(fmt.unpack(start)[1].astype(np.float32))
    found, beta = [*_known(known_nb), scale], BETA
    for _ in range(STEPS):
        scale = _moved(grid, w, scale, beta)
        found.append(scale)
        beta *= GROWTH
    return _taken(grid, w, found, NORM, double_quant)


def nearest(fmt: WeightFormat, w_nk: np.ndarray, double_quant: bool, known_nb: np.ndarray | None) -> Packed:
    """Round a weight [N, K] to the nearest; blocks that known scales serve no worse keep them, NF4 too."""
    start = fmt.quantize(w_nk, double_quant, known_nb)
    if known_nb is None or double_quant:
        return start
    scale = torch.from_numpy(fmt.unpack(start)[1].astype(np.float32))
    grid, w = Grid(fmt, start.k), torch.tensor(w_nk)
    return _taken(grid, w, [*_known(known_nb), scale], 2.0, double_quant)


def _known(known_nb: np.ndarray | None) -> list[torch.Tensor]:
    return [] if known_nb is None else [torch.from_numpy(known_nb.astype(np.float32))]


def _moved(grid: Grid, w: torch.Tensor, scale: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the scales after one step."""
    s = grid.per_column(scale)
    q = grid.points(grid.round(w, scale))
    r = (w * inverse(s) - q).nan_to_num_()
    size = r.abs()
    e = r.sign() * (size - size.clamp(min=1e-8).pow(NORM - 1) / beta).clamp(min=0)
    w, q = ((w - e * s).view(len(w), grid.blocks, -1), q.view(len(w), grid.blocks, -1))
    new = grid.stored((w * q).sum(2) * inverse((q * q).sum(2)))
    return torch.where((new == 0) | ((new < 0) & torch.tensor(not grid.integers)), scale, new)


def _taken(grid: Grid, w: torch.Tensor, found: list[torch.Tensor], norm: float, double_quant: bool) -> Packed:
    """Return the weight packed with, per block, the first of the scales whose error has the least norm."""
    best, least = found[0], torch.full(found[0].shape, torch.inf)
    unit = inverse(w.view(len(w), grid.blocks, -1).abs().amax(2, True))
    for scale in found:
        missed = (w - grid.decode(grid.round(w, scale), scale)).view(len(w), grid.blocks, -1) * unit
        error = missed.abs().pow(norm).sum(2)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    extra = {}
    if double_quant:
        extra, decoded = grid.fmt._codec().double_quantize(best.numpy())
        best = torch.from_numpy(decoded)
    if not torch.isfinite(best).all():
        raise ModelError(f"format {grid.fmt.tag}: values are too large for its {grid.fmt.scale_dtype} scales.")
    return packed(grid, grid.round(w, best), best, extra)
