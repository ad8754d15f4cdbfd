from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepeft.bench import generation, measure
from edgepeft.bench.report import report_text
from edgepeft.errors import ConfigError
from edgepeft.runtime import load
from tests.runtime.writer import CONTEXT, write_bundle


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("writer") / "bundle")


def test_a_bench_of_a_writer_gives_every_figure_and_a_report(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PROCESSES", 1)
    monkeypatch.setattr(measure.bench, "__defaults__", ((1,), False, (), (), 0.0))
    result = measure.bench_cli(writer, json_file=tmp_path / "bench.json")
    (row,) = result["speed"]
    for name in ("base", "default", "fed"):
        assert row[f"prefill_{name}_tok_s"] > 0
        assert row[f"decode_{name}_tok_s"] > 0
    assert {"prefill_default_pct", "prefill_fed_pct", "decode_default_pct", "decode_fed_pct"} <= set(row)
    assert {entry["process"] for entry in result["processes"]} == {"bare", "tokenizer", "bundle"}
    assert capsys.readouterr().out.strip() == report_text(result)
    assert json.loads((tmp_path / "bench.json").read_text())["speed"][0]["threads"] == 1


def test_decoding_stays_within_the_context_and_starts_again(writer: Path) -> None:
    model = load(writer, threads=1)
    read, prompt, written = generation.lengths(model.context)
    assert read == CONTEXT
    assert prompt + written <= CONTEXT
    assert written % generation.STEPS == 0
    step = generation.decode(model, "default", prompt, written)
    for _ in range(2 * written // generation.STEPS + 1):
        step()


def test_a_writer_has_no_float32_peer(writer: Path) -> None:
    with pytest.raises(ConfigError, match="classifiers alone"):
        measure.bench_cli(writer, baseline=True)
