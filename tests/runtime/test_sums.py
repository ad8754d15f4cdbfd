"""Several adapters as one, each times a weight: exact at run time, and as an adapter of the bundle but for float16."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgepeft.artifact import read_json
from edgepeft.cli import cli
from edgepeft.deploy import adapters as da
from edgepeft.deploy.mix import mix
from edgepeft.errors import ArtifactError, ConfigError
from edgepeft.runtime import load
from tests.runtime import standin as st
from tests.runtime import writer as w

SEEDS = {"default": 1, "other": 2, "third": 3}
WEIGHTS = {"other": 0.7, "default": -0.3, "none": 4.0}
PROMPTS = ["the kitchen", "turn on the lights in the kitchen, please"]
HALF = 3e-3  # of the largest logit: w·b in float16


def summed(weights: dict[str, float]) -> w.Reference:
    """The model under a sum, in float64."""
    parts = [(w.adapter_tensors(SEEDS[name]), weight) for name, weight in weights.items() if name in SEEDS]
    a, b = (
        np.concatenate([own[key].astype(np.float64) * (weight if axis else 1) for own, weight in parts], axis)
        for key, axis in ((w.A, 0), (w.B, 1))
    )
    return w.Reference({w.A: a, w.B: b})


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_a_sum_is_exact_and_leaves_its_parts_alone(writer_bundle: Path) -> None:
    model = load(writer_bundle, threads=1)
    ids = model.tokens.ids(PROMPTS[1])
    alone = {name: model.logits(ids, name) for name in SEEDS}
    found = model.logits(ids, WEIGHTS)
    assert error(found, summed(WEIGHTS).logits(ids)) < 1e-5
    assert np.array_equal(model.logits(ids, dict(reversed(WEIGHTS.items()))), found)
    assert np.array_equal(model.logits(ids, {"other": 1}), alone["other"])
    assert all(np.array_equal(model.logits(ids, name), alone[name]) for name in SEEDS)
    model.use({"third": 0.5})
    assert error(model.logits(ids), summed({"third": 0.5}).logits(ids)) < 1e-5


def test_sums_and_single_adapters_share_a_batch(writer_bundle: Path) -> None:
    model = load(writer_bundle, threads=1)
    adapters = [WEIGHTS, "third", {"third": -1.0, "other": 0.5}, "none"]
    prompts = [PROMPTS[place % 2] for place in range(4)]
    assert model._mixes.groups([model._get(name) for name in adapters]) == [[0, 1, 2, 3]]
    together = model.generate(prompts, adapter=adapters, max_new_tokens=8)
    singly = [
        model.generate(prompt, adapter=one, max_new_tokens=8) for prompt, one in zip(prompts, adapters, strict=True)
    ]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in singly]
    for place in (0, 2):
        wanted = summed(adapters[place]).greedy(model.tokens.ids(prompts[place]), 8)
        assert together[place].tokens == wanted


def test_more_parts_than_share_a_run_are_summed_all_the_same(writer_bundle: Path) -> None:
    for seed in range(4, 12):
        w.write_adapter(writer_bundle, f"seed{seed}", seed)
    model, ids = load(writer_bundle, threads=1), [5, 6, 7]
    weights = {f"seed{seed}": 0.1 * seed for seed in range(4, 12)} | {"other": 0.5}
    parts = [(w.adapter_tensors(2 if name == "other" else int(name[4:])), x) for name, x in weights.items()]
    a = np.concatenate([own[w.A].astype(np.float64) for own, _ in parts])
    b = np.concatenate([own[w.B].astype(np.float64) * x for own, x in parts], 1)
    assert error(model.logits(ids, weights), w.Reference({w.A: a, w.B: b}).logits(ids)) < 1e-5
    assert len(model.generate(["a", "b"], adapter=[weights, "third"], max_new_tokens=2)) == 2


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "expected a number"),
        ({"other": "0.5"}, "expected a number"),
        ({"other": float("nan")}, "expected a number"),
    ],
)
def test_what_is_no_sum_is_refused(writer_bundle: Path, weights: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(writer_bundle, threads=1).logits([5], weights)
    with pytest.raises(ArtifactError, match="nobody"):
        load(writer_bundle, threads=1).logits([5], {"nobody": 1.0})


def test_heads_do_not_add(bundle: Path) -> None:
    st.write_adapter(bundle, "wide", seed=2, rank=9)
    model = load(bundle, threads=1)
    with pytest.raises(ArtifactError, match="'wide' has another head than 'default'"):
        model.classify("play", adapter={"default": 0.5, "wide": 0.5})
    found = model.logits(["play"], {"default": 1.0, "none": 0.5})  # the base has the default's head
    np.testing.assert_allclose(found, model.logits(["play"]), rtol=1e-5, atol=1e-5)


def test_a_mix_is_an_adapter_of_the_bundle(writer_bundle: Path) -> None:
    command = ["adapters", "mix", str(writer_bundle), "other=0.7", "default=-0.3", "--name", "both"]
    done = CliRunner().invoke(cli, command)
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "both")
    model, ids = load(writer_bundle, threads=1), [5, 9, 12, 40]
    assert error(model.logits(ids, "both"), model.logits(ids, {"other": 0.7, "default": -0.3})) < HALF
    assert read_json(writer_bundle / "adapters" / "both" / "about.json")["parts"] == {"other": 0.7, "default": -0.3}
    mix(writer_bundle, {"both": 0.5, "third": 2.0}, "again")
    assert da.module_ranks(writer_bundle / "adapters" / "again") == {"model.layers.0.self_attn.q_proj": 3 * w.RANK}
    exact = load(writer_bundle, threads=1).logits(ids, {"both": 0.5, "third": 2.0})
    np.testing.assert_allclose(load(writer_bundle, threads=1).logits(ids, "again"), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [["other"], ["other=a"], ["other=1", "other=2"], ["=1"], ["other=inf"]])
def test_a_mix_says_what_it_expects(writer_bundle: Path, parts: list[str]) -> None:
    done = CliRunner().invoke(cli, ["adapters", "mix", str(writer_bundle), *parts, "--name", "both"])
    assert "expected NAME=WEIGHT" in str(done.exception)
    assert not (writer_bundle / "adapters" / "both").exists()
