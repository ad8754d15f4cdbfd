"""The table of solvers: how codes and scales are found for a float weight.

A solver takes a format and a float32 weight [N, K] and returns the packed weight; the format owns grid and layout.
`rtn` rounds to the nearest, with the best scale per block (`rounding`), or the codes bitsandbytes finds for NF4.

Left out so far: solvers that read calibration data (gptq, awq); they would be rows here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from edgepeft.quant.formats import Packed, WeightFormat


def rtn(fmt: WeightFormat, w_nk: np.ndarray, double_quant: bool = False, known_nb: np.ndarray | None = None) -> Packed:
    """Round to the nearest. Raises ModelError for a weight that does not fit the format."""
    return fmt.quantize(w_nk, double_quant, known_nb)


SOLVERS: dict[str, Callable[..., Packed]] = {"rtn": rtn}
