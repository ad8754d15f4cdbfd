"""Which examples share a batch: shuffled, then neighbours in length, so that little padding is computed.

Per epoch the examples are shuffled by (seed, epoch) alone; each run of POOL batches is sorted by length and cut into
batches, and the batches are shuffled again. On short texts of uneven length this halves the tokens per epoch against
random batches. The order of epoch e needs no state: a resumed training meets the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

POOL = 8


class LengthBatches:
    """A batch sampler over `lengths`; `epoch()` tells the epoch that begins."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        chance = np.random.default_rng([self.seed, self.epoch()])
        order, size = chance.permutation(len(self.lengths)), self.batch_size
        batches = []
        for start in range(0, len(order), POOL * size):
            pool = order[start : start + POOL * size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [pool[i : i + size].tolist() for i in range(0, len(pool), size)]
        return iter([batches[i] for i in chance.permutation(len(batches))])
