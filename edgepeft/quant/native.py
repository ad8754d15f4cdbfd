"""Dequantization by the host library, reached through ctypes: the same code that the kernels are tested against.

`available` loads the library once; without one (no compiler at hand, another system) callers fall back to numpy or
torch, which give the same bits.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

from edgepeft import OP_ABI
from edgepeft.console import say
from edgepeft.errors import TargetError
from edgepeft.quant.formats import FORMATS, Packed

if TYPE_CHECKING:
    import numpy as np


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the host library, or None where there is none that speaks this ABI."""
    from edgepeft.deploy.compile import host_library

    try:
        lib = ctypes.CDLL(str(host_library()))
    except (TargetError, OSError) as error:
        say(f"no host library, weights are dequantized by torch instead: {str(error).splitlines()[0]}")
        return None
    lib.edgepeft_dequantize.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_void_p]
    lib.edgepeft_dequantize.restype = ctypes.c_int
    return lib if lib.edgepeft_abi() == OP_ABI else None


def available() -> bool:
    """Tell whether the host library is at hand."""
    return library() is not None


def dequantize_into(tag: str, w: np.ndarray, scale: np.ndarray, n: int, k: int, out_nk: np.ndarray) -> None:
    """Write the float32 [N, K] weight of packed tiles into `out_nk`. Raises RuntimeError for an unknown format."""
    lib = library()
    if lib is None:
        raise RuntimeError("there is no host library: ask available() first")
    if not (w.flags.c_contiguous and scale.flags.c_contiguous and out_nk.flags.c_contiguous):
        raise ValueError("the host library takes C-contiguous arrays")
    if lib.edgepeft_dequantize(tag.encode(), w.ctypes.data, scale.ctypes.data, n, k, out_nk.ctypes.data) != 0:
        raise RuntimeError(f"the host library refused to dequantize format {tag!r} ({n} x {k})")


def dequantize(packed: Packed) -> np.ndarray:
    """Return the float32 [N, K] weight of a packed one: by the library where it is at hand, else by numpy."""
    import numpy as np

    if not available():
        return FORMATS[packed.format].dequantize(packed)
    out = np.empty((packed.n, packed.k), np.float32)
    dequantize_into(packed.format, packed.w, packed.scale, packed.n, packed.k, out)
    return out
