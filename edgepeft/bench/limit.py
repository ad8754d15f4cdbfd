"""What this machine can do at most at this moment, measured by loops of our own (kernels/limit/limit.cc).

    read_bandwidth   bytes a second of summing memory: what a step of decoding, which reads every weight once, waits for
    int8_peak        products of 8-bit numbers with 4-bit ones, summed exactly, operations a second, on the best
                     instruction set of this processor: AVX2 and NEON (in 16 bits over 8 steps, then widened),
                     AVX-512 VNNI or dotprod; a product and a sum are two. Scales, adapters and attention are not in
                     it, so no prompt can be read that fast.

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
from edgepeft.deploy.compile import kernel_folder, plugin_library

RUNS = 21
WORD_BYTES = 256
STEPS = 500_000


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the compiled loops."""
    made = plugin_library(kernel_folder() / "limit" / "limit.cc", cache_dir() / "bench" / "limit.so")
    library = ctypes.CDLL(str(made))
    library.ep_limit_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.ep_limit_int8.argtypes = [ctypes.c_long]
    library.ep_limit_name.restype = ctypes.c_char_p
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


def int8_peak(threads: int, steps: int = 0) -> tuple[str, float]:
    """Return the instruction set and operations a second; ("", 0.0) on a processor that has none of them."""
    library, steps = _library(), steps or STEPS
    seconds = _best_s(threads, lambda _: library.ep_limit_int8(steps))
    return library.ep_limit_name().decode(), threads * steps * library.ep_limit_operations() / seconds
