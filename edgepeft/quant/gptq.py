"""GPTQ with fixed blocks, then descent: codes and scales that keep a linear's outputs, not its weights.

Let X̂ be the inputs that reach the linear behind quantized predecessors and X those of the float model. Wanted is

    min over codes and scales of  ‖ W X - Ŵ X̂ ‖²  =  tr( (T - Ŵ) H (T - Ŵ)ᵀ ) + const
    H = X̂ X̂ᵀ / tokens        T = (W X X̂ᵀ + λ W) (H + λ)⁻¹        λ = DAMP * mean diag H

so the target T also makes up for what earlier layers lost. Three steps, none of which moves a block:

1. scales by search (`grid`), weighted by diag H;
2. GPTQ (https://arxiv.org/abs/2210.17323): columns from the heaviest diag H on, each rounded, its error spread over the
   columns not yet rounded through the Cholesky factor of H⁻¹. Our blocks lie along K in fixed order and their scales
   are known beforehand, so columns may be taken in any order without permuting a group;
3. SWEEPS rounds of descent on the same objective: the best scale of each block for its codes, then the best code of
   each column for all others. Neither step can raise the objective but for the rounding of scales.

H and its factors are float32 [K, K]; with N rows a step costs N·K² multiplications. A column that no calibration input
touched has nothing to say: it is damped like the rest and rounds to the nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgepeft.errors import ModelError
from edgepeft.quant.grid import Grid, inverse, packed

if TYPE_CHECKING:
    from edgepeft.quant.formats import Packed, WeightFormat
    from edgepeft.quant.statistics import Statistics

DAMP = 0.01
COLUMNS = 128
SWEEPS = 4


def gptq(fmt: WeightFormat, w_nk: np.ndarray, double_quant: bool, seen: Statistics) -> Packed:
    """Return the packed weight that keeps W X best. Raises ModelError for scales beyond the format's range."""
    w, grid = torch.tensor(w_nk), Grid(fmt, w_nk.shape[1])
    h = damped(seen.hessian)
    target = seen.target(w, h)
    scale = grid.search(target, h.diagonal())
    extra = {}
    if double_quant:
        extra, decoded = fmt._codec().double_quantize(scale.numpy())
        scale = torch.from_numpy(np.ascontiguousarray(decoded))
    codes = _spread(grid, target, scale, h)
    for _ in range(SWEEPS):
        scale = scale if double_quant else _best_scales(grid, target, codes, scale, h)
        codes = _best_codes(grid, target, codes, scale, h)
    if not torch.isfinite(scale).all():
        largest = abs(w_nk).max()
        raise ModelError(f"format {fmt.tag}: values up to {largest:g} are too large for its {fmt.scale_dtype} scales.")
    return packed(grid, codes, scale, extra)


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """Return H + λ, positive definite."""
    h = hessian.clone()
    level = float(h.diagonal().mean()) or 1.0
    h.diagonal().add_(DAMP * level)
    return h


def _spread(grid: Grid, target: torch.Tensor, scale: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Round column after column, spreading errors over the rest; return codes uint8 [N, K]."""
    order = torch.argsort(h.diagonal(), descending=True)
    factor = _factor(h[order][:, order])
    w, s = target[:, order].clone(), grid.per_column(scale)[:, order]
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for start in range(0, grid.k, COLUMNS):
        stop = min(start + COLUMNS, grid.k)
        errors = torch.empty(len(w), stop - start)
        for j in range(start, stop):
            code = grid.nearest(w[:, j] * inverse(s[:, j]))
            codes[:, j] = code
            error = (w[:, j] - grid.points(code) * s[:, j]) / factor[j, j]
            w[:, j:stop] -= error[:, None] * factor[j, j:stop]
            errors[:, j - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    back = torch.empty_like(codes)
    back[:, order] = codes
    return back


def _factor(h: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of H⁻¹, by double precision."""
    lower = torch.linalg.cholesky(h.double())
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def _best_scales(
    grid: Grid, target: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, h: torch.Tensor
) -> torch.Tensor:
    """Return the scales [N, B] that serve the codes best, block after block."""
    points, scale = grid.points(codes), scale.clone()
    pull = (target - points * grid.per_column(scale)) @ h
    for b in range(grid.blocks):
        part = slice(b * grid.block, (b + 1) * grid.block)
        v = points[:, part]
        step = (v * pull[:, part]).sum(1) * inverse(((v @ h[part, part]) * v).sum(1))
        new = grid.stored(scale[:, b] + step)
        new = torch.where((new == 0) | ((new < 0) & torch.tensor(not grid.integers)), scale[:, b], new)
        pull -= ((new - scale[:, b])[:, None] * v) @ h[part]
        scale[:, b] = new
    return scale


def _best_codes(
    grid: Grid, target: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, h: torch.Tensor
) -> torch.Tensor:
    """Return codes of which each column is the best one for all the others, as they were when it was its turn."""
    codes, s = codes.clone(), grid.per_column(scale)
    w = grid.points(codes) * s
    pull = (target - w) @ h
    for start in range(0, grid.k, COLUMNS):
        stop = min(start + COLUMNS, grid.k)
        near, moved = pull[:, start:stop].clone(), torch.empty(len(w), stop - start)
        for j in range(start, stop):
            code = grid.nearest((w[:, j] + near[:, j - start] / h[j, j]) * inverse(s[:, j]))
            move = grid.points(code) * s[:, j] - w[:, j]
            near -= move[:, None] * h[j, start:stop]
            codes[:, j], moved[:, j - start] = code, move
        pull -= moved @ h[start:stop]
    return codes
