"""8-bit integers: W[n, k] = (code - 128) * scale, code - 128 in -127..127, so that a kernel may negate any of them.

One float32 scale per row for linear layers; float16 ones per block of 32 for embedding rows. Scales are found by
`rounding`; letting the extreme value clip a little takes about 0.5 % off the error of plain absmax.
"""

from __future__ import annotations

import numpy as np

from edgepeft.quant import rounding

LIMIT, ZERO = 127, 128
REACHES = [LIMIT * stretch for stretch in np.linspace(0.98, 1.1, 7)]


def encode(
    w_nk: np.ndarray, block: int, dtype: str, known_nb: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes uint8 [N, K] and scales `dtype` [N, B] of a float32 weight."""
    n, k = w_nk.shape
    known_r = None if known_nb is None else known_nb.reshape(-1)
    integers, scales = rounding.fit(w_nk.reshape(-1, block), -LIMIT, LIMIT, REACHES, dtype, known_r)
    return (integers.astype(np.int16) + ZERO).astype(np.uint8).reshape(n, k), scales.reshape(n, k // block)
