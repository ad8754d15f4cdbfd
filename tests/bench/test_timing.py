from __future__ import annotations

import collections
import itertools
import time

import pytest

from edgepeft.bench import timing
from edgepeft.bench.timing import FEWEST_ROUNDS, MIN_ROUNDS, WARM_UP, Timing, disturbed, interleave, orders


def test_candidates_take_turns_and_each_comes_once_a_round() -> None:
    order: list[str] = []
    found = interleave({name: lambda name=name: order.append(name) for name in "abc"}, budget_s=0)
    assert order[: 3 * WARM_UP] == [*"aaabbbccc"]
    assert all(sorted(order[at : at + 3]) == [*"abc"] for at in range(9, len(order), 3))
    assert {name: t.rounds for name, t in found.items()} == dict.fromkeys("abc", MIN_ROUNDS)


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcde"])
def test_each_comes_behind_any_other_as_often(names: str) -> None:
    rounds = 3000
    order = [name for turn in itertools.islice(orders(names), rounds) for name in turn]
    pairs = collections.Counter(itertools.pairwise(order))
    assert len(names) == 1 or not any(pairs[name, name] for name in names)
    for name, before in itertools.permutations(names, 2):
        assert pairs[before, name] == pytest.approx(rounds / (len(names) - 1), rel=0.1)


def test_slow_candidates_get_fewer_rounds_and_one_call_to_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP_S", 0.01)
    calls: list[int] = []
    found = interleave({"slow": lambda: (calls.append(1), time.sleep(0.02))}, budget_s=0)
    assert found["slow"].rounds == FEWEST_ROUNDS
    assert len(calls) == FEWEST_ROUNDS + 1


def test_waiting_shows_in_the_wall_and_not_in_the_cpu_time() -> None:
    def work() -> None:
        until = time.process_time() + 0.003
        while time.process_time() < until:
            pass

    found = interleave({"sleep": lambda: time.sleep(0.003), "work": work}, budget_s=0)
    assert found["sleep"].p50_ms >= 3
    assert found["sleep"].cpu_ms < 1.5
    assert found["work"].cpu_ms >= 2.9
    assert all(t.p95_ms >= t.p50_ms for t in found.values())


@pytest.mark.parametrize(("others", "expected"), [(0.0, False), (0.2, False), (0.9, True), (None, False)])
def test_a_neighbour_on_any_core_disturbs(others: float | None, expected: bool) -> None:
    assert disturbed(Timing(1, 1, 1, 9, others)) is expected
