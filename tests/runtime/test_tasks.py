from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from edgepeft.errors import DataError, VerifyError
from edgepeft.runtime.tasks import predictions, run_cli, softmax


def test_softmax_holds_at_the_ends_of_float32() -> None:
    found = softmax(np.array([[1e4, -1e4, 0], [0, 0, 0]], np.float32))
    np.testing.assert_allclose(found, [[1, 0, 0], [1 / 3] * 3], atol=1e-7)


def test_predictions_are_sorted_and_cut() -> None:
    found = predictions(np.array([[0.0, 2.0, 1.0]], np.float32), ["a", "b", "c"], top_k=2)[0]
    assert list(found.scores) == ["b", "c"]
    assert found.label == "b"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(VerifyError, match="not finite"):
        predictions(np.array([[0.0, bad]], np.float32), ["a", "b"])


def test_logits_without_labels_are_refused() -> None:
    with pytest.raises(VerifyError, match=r"logits \[1, 3\] for 2 labels"):
        predictions(np.zeros((1, 3), np.float32), ["a", "b"])


def test_run_writes_tab_separated_lines(sealed: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_cli(sealed, ["play", "turn on"], top_k=2) == 2
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows] == ["play", "play", "turn on", "turn on"]
    assert all(0 <= float(row[1]) <= 1 for row in rows)


def test_run_reads_a_file_and_says_what_it_skipped(sealed: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "texts").write_text("play\n\nturn on\r\n", encoding="utf-8-sig")
    assert run_cli(sealed, file=tmp_path / "texts", as_json=True, adapter="none") == 2
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["text"] for a in answers] == ["play", "turn on"]
    assert all(len(a["scores"]) == 3 and a["label"] in a["scores"] for a in answers)
    assert "skipped 1 blank lines" in err


@pytest.mark.parametrize("given", [{"texts": ["-"]}, {"file": "-"}])
def test_run_reads_standard_input(
    sealed: Path, given: dict, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("play\nturn on\n"))
    assert run_cli(sealed, **given) == 2
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no text given"),
        ({"file": "nowhere"}, "nowhere: cannot be read: No such file"),
        ({"texts": ["play"], "top_k": 0}, "at least 1"),
        ({"texts": [" "]}, "empty"),
        ({"texts": ["play \udcff jazz"]}, "not valid Unicode"),
        ({"texts": ["play"], "file": "-"}, "one place"),
        ({"texts": ["-", "play"]}, "one place"),
    ],
)
def test_run_refuses(sealed: Path, given: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run_cli(sealed, **given)
