from __future__ import annotations

import time

import pytest

from edgepeft.bench import timing
from edgepeft.bench.timing import FEWEST_ROUNDS, MIN_ROUNDS, WARM_UP, Timing, disturbed, interleave


def test_candidates_take_turns_and_each_goes_first_as_often() -> None:
    order: list[str] = []
    found = interleave({name: lambda name=name: order.append(name) for name in "abc"}, budget_s=0)
    assert order[: 3 * WARM_UP] == [*"aaabbbccc"]
    rounds = ["".join(order[at : at + 3]) for at in range(9, len(order), 3)]
    assert rounds[:3] == ["abc", "bca", "cab"]
    assert {name: t.rounds for name, t in found.items()} == dict.fromkeys("abc", MIN_ROUNDS)


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
