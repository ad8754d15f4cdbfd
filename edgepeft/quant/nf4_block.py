"""NF4, the 4-bit type of QLoRA: W[n, k] = NF4[code] * absmax[n, b], blocks of 64 along K, float32 absmax.

NF4 holds 16 quantiles of a normal distribution scaled to -1..1 (https://arxiv.org/abs/2305.14314). Codes and absmax are
those of bitsandbytes' CPU code bit for bit: values are multiplied by 1 / absmax, and a value half way between two codes
takes the lower one. Since K is a multiple of 64, blocks of the flattened weight are blocks of rows.

Double quantization stores absmax in 8 bits: less its mean, in blocks of 256, as the nearest entry of a signed table
whose steps grow with magnitude ("dynamic" map, https://arxiv.org/abs/1511.04561):

    absmax[i] = table[code[i]] * scale[i // 256] + offset

Codes of the weight come from the exact absmax, values from the decoded one, as in bitsandbytes. Mean and table are
computed by torch there, whose last bits depend on its order of summation; so they are here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

VALUES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
MIDPOINTS = (VALUES[:-1] + VALUES[1:]) / np.float32(2)
SMALLEST = np.float32(1e-38)
ABSMAX_BLOCK = 256
GRID_STEPS = 1 << 16
CHUNK_ROWS = 1 << 12


def encode(
    w_nk: np.ndarray, block: int, dtype: str, known_nb: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes uint8 [N, K] and absmax float32 [N, B] of a float32 weight; known scales have no say."""
    n, k = w_nk.shape
    rows = w_nk.reshape(-1, block)
    absmax = np.abs(rows).max(axis=1)
    inverse = np.float32(1) / np.maximum(absmax, SMALLEST)
    codes = np.empty(rows.shape, np.uint8)
    for start in range(0, len(rows), CHUNK_ROWS):
        piece = slice(start, start + CHUNK_ROWS)
        codes[piece] = _nearest(np.clip(rows[piece] * inverse[piece, None], -1, 1))
    return codes.reshape(n, k), absmax.reshape(n, k // block)


def _nearest(u: np.ndarray) -> np.ndarray:
    """Return how many midpoints lie below each value: the index of the nearest entry, the lower one on a tie."""
    codes = np.zeros(u.shape, np.uint8)
    for midpoint in MIDPOINTS:
        codes += u > midpoint
    return codes


def dynamic_map() -> np.ndarray:
    """Return the table of double quantization, float32 [256], ascending: seven decades, finer towards large ones."""
    import torch

    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32).numpy()
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.append(means * np.float32(10.0 ** (decade - 6)))
    values = np.concatenate(positive)
    return np.sort(np.concatenate([values, -values, np.array([0, 1], np.float32)]))


def double_quantize(absmax_nb: np.ndarray) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """Return (the stored tensors, absmax float32 [N, B] as they decode)."""
    flat = np.ascontiguousarray(absmax_nb, np.float32).reshape(-1)
    offset = _mean(flat)
    rest = flat - offset
    table = dynamic_map()
    padded = np.pad(rest, (0, -len(rest) % ABSMAX_BLOCK)).reshape(-1, ABSMAX_BLOCK)
    scale = np.abs(padded).max(axis=1)
    with np.errstate(over="ignore"):
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.where(scale[:, None] > 0, _nearest_entry(padded * inverse[:, None], table), 0).astype(np.uint8)
    codes = codes.reshape(-1)[: len(rest)]
    stored = {"absmax_codes": codes, "absmax_code": table, "absmax_scale": scale, "absmax_offset": offset.reshape(1)}
    return stored, decode_absmax(stored).reshape(absmax_nb.shape)


def _nearest_entry(u: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the index of the entry nearest to u, looked up on 65536 steps over -1..1 as bitsandbytes does."""
    one, half, last = np.float32(1), np.float32(0.5), GRID_STEPS - 1
    grid = np.arange(GRID_STEPS, dtype=np.float32) * np.float32(2) / np.float32(last) - one
    entry_of_step = np.searchsorted((table[:-1] + table[1:]) * half, grid, side="left")
    fraction = (np.clip(u, -1, 1) + one) * half
    step = (fraction.astype(np.float64) * last + 0.5).astype(np.float32)  # exact product: a fused multiply-add
    return entry_of_step[step.astype(np.int64)]


def _mean(flat: np.ndarray) -> np.float32:
    """Return the mean as torch sums it."""
    import torch

    return np.float32(torch.from_numpy(flat).mean().item())


def decode_absmax(stored: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the float32 absmax, flat, that double-quantized tensors stand for."""
    codes = stored["absmax_codes"]
    scale = np.repeat(stored["absmax_scale"], ABSMAX_BLOCK)[: len(codes)]
    return stored["absmax_code"][codes] * scale + stored["absmax_offset"][0]
