"""What a linear's inputs on calibration texts say, in two matrices of K x K however many texts there are.

H = X̂ X̂ᵀ / tokens      X̂: inputs behind quantized predecessors        C = X X̂ᵀ / tokens      X: those of the float model

output error = ‖(W - Ŵ) X̂‖ / ‖W X̂‖ = sqrt( tr(D H Dᵀ) / tr(W H Wᵀ) )        D = W - Ŵ
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch


class Statistics:
    """Sums over tokens: `add` inputs [T, K] of both streams, then read `hessian`, `magnitude` and `target`."""

    def __init__(self, k: int) -> None:
        self._hh, self._ch, self._abs, self.tokens = torch.zeros(k, k), torch.zeros(k, k), torch.zeros(k), 0

    def add(self, quantized_tk: torch.Tensor, float_tk: torch.Tensor) -> None:
        """Take in the same tokens' inputs in both streams."""
        self._hh.addmm_(quantized_tk.T, quantized_tk)
        self._ch.addmm_(float_tk.T, quantized_tk)
        self._abs += quantized_tk.abs().sum(0)
        self.tokens += len(quantized_tk)

    @property
    def hessian(self) -> torch.Tensor:
        """H, float32 [K, K]."""
        return self._hh / max(self.tokens, 1)

    @property
    def magnitude(self) -> torch.Tensor:
        """Mean of |x| of each column, [K]."""
        return self._abs / max(self.tokens, 1)

    def level(self, share: float) -> Statistics:
        """Return H with a share of its mean diagonal added, and both streams alike: every column has its say."""
        self._hh.diagonal().add_(share * self._hh.diagonal().mean())
        self._ch = self._hh
        return self

    def target(self, w_nk: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Return T, the weight that does to X̂ what W does to X, drawn to W by what `h` exceeds H."""
        damp = h.diagonal() - self.hessian.diagonal()
        right = w_nk @ (self._ch / max(self.tokens, 1)) + w_nk * damp
        lower = torch.linalg.cholesky(h.double())
        return torch.cholesky_solve(right.double().T, lower).T.float().contiguous()

    def output_error(self, w_nk: np.ndarray, decoded_nk: np.ndarray) -> float:
        """Return ‖(W - Ŵ) X̂‖ / ‖W X̂‖."""
        both = (torch.from_numpy(m) for m in (w_nk - decoded_nk, w_nk))
        missed, whole = (float(((m @ self._hh) * m).sum()) for m in both)
        return (max(missed, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def collect(quantized: Iterable[torch.Tensor], plain: Iterable[torch.Tensor]) -> Statistics:
    """Return what the inputs of both streams, [T, K] a batch, say."""
    seen: Statistics | None = None
    for one, other in zip(quantized, plain, strict=True):
        seen = seen or Statistics(one.shape[1])
        seen.add(one, other)
    assert seen is not None
    return seen
