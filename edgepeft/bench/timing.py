"""Timing that can be trusted on a shared machine: interleaved, warmed up, medians, and it says when it was disturbed.

Candidates take turns within a round and rounds go on until the budget is spent, so that a neighbour who comes and goes
hits all of them alike. A round's order is drawn: what one leaves in the caches is met by each of the others as often.
Each run's wall time stands beside the CPU time of this process: where they part, the process waited for a core.
`others_cpus` is how many cores others kept busy meanwhile (Linux: /proc/stat less our own).
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

WARM_UP = 3
WARM_UP_S = 1.0
MIN_ROUNDS = 15
FEWEST_ROUNDS = 3
PATIENCE = 2  # times the budget, for MIN_ROUNDS
MAX_ROUNDS = 2000
QUIET_CPUS = 0.25
SHORTEST_S = 0.2


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate: median and 95th percentile of the wall, median of the process's CPU time."""

    p50_ms: float
    p95_ms: float
    cpu_ms: float
    rounds: int
    others_cpus: float | None


def busy_cpu_s() -> float | None:
    """Return the seconds that all cores together have spent working since the machine started."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def orders(names: Sequence[str]) -> Iterator[list[str]]:
    """Yield the order of each round, by one seed: nobody comes twice in a row, and each as often behind any other.

    With an order that only turns round, one would always find the caches as the same neighbour left them.
    """
    draw, last = random.Random(0), ""
    while True:
        order = list(names)
        draw.shuffle(order)
        if order[0] != last or len(order) == 1:
            last = order[-1]
            yield order


def interleave(candidates: Mapping[str, Callable[[], object]], budget_s: float = 1.0) -> dict[str, Timing]:
    """Run candidates in turns for about budget_s seconds and return their timings.

    MIN_ROUNDS are made even if they take twice as long; of candidates so slow that this is not enough, FEWEST_ROUNDS.
    """
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for call in candidates.values():
        _warm_up(call)
    before, own, started = busy_cpu_s(), time.process_time(), time.perf_counter()
    for turn, order in zip(range(MAX_ROUNDS), orders(list(candidates)), strict=False):
        if _enough(turn, time.perf_counter() - started, budget_s):
            break
        for name in order:
            cpu, wall = time.process_time(), time.perf_counter()
            candidates[name]()
            spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    others = _others(before, own, time.perf_counter() - started)
    return {name: _timing(rows, others) for name, rows in spent.items()}


def _warm_up(call: Callable[[], object]) -> None:
    """Call a few times, or once where that takes long."""
    started = time.perf_counter()
    for _ in range(WARM_UP):
        call()
        if time.perf_counter() - started > WARM_UP_S:
            break


def _enough(rounds: int, spent_s: float, budget_s: float) -> bool:
    """Tell whether the rounds made will do."""
    if rounds >= MIN_ROUNDS:
        return spent_s > budget_s
    return rounds >= FEWEST_ROUNDS and spent_s > PATIENCE * max(budget_s, WARM_UP_S)


def _others(busy_before: float | None, own_before: float, wall_s: float) -> float | None:
    """Return how many cores others kept busy; None over too short a time, as the kernel counts in ticks of 10 ms."""
    after = busy_cpu_s()
    if busy_before is None or after is None or wall_s < SHORTEST_S:
        return None
    return round(max(0.0, after - busy_before - (time.process_time() - own_before)) / wall_s, 2)


def _timing(rows: list[tuple[float, float]], others: float | None) -> Timing:
    wall, cpu = 1000 * np.array(rows).T
    p50, p95 = np.percentile(wall, [50, 95])
    return Timing(float(p50), float(p95), float(np.median(cpu)), len(rows), others)


def disturbed(timing: Timing) -> bool:
    """Tell whether others can have slowed a measurement, even on another core: it may be half of the same one."""
    return timing.others_cpus is not None and timing.others_cpus > QUIET_CPUS
