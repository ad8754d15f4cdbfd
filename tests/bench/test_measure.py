from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepeft.bench import measure, memory
from edgepeft.bench.report import report_text
from edgepeft.errors import EdgePeftError
from tests.runtime.standin import write_bundle


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("sealed") / "bundle")


def test_a_bench_gives_every_figure_and_a_report(
    sealed: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PROCESSES", 1)
    monkeypatch.setattr(measure.bench, "__defaults__", ((1,), False, (4, 8, 4096), (1, 2), 0.0))
    result = measure.bench_cli(sealed, json_file=tmp_path / "bench.json")
    assert [(row["batch"], row["length"]) for row in result["latency"]] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert all(set(row["timings"]) == {"base", "default", "fed"} and row["p50_ms"] > 0 for row in result["latency"])
    assert 0 < result["swap"]["swap_us"] < 1000
    above = {row["process"]: row["above_bare_bytes"] for row in result["processes"]}
    assert above["bare"] == 0 < above["bundle"]
    printed = capsys.readouterr().out
    assert printed.strip() == report_text(result)
    assert "| bare " in printed
    assert json.loads((tmp_path / "bench.json").read_text())["latency"][0]["threads"] == 1


def test_a_process_that_fails_gives_its_words(tmp_path: Path) -> None:
    with pytest.raises(EdgePeftError, match="no such folder"):
        memory.measure("model", str(tmp_path / "nothing"))


def test_the_machine_is_described() -> None:
    host = measure.machine()
    assert host["cpu"]
    assert host["cores"] >= 1
