"""Dequantization and the int8 product by the host library, reached through ctypes: the kernels that ship.

`available` loads the library once; without one (no compiler at hand, another system) callers fall back to numpy or
torch, which give the same bits. The product has no such substitute. Calls leave Python's lock, so rows of W or x are
shared among threads; which thread computes a row does not change it.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from edgepeft import OP_ABI
from edgepeft.console import say
from edgepeft.errors import TargetError
from edgepeft.quant.formats import FORMATS, TILE_ROWS, Packed

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

ROWS_PER_THREAD = 64  # fewer are not worth unpacking the weights again
WEIGHTS_PER_THREAD = 1 << 18  # fewer are not worth waking a thread up


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the host library, or None where there is none that speaks this ABI."""
    from edgepeft.deploy.compile import host_library

    try:
        lib = ctypes.CDLL(str(host_library()))
    except (TargetError, OSError) as error:
        say(f"no host library, weights are dequantized by torch instead: {str(error).splitlines()[0]}")
        return None
    lib.edgepeft_dequantize.argtypes = [
        ctypes.c_char_p, ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_void_p,
    ]  # fmt: skip
    lib.edgepeft_dequantize.restype = ctypes.c_int
    lib.edgepeft_matmul.argtypes = [
        ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    lib.edgepeft_matmul.restype = ctypes.c_int
    return lib if lib.edgepeft_abi() == OP_ABI else None


def available() -> bool:
    """Tell whether the host library is at hand."""
    return library() is not None


def dequantize_into(
    tag: str, w: np.ndarray, scale: np.ndarray, n: int, k: int, out_nk: np.ndarray, threads: int = 1
) -> None:
    """Write the [N, K] weight of packed tiles into `out_nk`: float32, or as uint16 the bits of the nearest bfloat16.

    Raises RuntimeError for an unknown format.
    """
    lib = library()
    if lib is None:
        raise RuntimeError("there is no host library: ask available() first")
    if not (w.flags.c_contiguous and scale.flags.c_contiguous and out_nk.flags.c_contiguous):
        raise ValueError("the host library takes C-contiguous arrays")

    def part(tiles: slice) -> None:
        rows = out_nk[tiles.start * TILE_ROWS : tiles.stop * TILE_ROWS]
        packed = w[tiles].ctypes.data, scale[tiles].ctypes.data
        if lib.edgepeft_dequantize(tag.encode(), out_nk.itemsize == 2, *packed, len(rows), k, rows.ctypes.data) != 0:
            raise RuntimeError(f"the host library refused to dequantize format {tag!r} ({n} x {k})")

    _shared(part, len(w), threads, WEIGHTS_PER_THREAD // (TILE_ROWS * k))


def matmul_into(
    tag: str, w: np.ndarray, scale: np.ndarray, n: int, x_mk: np.ndarray, y_mn: np.ndarray, threads: int = 1
) -> None:
    """Write x Ŵᵀ on int8 activations into `y_mn`, float32, as the shipped op multiplies. Raises RuntimeError."""
    lib = library()
    if lib is None:
        raise RuntimeError("there is no host library: ask available() first")
    if not all(array.flags.c_contiguous for array in (w, scale, x_mk, y_mn)):
        raise ValueError("the host library takes C-contiguous arrays")

    def part(rows: slice) -> None:
        x, y, k = x_mk[rows], y_mn[rows], x_mk.shape[1]
        weight = tag.encode(), None, 1, w.ctypes.data, scale.ctypes.data, n, k
        if lib.edgepeft_matmul(*weight, x.ctypes.data, len(x), y.ctypes.data) != 0:
            raise RuntimeError(f"the host library refused to multiply format {tag!r} ({len(x)} x {n} x {k})")

    _shared(part, len(x_mk), threads, ROWS_PER_THREAD)


def _shared(part: Callable[[slice], None], count: int, threads: int, least: int) -> None:
    """Let threads do the parts of `count` things, `least` of them or more each."""
    share = max(-(-count // threads), least, 1)
    parts = [slice(start, min(start + share, count)) for start in range(0, count, share)]
    list((_pool(threads).map if len(parts) > 1 else map)(part, parts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def dequantize(packed: Packed) -> np.ndarray:
    """Return the float32 [N, K] weight of a packed one: by the library where it is at hand, else by numpy."""
    import numpy as np

    if not available():
        return FORMATS[packed.format].dequantize(packed)
    out = np.empty((packed.n, packed.k), np.float32)
    dequantize_into(packed.format, packed.w, packed.scale, packed.n, packed.k, out)
    return out
