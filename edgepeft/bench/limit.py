"""What this machine can do at most at this moment, measured by loops of our own (kernels/limit/limit.cc).

    read_bandwidth   bytes a second of summing memory: what a step of decoding, which reads every weight once, waits for
    int8_peaks       products of 8-bit numbers with 4-bit ones, summed exactly, operations a second, by each set of
                     instructions that kernels are written for and this processor has: AVX2 and NEON (in 16 bits over
                     8 steps, then widened), AVX-512 VNNI, AMX, dotprod and i8mm; a product and a sum are two. Scales,
                     adapters and attention are not in it, nor that numbers must come from memory, so no prompt can be
                     read that fast.

Each is the best of RUNS, as others can only slow it down.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edgepeft.artifact import cache_dir
from edgepeft.deploy.compile import host_library, kernel_folder, plugin_library
from edgepeft.runtime.library import open_library

RUNS = 21
WORD_BYTES = 256
STEPS = 200_000


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the compiled loops."""
    made = plugin_library(kernel_folder() / "limit" / "limit.cc", cache_dir() / "bench" / "limit.so")
    library = ctypes.CDLL(str(made))
    library.ep_limit_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.ep_limit_operations.argtypes = [ctypes.c_char_p]
    library.ep_limit_int8.argtypes = [ctypes.c_char_p, ctypes.c_long]
    return library


def _best_s(threads: int, work: Callable[[int], object]) -> float:
    """Return the shortest seconds in which all threads have done their work, given their number."""
    spent = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(RUNS):
            started = time.perf_counter()
            list(pool.map(work, range(threads)))
            spent.append(time.perf_counter() - started)
    return min(spent)


def read_bandwidth(threads: int, size_bytes: int) -> float:
    """Return bytes a second of reading `size_bytes` of memory, each thread a part of its own."""
    part = max(1, size_bytes // threads // WORD_BYTES) * WORD_BYTES
    memory, read = np.ones(threads * part, np.uint8), _library().ep_limit_read
    start = memory.ctypes.data
    return memory.size / _best_s(threads, lambda number: read(start + number * part, part))


def int8_peaks(threads: int, steps: int = 0) -> dict[str, float]:
    """Return {instruction set: operations a second} of those that kernels run by on this processor, the best first."""
    library, steps, peaks = _library(), steps or STEPS, {}
    for name in dict.fromkeys(kernel.rpartition("_")[2] for kernel in open_library(host_library()).kernels):
        if operations := library.ep_limit_operations(name.encode()):
            seconds = _best_s(threads, functools.partial(_multiply, name.encode(), steps))
            peaks[name] = threads * steps * operations / seconds
    return peaks


def _multiply(name: bytes, steps: int, _: int) -> None:
    _library().ep_limit_int8(name, steps)
