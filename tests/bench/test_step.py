"""The bench of one training step: every candidate trains the same, and rows compare with bitsandbytes."""

import pytest
from builders import tiny_decoder

from edgepeft.bench import step
from edgepeft.config import Config

MIB = 1 << 20


def answers(seconds: float, mib: int) -> list[dict]:
    return [{"seconds": turn * seconds, "cpu_s": seconds, "memory_bytes": mib * MIB} for turn in (1, 2, 3)]


def test_rows_compare_with_bitsandbytes_where_it_took_part():
    first = {"edgepeft": 5.0, "bitsandbytes": 5.0}
    rows = step.summary({"edgepeft": answers(2.0, 100), "bitsandbytes": answers(3.0, 400)}, first, 1)
    assert [row["times as fast"] for row in rows] == [1.5, 1.0]
    assert [row["s/step"] for row in rows] == [4.0, 6.0]
    assert rows[0]["of its memory"] == 0.25
    assert "times as fast" not in step.summary({"edgepeft": answers(2.0, 100)}, first, 1)[0]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Config:
    """A tiny decoder in NF4, its embeddings float as bitsandbytes leaves them."""
    place = tmp_path_factory.mktemp("steps")
    config = Config(
        model=str(tiny_decoder(place / "model")), task="text-generation", format="nf4b64", embedding_format="float",
        rank=4, dropout=0.0, threads=1, output=str(place / "run"),
    )  # fmt: skip
    step.quantized(config, "tiny")
    return config


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_candidate_starts_from_about_the_same_loss_on_the_same_targets(prepared, precision):
    found = {}
    for name in step.CANDIDATES:
        with step.training(prepared.replace(precision=precision), name, 24, 0.5) as one:
            found[name] = one(), one()
    losses = {name: steps[0]["loss"] for name, steps in found.items()}
    assert losses["edgepeft"] == pytest.approx(losses["bitsandbytes"], rel=3e-2)  # which packs other layers
    assert losses["edgepeft-int8"] != losses["edgepeft"]
    assert losses["edgepeft-int8"] == pytest.approx(losses["edgepeft"], rel=1e-2)
    assert all(after["loss"] < before["loss"] and after["cpu_s"] > 0 for before, after in found.values())


def test_processes_take_their_steps_by_turns():
    asked = []

    class Asked:
        def __init__(self, name):
            self.name = name

        def ask(self, **question):
            asked.append((self.name, question["threads"]))
            return {}

    found = step.by_turns([Asked("a"), Asked("b")], 2, 2)
    assert asked == [("a", 2), ("b", 2), ("b", 2), ("a", 2)]
    assert {name: len(rows) for name, rows in found.items()} == {"a": 2, "b": 2}
