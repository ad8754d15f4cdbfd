"""The grid of a format as torch sees it, for solvers that look at inputs: values, nearest codes, scales by search.

    Ŵ[n, k] = values[code[n, k]] * scale[n, b]        b = k // block

`search` finds a scale per block for a diagonal weighting of the columns:

    min over s of  sum_k h_k (w_k - s * values[nearest(w_k / s)])²

over a few scales at which the block's value of largest magnitude lands on, or clips to, an end of the grid. Integer
scales are signed, so either end may take it; NF4's are positive, as bitsandbytes has them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgepeft.quant.formats import WeightFormat

STRETCHES = {8: np.linspace(0.98, 1.1, 7), 4: np.linspace(0.86, 1.5, 17)}
TABLE_SHRINKS = np.linspace(0.9, 1.5, 17)


class Grid:
    """One format for one weight [N, K]: `values` [codes], block length and number of blocks."""

    def __init__(self, fmt: WeightFormat, k: int) -> None:
        self.fmt, self.k = fmt, k
        self.blocks, self.block = fmt.blocks(k), k // fmt.blocks(k)
        self.values = torch.from_numpy(fmt.values())
        self.integers = fmt.codec != "nf4_block"
        self.low = 1 if fmt.bits == 8 else 0  # -128 is no code of linears
        self.ends = (float(self.values[self.low]), float(self.values[-1])) if self.integers else (1.0,)
        self.middles = (self.values[:-1] + self.values[1:]) / 2
        self.stretches = STRETCHES[fmt.bits] if self.integers else TABLE_SHRINKS

    def nearest(self, units: torch.Tensor) -> torch.Tensor:
        """Return the codes (uint8) nearest to w / scale."""
        if self.integers:
            return units.round().add_(self.fmt.zero).clamp_(self.low, len(self.values) - 1).to(torch.uint8)
        return torch.bucketize(units, self.middles).to(torch.uint8)

    def points(self, codes: torch.Tensor) -> torch.Tensor:
        """Return values[code], float32."""
        return codes.float().sub_(self.fmt.zero) if self.integers else self.values[codes.int()]

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Return scales as they are stored, as float32."""
        return scale.to(getattr(torch, self.fmt.scale_dtype)).float()

    def per_column(self, scale_nb: torch.Tensor) -> torch.Tensor:
        """Return scales [N, K]."""
        return scale_nb.repeat_interleave(self.block, dim=1)

    def decode(self, codes: torch.Tensor, scale_nb: torch.Tensor) -> torch.Tensor:
        """Return Ŵ [N, K]."""
        return self.points(codes) * self.per_column(scale_nb)

    def round(self, w_nk: torch.Tensor, scale_nb: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes [N, K] for given scales."""
        return self.nearest(w_nk * inverse(self.per_column(scale_nb)))

    def search(self, w_nk: torch.Tensor, h_k: torch.Tensor) -> torch.Tensor:
        """Return the scales [N, B], as stored, that err least under the weighting h_k."""
        w, h = w_nk.view(-1, self.blocks, self.block), h_k.view(1, self.blocks, self.block)
        extreme = w.gather(2, w.abs().argmax(2, keepdim=True))
        extreme = extreme if self.integers else extreme.abs()
        best = torch.zeros_like(extreme)
        least = torch.full_like(extreme, torch.inf)
        for end in self.ends:
            for stretch in self.stretches:
                scale = self.stored(extreme / (end * float(stretch)))
                error = (w - self.points(self.nearest(w * inverse(scale))) * scale).square_().mul_(h).sum(2, True)
                better = error < least
                least, best = torch.where(better, error, least), torch.where(better, scale, best)
        return best[:, :, 0]


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """Return 1 / scale, and 0 where that is not finite."""
    return torch.nan_to_num(1 / scale, nan=0.0, posinf=0.0, neginf=0.0)


def packed(grid: Grid, codes: torch.Tensor, scale_nb: torch.Tensor, extra: Any = None) -> Any:
    """Return the packed weight of codes and scales."""
    return grid.fmt.pack(codes.numpy(), scale_nb.numpy().astype(grid.fmt.scale_dtype), extra)
