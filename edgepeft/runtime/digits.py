"""A float adapter in 4-bit digits, as the quantized products of a GPU read it: y = W x + B (A x) in two shaders.

    A = A0 + A1 + A2        each 4 bits and a float32 scale for 32 columns, the next of what the last left over
    B = B0 + B1 + B2        alike, of its ranks

    (A x) in column (i, j) = Ai x        B (A x) = sum of Bj (Ai x) over i + j < DIGITS

Each digit leaves 1/15 of what there was, so three leave 1/3375 of a block's largest value: B (A x) errs by about 0.001
of itself, a tenth of what int8 activations change. They take 3.75 bytes a value, float32 4. Columns of one Bj lie
together, filled with zeros to whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DIGITS = 3
BLOCK = 32
ZERO = 8  # the code of 0; codes are 0 to 15
REACH = 7.5  # a block's largest value in units of its scale
PAIRS = [[(i, j) for i in range(DIGITS - j)] for j in range(DIGITS)]  # of A's and B's digits, those of one Bj together


def filled(count: int) -> int:
    """Return a count filled to whole blocks."""
    return -(-count // BLOCK) * BLOCK


def columns(ranks: int) -> int:
    """Return how many columns stand for some ranks, all digits together."""
    return sum(filled(len(pairs) * ranks) for pairs in PAIRS)


def digits(values: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (codes uint8 [N, K], scales float32 [N, K / BLOCK]) of each digit of float [N, K], K in whole blocks."""
    left = values.astype(np.float64).reshape(len(values), -1, BLOCK)
    found = []
    for _ in range(DIGITS):
        top = np.abs(left).max(axis=2)
        scale = np.where(top > 0, top / REACH, 1).astype(np.float32)
        code = np.clip(np.rint(left / scale[:, :, None]), -ZERO, ZERO - 1)
        left = left - code * scale[:, :, None]
        found.append(((code + ZERO).astype(np.uint8).reshape(values.shape), scale))
    return found


def down(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes uint8 [columns, K / BLOCK, BLOCK / 2], scales [columns, K / BLOCK]) of A [ranks, K]."""
    own = digits(a)
    codes = [_fill([own[i][0] for i, _ in pairs], ZERO) for pairs in PAIRS]
    scales = [_fill([own[i][1] for i, _ in pairs], 1) for pairs in PAIRS]
    return _nibbles(np.concatenate(codes)), np.concatenate(scales)


def up(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes uint8 [N, columns / BLOCK, BLOCK / 2], scales [N, columns / BLOCK]) of B [N, ranks].

    What is left is another for each digit of A, as blocks hold columns of several.
    """
    n, ranks = b.shape
    left, codes, scales = np.stack([b.astype(np.float64)] * DIGITS, 1), [], []  # left [N, A's digits, ranks]
    for pairs in PAIRS:
        own = len(pairs) * ranks
        wide = np.pad(left[:, : len(pairs)].reshape(n, own), ((0, 0), (0, filled(own) - own)))
        code, scale = digits(wide)[0]
        codes.append(code)
        scales.append(scale)
        value = (code.astype(np.float64) - ZERO) * np.repeat(scale, BLOCK, axis=1)
        left[:, : len(pairs)] -= value[:, :own].reshape(n, len(pairs), ranks)
    return _nibbles(np.concatenate(codes, 1)), np.concatenate(scales, 1)


def _fill(parts: Sequence[np.ndarray], value: int) -> np.ndarray:
    """Return parts below each other, filled to whole blocks of rows."""
    stacked = np.concatenate(parts)
    return np.pad(stacked, ((0, filled(len(stacked)) - len(stacked)), (0, 0)), constant_values=value)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Return codes [N, K] as MatMulNBits reads them: two to a byte, the first one low, a block for itself."""
    pairs = codes.reshape(len(codes), -1, BLOCK // 2, 2)
    return pairs[..., 0] | pairs[..., 1] << 4
