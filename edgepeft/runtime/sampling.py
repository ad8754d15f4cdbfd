"""Choosing the next token from its logits: greedily, or by chance among those that filters leave.

    logits ─► repetition penalty ─► / temperature ─► top-k ─► top-p ─► min-p ─► softmax ─► one draw

The order and each rule are those of transformers; where two logits are equal at top-k's edge both stay. Temperature 0
is greedy: the greatest logit after the penalty, the lowest id among equals, and no other filter has a say. Chance is
numpy's PCG64, one draw a token, so that a seed gives the same answer again, alone or in a batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from edgepeft.errors import ConfigError, VerifyError

RANGES = {  # setting: lowest, highest, whether the lowest itself is allowed
    "temperature": (0, math.inf, True), "top_k": (0, math.inf, True), "top_p": (0, 1, False), "min_p": (0, 1, True),
    "repetition_penalty": (0, math.inf, False),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose. The defaults are greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 change nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, (low, high, closed) in RANGES.items():
            value = getattr(self, name)
            right = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
            if not right or (value == low and not closed) or (name == "top_k" and value != int(value)):
                whole = "a whole number" if name == "top_k" else "a number"
                above = f"of at least {low}" if closed else f"above {low}"
                below = "" if math.isinf(high) else f" and at most {high}"
                raise ConfigError(f"{name}: expected {whole} {above}{below}, found {value!r}.")


def penalized(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Return logits [vocabulary] with those of tokens in `seen` moved away from being chosen again."""
    if penalty == 1:
        return logits
    out = logits.astype(np.float64)
    out[seen] = np.where(out[seen] < 0, out[seen] * penalty, out[seen] / penalty)
    return out


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return probabilities of scores [candidates], in float64."""
    powers = np.exp(scores.astype(np.float64) - scores.max())
    return powers / powers.sum()


def _top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Return a mask of the k greatest scores and all that equal the least of them."""
    k = min(k, len(scores))
    return scores >= np.partition(scores, len(scores) - k)[len(scores) - k]


def _top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Return a mask of the fewest likeliest candidates whose probabilities reach p."""
    order = np.argsort(scores, kind="stable")
    kept = np.ones(len(scores), bool)
    kept[order[:-1]] = np.cumsum(softmax(scores)[order])[:-1] > 1 - p
    return kept


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, probabilities) of the tokens that the filters leave of logits [vocabulary], ids ascending."""
    ids = np.arange(len(logits))
    with np.errstate(over="ignore"):  # hardly any temperature: all but the greatest may fall to minus infinity
        scores = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    masks = (
        (sampling.top_k > 0, lambda: _top_k(scores, int(sampling.top_k))),
        (sampling.top_p < 1, lambda: _top_p(scores, sampling.top_p)),
        (sampling.min_p > 0, lambda: (found := softmax(scores)) >= sampling.min_p * found.max()),
    )
    for asked, mask in masks:
        if asked:
            kept = mask()
            ids, scores = ids[kept], scores[kept]
    return ids, softmax(scores)


class Sampler:
    """Chooses the tokens of one answer. `seen` begins as the prompt's tokens; a seed of None is a new one each time."""

    def __init__(self, sampling: Sampling, seen: Iterable[int], seed: int | None = None) -> None:
        self._sampling = sampling
        self._seen = set(seen)
        self._chance = np.random.Generator(np.random.PCG64(seed))

    def pick(self, logits: np.ndarray) -> int:
        """Return the next token for logits [vocabulary]. Raises VerifyError when they are not finite."""
        if not np.isfinite(logits).all():
            raise VerifyError("the model gave logits that are not finite (NaN or infinite); its answer cannot be used.")
        penalty = self._sampling.repetition_penalty
        token = self._choose(penalized(logits, np.fromiter(self._seen, np.int64), penalty))
        self._seen.add(token)
        return token

    def _choose(self, logits: np.ndarray) -> int:
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        ids, probabilities = candidates(logits, self._sampling)
        ends = np.cumsum(probabilities)
        place = np.searchsorted(ends, self._chance.random() * ends[-1], side="right")
        return int(ids[min(int(place), len(ids) - 1)])
