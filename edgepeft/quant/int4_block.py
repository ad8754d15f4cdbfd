"""4-bit integers in blocks along K: W[n, k] = (code - 8) * scale[n, b], code 0..15, float16 scales.

Integers reach from -8 to 7; scales are signed, so the longer end can serve a block's extreme value of either sign.
Scales are found by `rounding`. The bytes are those of `MatMulNBits` but for their order; as embedding rows they are
those of `GatherBlockQuantized`.
"""

from __future__ import annotations

import numpy as np

from edgepeft.quant import rounding

LOW, HIGH, ZERO = -8, 7, 8
REACHES = [end * stretch for end in (LOW, HIGH) for stretch in np.linspace(0.9, 1.35, 10)]


def encode(
    w_nk: np.ndarray, block: int, dtype: str, known_nb: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes uint8 [N, K] and scales `dtype` [N, B] of a float32 weight."""
    n, k = w_nk.shape
    known_r = None if known_nb is None else known_nb.reshape(-1)
    integers, scales = rounding.fit(w_nk.reshape(-1, block), LOW, HIGH, REACHES, dtype, known_r)
    return (integers + np.int8(ZERO)).view(np.uint8).reshape(n, k), scales.reshape(n, k // block)
