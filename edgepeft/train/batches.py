"""Which examples share a batch, and which share a row, so that little padding is computed.

Batches: per epoch the examples are shuffled by (seed, epoch) alone; each run of POOL batches is sorted by length and
cut into batches, and the batches are shuffled again. On short texts of uneven length this halves the tokens per epoch
against random batches. The order of epoch e needs no state: a resumed training meets the same batches. Of several
processes that train together each takes its turn; the first batches fill up the last round.

Rows: `pack` puts several examples into one row of at most so many tokens, once, in an order drawn from the seed. Their
positions begin anew, by which transformers knows that none of them may look at another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

POOL = 8
OPEN = 64  # rows in which room for an example is looked for


class LengthBatches:
    """A batch sampler over `lengths`; `epoch()` tells the epoch that begins. share: (which process, of how many)."""

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, epoch
        self.rank, self.world = share

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        chance = np.random.default_rng([self.seed, self.epoch()])
        order, size = chance.permutation(len(self.lengths)), self.batch_size
        batches = []
        for start in range(0, len(order), POOL * size):
            pool = order[start : start + POOL * size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [pool[i : i + size].tolist() for i in range(0, len(pool), size)]
        mixed = [batches[i] for i in chance.permutation(len(batches))]
        places = range(self.rank, len(self) * self.world, self.world)
        return iter([mixed[i % len(mixed)] for i in places])


def pack(examples: Sequence[Mapping[str, Any]], limit: int, seed: int) -> list[dict[str, list[int]]]:
    """Return the examples joined to rows of at most `limit` tokens, with position_ids: first fit, in a drawn order."""
    rows: list[dict[str, list[int]]] = []
    for i in np.random.default_rng([seed, len(examples)]).permutation(len(examples)):
        ids = examples[i]["input_ids"]
        row = next((row for row in rows[-OPEN:] if len(row["input_ids"]) + len(ids) <= limit), None)
        if row is None:
            row = {"input_ids": [], "labels": [], "position_ids": []}
            rows.append(row)
        row["input_ids"] += ids
        row["labels"] += examples[i]["labels"]
        row["position_ids"] += range(len(ids))
    return rows
