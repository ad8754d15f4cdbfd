"""The order of codes and scales in memory: tiles for linear layers, rows for embeddings.

A tile is 16 rows of W; it is cut along K into units of 32 columns, so that one 64-byte vector holds 16 rows x 4
columns, which is what a dot-product instruction of 8-bit integers consumes. For tile t, unit u and row n of the tile:

    4 bit  byte[(j*16 + n)*4 + i] = code[16t+n, 32u+4j+i] | code[16t+n, 32u+16+4j+i] << 4      j 0..3, i 0..3
    8 bit  byte[(j*16 + n)*4 + i] = code[16t+n, 32u+4j+i]                                      j 0..7, i 0..3

    w [T, K/32, 256 or 512] uint8        scale [T, B, 16]        T = ceil(N / 16)

Rows beyond N hold the code of zero and scale 0. Embedding rows are plain: two codes a byte, the first in the low
nibble.
"""

from __future__ import annotations

import numpy as np

from edgepeft.quant.formats import TILE_COLUMNS, TILE_ROWS


def _pad_rows(array: np.ndarray, fill: int) -> np.ndarray:
    """Fill up the first axis to a multiple of 16."""
    missing = -array.shape[0] % TILE_ROWS
    return np.pad(array, ((0, missing), (0, 0)), constant_values=fill) if missing else array


def pack(codes_nk: np.ndarray, bits: int, zero: int) -> np.ndarray:
    """Lay codes [N, K] uint8 out in tiles: uint8 [T, K/32, 64 * bits]."""
    k = codes_nk.shape[1]
    codes = _pad_rows(codes_nk, zero).reshape(-1, TILE_ROWS, k // TILE_COLUMNS, 32 // bits // 4, bits, 4)
    halves = codes.transpose(3, 0, 2, 4, 1, 5)  # h t u j n i: h is the nibble, j the group of four columns
    w = halves[0] if bits == 8 else halves[0] | halves[1] << 4
    return np.ascontiguousarray(w).reshape(w.shape[0], w.shape[1], -1)


def unpack(w: np.ndarray, bits: int) -> np.ndarray:
    """Return codes [16 T, K] uint8 of packed tiles."""
    tiles, units, _ = w.shape
    w = w.reshape(tiles, units, bits, TILE_ROWS, 4)
    out = np.empty((tiles, TILE_ROWS, units, 32 // bits // 4, bits, 4), np.uint8)
    for half in range(out.shape[3]):
        part = w if bits == 8 else (w >> 4 if half else w & 15)
        out[:, :, :, half] = part.transpose(0, 3, 1, 2, 4)
    return out.reshape(tiles * TILE_ROWS, units * TILE_COLUMNS)


def pack_scales(scale_nb: np.ndarray) -> np.ndarray:
    """Lay scales [N, B] out as [T, B, 16]."""
    blocks = scale_nb.shape[1]
    return np.ascontiguousarray(_pad_rows(scale_nb, 0).reshape(-1, TILE_ROWS, blocks).swapaxes(1, 2))


def unpack_scales(scale: np.ndarray) -> np.ndarray:
    """Return scales [16 T, B] of packed ones."""
    return scale.swapaxes(1, 2).reshape(-1, scale.shape[1])


def pack_rows(codes_nk: np.ndarray, bits: int) -> np.ndarray:
    """Lay codes [N, K] out in rows: uint8 [N, K * bits / 8]."""
    return codes_nk if bits == 8 else codes_nk[:, ::2] | codes_nk[:, 1::2] << 4


def unpack_rows(w: np.ndarray, bits: int) -> np.ndarray:
    """Return codes [N, K] uint8 of packed rows."""
    return w if bits == 8 else np.stack([w & 15, w >> 4], axis=-1).reshape(w.shape[0], -1)
