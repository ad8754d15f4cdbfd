"""The bench of one training step: every candidate trains the same, and rows compare with bitsandbytes."""

import pytest
from builders import tiny_decoder

from edgepeft.bench import step
from edgepeft.config import Config

MIB = 1 << 20


def result(candidate: str, cpu_s: float, mib: int) -> dict:
    return {"candidate": candidate, "loss": 5.0, "step_s": 2 * cpu_s, "step_cpu_s": cpu_s, "memory_bytes": mib * MIB}


def test_rows_compare_with_bitsandbytes_where_it_took_part():
    ours, peer = result("edgepeft", 2.0, 100), result("bitsandbytes", 3.0, 400)
    assert [row.get("times as fast") for row in step.summary([ours, peer])] == [1.5, 1.0]
    assert step.summary([ours, peer])[0]["of its memory"] == 0.25
    assert "times as fast" not in step.summary([ours])[0]


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


def test_every_candidate_starts_from_about_the_same_loss_on_the_same_targets(prepared):
    found = {name: step.steps(prepared, name, 24, 0.5, 1) for name in step.CANDIDATES}
    losses = {name: figures["loss"] for name, figures in found.items()}
    assert losses["edgepeft"] == pytest.approx(losses["bitsandbytes"], rel=3e-2)  # which packs other layers
    assert losses["edgepeft-int8"] != losses["edgepeft"]
    assert losses["edgepeft-int8"] == pytest.approx(losses["edgepeft"], rel=1e-2)
    assert min(figures["step_cpu_s"] for figures in found.values()) > 0
