"""An adapter that stands before the text: keys and values of some tokens do what these tokens did."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgepeft.artifact import write_json, write_tensors
from edgepeft.errors import ArtifactError, DataError
from edgepeft.runtime import Generator, load
from edgepeft.runtime.prompts import codes
from tests.runtime import writer as w
from tests.runtime.standin import BASE_DIGEST, FORMAT

BEFORE, NEW = "please ", 10
PROMPTS = ["the kitchen", "x", "turn on the lights in the kitchen, please"]
KEY = "past_key_values.1.key"
METADATA = {"format": "pt", "edgepeft.base": BASE_DIGEST, "edgepeft.format": FORMAT}


def keys_and_values(bundle: Path, text: str) -> dict[str, np.ndarray]:
    """Return what the base keeps of a text's tokens, [1, kv_heads, V, head_dim]."""
    model = load(bundle, threads=1)
    ids = model.tokens.ids(text)
    cache = model._cache(model._get("none"), 1)
    model._run(cache, 0, np.array([ids]))
    names = [f"past_key_values.{i}.{part}" for i in range(w.LAYERS) for part in ("key", "value")]
    return {name: view[:, :, : len(ids)].copy() for name, view in zip(names, cache.views(0, 1), strict=True)}


def write_prompt(bundle: Path, name: str, tensors: dict[str, np.ndarray]) -> None:
    folder = bundle / "adapters" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", {"peft_type": "PREFIX_TUNING"})
    write_tensors(folder / "adapter_model.safetensors", {"prompt_embeddings": np.ones((1, 2), np.float32)}, METADATA)
    write_tensors(folder / "terms.safetensors", tensors, METADATA)
    w.reseal(bundle)


@pytest.fixture
def prompted(writer_bundle: Path) -> Path:
    """A bundle with an adapter "polite" that stands before the text."""
    write_prompt(writer_bundle, "polite", keys_and_values(writer_bundle, BEFORE))
    return writer_bundle


def expected(model: Generator, prompt: str, count: int = NEW) -> list[int]:
    return w.Reference().greedy([*model.tokens.ids(BEFORE), *model.tokens.ids(prompt)], count)


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_a_text_is_read_behind_the_prompt(prompted: Path, chunk: int) -> None:
    model = load(prompted, threads=1, adapter="polite")
    model.chunk = chunk
    for prompt in PROMPTS:
        answer = model.generate(prompt, max_new_tokens=NEW)
        assert answer.tokens == expected(model, prompt)
        assert answer.prompt_tokens == len(model.tokens.ids(prompt))
    ids = model.tokens.ids(PROMPTS[2])
    wanted = w.Reference().logits([*model.tokens.ids(BEFORE), *ids])[-len(ids) :]
    np.testing.assert_allclose(model.logits(ids), wanted, atol=1e-4)


def test_rows_of_one_batch_with_and_without_it(prompted: Path) -> None:
    model = load(prompted, threads=1)
    names = ["polite", "none", "default", "polite", "other"]
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[0]]
    pairs = enumerate(zip(prompts, names, strict=True))
    alone = [model.generate(p, adapter=n, max_new_tokens=3 + i).tokens for i, (p, n) in pairs]
    assert alone[0] == expected(model, prompts[0], 3)
    assert alone[3] == expected(model, prompts[3], 6)
    model = load(prompted, threads=1)
    together = model.generate(prompts, adapter=names, max_new_tokens=6)
    assert [a.tokens[: 3 + i] for i, a in enumerate(together)] == [t[:6] for t in alone]
    assert model.generate(PROMPTS[0], adapter=model.off("polite"), max_new_tokens=3).tokens == alone[1][:3]


def test_what_is_known_of_a_beginning_is_not_read_again(prompted: Path) -> None:
    model = load(prompted, threads=1, adapter="polite")
    first = model.generate("the kitchen is", max_new_tokens=4)
    again = model.generate("the kitchen is cold", max_new_tokens=4)
    assert again.reused_tokens == len(model.tokens.ids("the kitchen is"))
    assert again.tokens == expected(model, "the kitchen is cold", 4)
    assert model.generate("the kitchen is", adapter="none", max_new_tokens=4).reused_tokens == 0
    assert model.generate("the kitchen is", max_new_tokens=4).tokens == first.tokens


def test_it_takes_its_part_of_the_context(prompted: Path) -> None:
    model, columns = load(prompted, threads=1), len(load(prompted).tokens.ids(BEFORE))
    left = w.CONTEXT - columns
    full = model.generate("x" * left, adapter="polite", max_new_tokens=1)
    assert (full.finish, len(full.tokens)) == ("length", 0)
    assert len(model.logits([5] * left, "polite", 1)) == 1
    with pytest.raises(DataError, match=f"{columns} of which are the adapter's"):
        model.generate("x" * (left + 1), adapter="polite")
    with pytest.raises(DataError, match=f"{columns} of which are the adapter's"):
        model.logits([5] * (left + 1), "polite")
    assert model.generate("x" * (left + 1), adapter="none", max_new_tokens=1).tokens


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("none", lambda t: t.pop("past_key_values.1.value")),
        (
            r"float32\[1, 2, 3, 16\]",
            lambda t: t.update({KEY: t[KEY][:, :, :3]}),
        ),
        (r"float32\[1, 1, 7, 16\]", lambda t: t.update({KEY: t[KEY][:, :1]})),
        ("float16", lambda t: t.update({"past_key_values.0.key": t["past_key_values.0.key"].astype(np.float16)})),
        ("float32", lambda t: t.update({"past_key_values.0.key": t["past_key_values.0.key"] * np.nan})),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(prompted: Path, what: str, change: Callable) -> None:
    tensors = keys_and_values(prompted, BEFORE)
    change(tensors)
    write_prompt(prompted, "bad", tensors)
    with pytest.raises(ArtifactError, match=f"expected finite float32.* found {what}"):
        load(prompted, adapter="bad")


def test_a_prompt_that_leaves_no_context_is_refused(prompted: Path) -> None:
    write_prompt(prompted, "long", keys_and_values(prompted, "x" * w.CONTEXT))
    with pytest.raises(ArtifactError, match="leaves nothing of the 128 tokens"):
        load(prompted, adapter="long")


def test_codes_are_the_nearest_that_there_are() -> None:
    scales = {"past_key_values.0.key": np.array([0.5, 2.0], np.float32).reshape(1, 1, 2)}
    found = codes({"past_key_values.0.key": np.array([[[[0.6, -3.1], [1e9, -1e9]]]], np.float32)}, scales)
    assert found["past_key_values.0.key"].tolist() == [[[[1, -2], [127, -127]]]]
    assert found["past_key_values.0.key"].dtype == np.int8
