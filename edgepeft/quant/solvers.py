"""The table of solvers: how codes and scales are found for a float weight. All end in the same formats.

| solver | looks at | finds |
|---|---|---|
| rtn | the weight | the nearest codes for the best scale per block (`rounding`), or those bitsandbytes finds for NF4 |
| hqq | the weight | scales that a few outliers do not drag along (`half_quadratic`) |
| gptq | inputs on calibration texts | codes and scales that keep the outputs (`gptq`) |
| awq | the same | columns scaled by what reaches them, exactly taken back by the part before (`awq`), then rtn |
| awq-gptq | the same | first the one, then the other |

`round` needs the weight alone; what goes on without calibration texts (embeddings that are no head, a merge) is done by
it. `solve` takes `Statistics` of the inputs too. A solver that leaves outputs to `round` has none.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from edgepeft.quant.formats import Packed, WeightFormat
    from edgepeft.quant.statistics import Statistics


@dataclasses.dataclass(frozen=True)
class Solver:
    """One row. rounder, solver: "module:function" below edgepeft.quant.  scales: whether columns are scaled first."""

    tag: str
    rounder: str = ""
    solver: str = ""
    scales: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether it looks at calibration texts."""
        return bool(self.solver) or self.scales

    def round(
        self, fmt: WeightFormat, w_nk: np.ndarray, double_quant: bool = False, known_nb: np.ndarray | None = None
    ) -> Packed:
        """Quantize a weight [N, K] by itself; blocks that their known scales [N, B] serve best keep them.

        Raises ModelError for a weight that does not fit the format.
        """
        if not self.rounder:
            return fmt.quantize(w_nk, double_quant, known_nb)
        return _function(self.rounder)(fmt, w_nk, double_quant, known_nb)

    def solve(self, fmt: WeightFormat, w_nk: np.ndarray, double_quant: bool, seen: Statistics) -> Packed:
        """Quantize a weight [N, K] for the inputs it sees. Raises ModelError as `round` does."""
        if not self.solver:
            return self.round(fmt, w_nk, double_quant)
        return _function(self.solver)(fmt, w_nk, double_quant, seen)


def _function(name: str) -> Callable[..., Packed]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(f"edgepeft.quant.{module}"), function)


NEAREST, DESCENT = "half_quadratic:nearest", "gptq:gptq"
SOLVERS: dict[str, Solver] = {
    row.tag: row
    for row in (
        Solver("rtn"),
        Solver("hqq", rounder="half_quadratic:hqq"),
        Solver("gptq", rounder=NEAREST, solver=DESCENT),
        Solver("awq", scales=True),
        Solver("awq-gptq", rounder=NEAREST, solver=DESCENT, scales=True),
    )
}
