from __future__ import annotations

import numpy as np
import pytest

from edgepeft.errors import ConfigError, VerifyError
from edgepeft.runtime.sampling import Sampler, Sampling, candidates, penalized, softmax

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.5, "top_p": 0.05},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "repetition_penalty": 1.5},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.7, "min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.99, "min_p": 0.01, "repetition_penalty": 0.7},
]


def as_transformers(logits: np.ndarray, seen: list[int], settings: dict) -> np.ndarray:
    """Return the scores that transformers would draw from, minus infinity for what it leaves out."""
    import torch
    from transformers import GenerationConfig, GenerationMixin

    config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    mixin = type("Model", (GenerationMixin,), {"config": type("C", (), {"is_encoder_decoder": False})()})()
    processors = mixin._get_logits_processor(config, input_ids_seq_length=len(seen), device="cpu", model_kwargs={})
    scores = processors(torch.tensor([seen]), torch.tensor(logits)[None])
    return scores[0].numpy()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("width", [1.0, 6.0])
def test_filters_are_those_of_transformers(settings: dict, width: float) -> None:
    rng = np.random.default_rng(7)
    for _ in range(5):
        logits, seen = rng.normal(size=200).astype(np.float32) * width, rng.integers(0, 200, 12).tolist()
        expected = as_transformers(logits, seen, settings)
        sampling = Sampling(**settings)
        found = penalized(logits, np.unique(seen), sampling.repetition_penalty)
        ids, probabilities = candidates(found, sampling)
        np.testing.assert_array_equal(ids, np.flatnonzero(np.isfinite(expected)))
        np.testing.assert_allclose(probabilities, softmax(expected[ids]), rtol=1e-4)


def test_equal_logits_stay_together_at_the_edge_of_top_k() -> None:
    logits = np.array([3, 1, 2, 2, 0], np.float32)
    assert candidates(logits, Sampling(temperature=1, top_k=2))[0].tolist() == [0, 2, 3]


def test_greedy_takes_the_lowest_of_equals_and_hears_of_nothing_but_the_penalty() -> None:
    logits = np.array([0, 5, 5, 4.9], np.float32)
    assert Sampler(Sampling(top_k=3, top_p=0.1, min_p=0.5), []).pick(logits) == 1
    sampler = Sampler(Sampling(repetition_penalty=2.0), [1])
    assert [sampler.pick(logits) for _ in range(3)] == [2, 3, 1]
    np.testing.assert_array_equal(logits, np.array([0, 5, 5, 4.9], np.float32))


def test_a_seed_gives_the_same_draws_and_another_does_not() -> None:
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0), [], seed)
        return [sampler.pick(logits) for _ in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_draws_are_as_frequent_as_they_are_likely() -> None:
    likely = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(Sampling(temperature=1.0), [], seed=0)
    counts = np.bincount([sampler.pick(np.log(likely).astype(np.float32)) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, likely, atol=0.03)


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6])
def test_temperatures_at_the_ends_stay_finite(temperature: float) -> None:
    picked = Sampler(Sampling(temperature=temperature), [], 0).pick(np.array([1e30, -1e30, 0], np.float32))
    assert picked == 0 or temperature > 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    with pytest.raises(VerifyError, match="not finite"):
        Sampler(Sampling(temperature=temperature), []).pick(np.array([0, bad], np.float32))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temperature", -0.1, "a number of at least 0"),
        ("temperature", float("nan"), "a number of at least 0"),
        ("temperature", "hot", "found 'hot'"),
        ("top_k", -1, "a whole number of at least 0"),
        ("top_k", 2.5, "a whole number of at least 0"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("min_p", -1, "at least 0 and at most 1"),
        ("repetition_penalty", 0, "above 0, found 0"),
        ("repetition_penalty", float("inf"), "above 0, found inf"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: expected .*{said}"):
        Sampling(**{name: value})
