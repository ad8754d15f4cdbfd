"""The bench of quantization: what it measures on a tiny model, and the text its small decoder is trained on."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import pytest
from builders import conversations, tiny_decoder, write_rows

from edgepeft.bench import quantization, small_decoder

PROSE = (
    "Nothing in this paragraph is made up of anything but ordinary words in an ordinary order, which is why we may say "
)


def test_prose_is_taken_once_and_everything_else_left_out(tmp_path: Path) -> None:
    one, two = (
        PROSE + "it is long enough to be taken as a whole by the reader of it.",
        PROSE + "it is another one of them by far, and as long as any of the others here.",
    )
    (tmp_path / "a.txt").write_text(f"{one}\n\nshort\n\n{'x = f(1); ' * 40}\n\n{two}\n")
    (tmp_path / "b.1.gz").write_bytes(gzip.compress(f".PP\n{one.upper().lower()}\n.PP\n{two}".encode()))
    (tmp_path / "c.py").write_text(
        f'def f():\n    """{PROSE}a docstring is prose as well and must be found here too."""\n'
    )
    (tmp_path / "d.bin").write_bytes(b"\xff" * 500)
    found = small_decoder.read_texts([tmp_path])
    assert found == {
        str(tmp_path / "a.txt"): f"{one}\n\n{two}",
        str(tmp_path / "c.py"): f"{PROSE}a docstring is prose as well and must be found here too.",
    }


def test_figures_are_those_of_the_cases_and_known_ones_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_decoder(tmp_path / "model", intermediate_size=128)
    data = write_rows(tmp_path / "chats.jsonl", conversations(40))
    arguments = [
        "--model", str(model), "--data", str(data), "--task", "text-generation", "--formats", "i4b32", "--solvers",
        "rtn", "gptq", "--examples", "3", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"),
        "--set", "max_length=64",
    ]  # fmt: skip
    assert quantization.main(arguments) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    plain, solved = result["rows"]
    assert plain["share of rtn's"] == (1 if plain["lost"] > 0 else None)  # there is no share of a gain
    assert solved["lost"] == pytest.approx(solved["perplexity"] - result["reference"])
    assert plain["MB"] == pytest.approx(solved["MB"], rel=0.01)
    assert (plain["seed"], solved["seed"]) == (0, 0)
    assert (tmp_path / "r.png").stat().st_size > 1000
    capsys.readouterr()
    assert quantization.main(arguments) == 0
    assert "quantize: ..." not in capsys.readouterr().err
    assert quantization.main([*arguments, "--examples", "2"]) != 0
    assert "holds results of other settings" in capsys.readouterr().err


def test_seeds_are_averaged_and_the_worst_share_is_told() -> None:
    figures = [("rtn", 0, 12.0), ("gptq", 0, 10.5), ("gptq", 1, 11.0)]
    rows = [{"format": "i4b32", "solver": solver, "seed": seed, "perplexity": p} for solver, seed, p in figures]
    plain, solved = quantization.averaged(quantization.with_losses(rows, 10.0))
    assert (plain["seeds"], plain["share of rtn's"], plain["worst share"]) == (1, 1, 1)
    assert (solved["seeds"], solved["lost"], solved["share of rtn's"], solved["worst share"]) == (2, 0.75, 0.375, 0.5)


def test_only_solvers_that_draw_texts_are_measured_for_every_seed() -> None:
    options = argparse.Namespace(
        formats=["i4b32"], sizes=["1MB"], solvers=["rtn", "gptq"], seeds=[0, 1], task="text-generation"
    )
    found = [(case.get("format"), case["solver"], case["seed"]) for case in quantization.cases(options)]
    assert found[:3] == [("i4b32", "rtn", 0), ("i4b32", "gptq", 0), ("i4b32", "gptq", 1)]
    assert len(found) == 7
