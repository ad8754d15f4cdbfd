"""The best scale of a block for round-to-nearest on a uniform grid.

For a block w and integers low..high the codes q and the scale s shall minimise  sum_k (w_k - s * q_k)^2.  For given
codes the best scale is  s = <w, q> / <q, q>;  for a given scale the best codes are the nearest ones. With e the value
of largest magnitude and u = w / e, each of a few starts `reach` rounds u * reach: e lands on that point of the grid,
at either end of it, so scales are signed. A start scores <u, q>^2 / <q, q>, what it takes off the squared error; the
best one is refined by alternating the two steps. Of the scales that can be stored next to it, and plain rounding's, the
one whose nearest codes err least is taken, so the search never loses to plain rounding. One linear of 1536 x 384 takes
about 50 ms; against plain rounding the error falls by 3 to 5 %.

Left out: weighting by activations, which is a solver's business, and zero points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CHUNK_VALUES = 1 << 16  # what stays in the second-level cache
REFINEMENTS = 2


def _nearest(values: np.ndarray, inverse: np.ndarray | np.float32, low: int, high: int) -> np.ndarray:
    """Return the nearest grid points, as float32, of values [R, block] for inverse scales [R, 1]."""
    q = values * inverse
    np.rint(q, out=q)
    return np.clip(q, low, high, out=q)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("rk,rk->r", a, b)[:, None]


def _inverse(x: np.ndarray) -> np.ndarray:
    """Return 1 / x, and 0 where that is not finite: an all-zero block gets the code of zero."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / x
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _best_start(u: np.ndarray, low: int, high: int, reaches: Sequence[float]) -> np.ndarray:
    """Return the best scale [R, 1] of u [R, block], |u| <= 1, over the starts."""
    best_score = np.full((len(u), 1), -1, np.float32)
    best = np.zeros_like(best_score)
    for reach in reaches:
        q = _nearest(u, np.float32(reach), low, high)
        cross = _dot(u, q)
        scale = cross * _inverse(_dot(q, q))
        score = cross * scale
        better = score > best_score
        best_score, best = np.where(better, score, best_score), np.where(better, scale, best)
    return best


def _fitted(u: np.ndarray, low: int, high: int, reaches: Sequence[float]) -> np.ndarray:
    """Return the best float32 scale [R, 1] of u [R, block], |u| <= 1."""
    scale = _best_start(u, low, high, reaches)
    for _ in range(REFINEMENTS):
        q = _nearest(u, _inverse(scale), low, high)
        scale = _dot(u, q) * _inverse(_dot(q, q))
    return scale


def _choices(w: np.ndarray, low: int, high: int, reaches: Sequence[float], dtype: str) -> list[np.ndarray]:
    """Return scales [R, 1] in the dtype they are stored in: the fit, its two neighbours, and plain rounding's."""
    extreme = np.take_along_axis(w, np.abs(w).argmax(axis=1)[:, None], axis=1)
    with np.errstate(over="ignore"):
        fit = (_fitted(w * _inverse(extreme), low, high, reaches) * extreme).astype(dtype)
        plain = (extreme / np.float32(low)).astype(dtype)
        return [fit, *(np.nextafter(fit, np.array(end, dtype)) for end in (-np.inf, np.inf)), plain]


def _best(w: np.ndarray, choices: Sequence[np.ndarray], low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (integers [R, block] float32, scale [R, 1]): per block, of the stored scales the one that errs least."""
    best_q, best = _nearest(w, np.zeros((len(w), 1), np.float32), low, high), choices[0]
    least = np.full((len(w), 1), np.inf, np.float32)
    unit = _inverse(np.abs(w).max(axis=1, keepdims=True))  # keeps squares of huge and tiny weights in range
    for scale in choices:
        q = _nearest(w, _inverse(scale.astype(np.float32)), low, high)
        with np.errstate(invalid="ignore"):
            difference = (w - q * scale.astype(np.float32)) * unit
        error = _dot(difference, difference)
        better = error < least
        least = np.where(better, error, least)
        best_q, best = np.where(better, q, best_q), np.where(better, scale, best)
    return best_q, best


def fit(
    w_rb: np.ndarray, low: int, high: int, reaches: Sequence[float], dtype: str, known_r: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (integers int8 [R, block], scales [R] of `dtype`) for rows of R blocks, a cache-sized piece at a time.

    known_r: scales [R] the blocks have already; one that errs no more than the fit is kept, so that weights which lie
    on their grid stay bit for bit what they are.
    """
    rows, block = w_rb.shape
    integers, scales = np.empty((rows, block), np.int8), np.empty(rows, dtype)
    step = max(1, CHUNK_VALUES // block)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        choices = _choices(w_rb[piece], low, high, reaches, dtype)
        known = [] if known_r is None else [known_r[piece, None]]
        q, scale = _best(w_rb[piece], known + choices, low, high)
        scale = np.where(np.isfinite(choices[0]), scale, choices[0])  # too large for dtype: told, not clipped
        integers[piece], scales[piece] = q, scale[:, 0]
    return integers, scales
