"""The loss without logits, and rows that several examples share, give what the plain model does, gradients too."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import DECODERS, tiny_decoder

from edgepeft.quant.linear import QuantLinear
from edgepeft.train import losses, watch
from edgepeft.train.batches import pack
from edgepeft.train.chats import IGNORED
from edgepeft.train.tasks import TASKS, pad_tokens

VOCABULARY, HIDDEN, TOKENS = 262, 64, 37


@pytest.fixture(params=[1, 10, 1 << 20], ids=["a token at a time", "some tokens", "all at once"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several chunks of several tokens, and packed weights in several pieces."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", request.param * VOCABULARY * losses.FLOAT_BYTES)
    monkeypatch.setattr("edgepeft.quant.linear.PIECE", 100 * HIDDEN)
    return


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("tag", ["float", "i4b32", "i8c"])
def test_it_is_the_cross_entropy_of_the_logits(chunks: None, softcap: float, tag: str) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head: Any = linear if tag == "float" else QuantLinear.from_float(linear, tag)
    h = torch.randn(TOKENS, HIDDEN).mul_(4).requires_grad_(True)
    target, weight = torch.randint(VOCABULARY, (TOKENS,)), torch.rand(TOKENS)
    z = h @ (linear.weight.detach() if tag == "float" else head.get_weight()).T
    z = softcap * torch.tanh(z / softcap) if softcap else z
    wanted = torch.nn.functional.cross_entropy(z, target, reduction="none")
    (slope,) = torch.autograd.grad(wanted @ weight, h)
    found, hits = losses.token_losses(h, head, target, softcap)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found @ weight, h)[0], slope, rtol=1e-4, atol=1e-6)
    assert torch.equal(hits, z.argmax(-1) == target)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_autocast_multiplies_in_bfloat16_and_sums_in_float(chunks: None, softcap: float) -> None:
    torch.manual_seed(0)
    head = QuantLinear.from_float(torch.nn.Linear(HIDDEN, VOCABULARY, bias=False), "nf4b64")
    h = torch.randn(TOKENS, HIDDEN).mul_(4).requires_grad_(True)
    target = torch.randint(VOCABULARY, (TOKENS,))
    z = h.bfloat16().float() @ head.get_weight().bfloat16().float().T
    z = softcap * torch.tanh(z / softcap) if softcap else z
    wanted = torch.nn.functional.cross_entropy(z, target, reduction="none")
    (slope,) = torch.autograd.grad(wanted.sum(), h)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = losses.token_losses(h, head, target, softcap)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=2e-2)
    difference = torch.autograd.grad(found.sum(), h)[0] - slope
    assert difference.norm() <= 0.01 * slope.norm()


def test_a_head_with_an_adapter_of_its_own_is_judged_with_it(chunks: None) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    whole = torch.nn.ModuleDict({"head": torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)})
    h, target = torch.randn(TOKENS, HIDDEN), torch.randint(VOCABULARY, (TOKENS,))
    plain, _ = losses.token_losses(h, whole["head"], target)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"], init_lora_weights=False), whole)
    with torch.inference_mode():
        found, _ = losses.token_losses(h, whole["head"], target, softcap=3.0)
        z = 3 * torch.tanh(whole["head"](h) / 3)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(z, target, reduction="none"))
    assert not torch.allclose(found, plain)


def test_a_head_on_int8_activations_gives_the_logits_that_ship(chunks: None) -> None:
    torch.manual_seed(0)
    head = QuantLinear.from_float(torch.nn.Linear(HIDDEN, VOCABULARY, bias=False), "i4b32")
    h, target = torch.randn(TOKENS, HIDDEN), torch.randint(VOCABULARY, (TOKENS,))
    plain, _ = losses.token_losses(h, head, target)
    head.activation = "int8"
    found, _ = losses.token_losses(h, head, target)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(head(h), target, reduction="none"))
    assert not torch.equal(found, plain)


def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = losses.head_logits

    def watched(*args: Any) -> Any:
        result = real(*args)
        sizes.append(len(result[0]))
        return result

    monkeypatch.setattr(losses, "head_logits", watched)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 5 * VOCABULARY * losses.FLOAT_BYTES)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    losses.token_losses(torch.randn(12, HIDDEN), head, torch.zeros(12, dtype=torch.int64))
    assert sizes == [4, 4, 4]


def drawn_examples(seed: int = 0) -> list[dict[str, list[int]]]:
    """Return rows of random tokens of which some are trained, the last one of each among them."""
    chance = np.random.default_rng(seed)
    rows = []
    for length in (5, 17, 30, 3, 12, 25):
        ids = chance.integers(3, VOCABULARY, length).tolist()
        labels = [i if chance.random() < 0.6 else IGNORED for i in ids]
        rows.append({"input_ids": ids, "labels": [IGNORED, *labels[1:-1], ids[-1]]})
    return rows


@pytest.mark.parametrize("kind", DECODERS)
def test_padded_and_packed_rows_are_what_they_are_alone(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_decoder(tmp_path, kind), dtype=torch.float32).eval()
    layer = model.model.layers[0].mlp.down_proj.weight
    examples, total = drawn_examples(), torch.tensor(0.0)
    for row in examples:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum")
    count = sum(label != IGNORED for row in examples for label in row["labels"])
    (slope,) = torch.autograd.grad(total / count, layer)
    packed = pack(examples, 40, seed=0)
    assert len(packed) == 3
    for rows in (examples, packed):
        batch = pad_tokens(rows, 0)
        labels = batch.pop("labels")
        with losses.without_logits(model):
            (figures,) = model(**batch).to_tuple()
        loss = TASKS["text-generation"].loss(figures, labels)
        torch.testing.assert_close(loss, total / count, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(loss, layer)[0]
        assert (found - slope).abs().max() <= 1e-5 * slope.abs().max()
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, VOCABULARY), "the model is itself again"


def test_a_row_counts_losses_targets_and_hits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_decoder(tmp_path), dtype=torch.float32).eval()
    examples = drawn_examples()
    ids = torch.tensor([examples[2]["input_ids"]])
    examples[2]["labels"] = [IGNORED, *model(input_ids=ids).logits[0, :-1].argmax(-1).tolist()]
    batch = pad_tokens(examples, 0)
    with torch.no_grad(), losses.without_logits(model):
        figures = model(**batch)[0].numpy()
    assert figures[:, 1].tolist() == [sum(label != IGNORED for label in row["labels"]) for row in examples]
    assert figures[2, 2] == 29
    metrics = TASKS["text-generation"].metrics(figures, np.zeros(0))
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
    assert metrics["token_accuracy"] == pytest.approx(figures[:, 2].sum() / figures[:, 1].sum())


def test_packed_rows_hold_every_example_once_and_follow_the_seed() -> None:
    chance = np.random.default_rng(1)
    examples = []
    for length in chance.integers(2, 40, 300):
        ids = chance.integers(3, VOCABULARY, length).tolist()
        examples.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    rows, again, other = (pack(examples, 64, seed) for seed in (0, 0, 1))
    assert rows == again != other
    assert max(len(row["input_ids"]) for row in rows) <= 64
    assert {len(set(map(len, row.values()))) for row in rows} == {1}
    found = []
    for row in rows:
        starts = [i for i, place in enumerate(row["position_ids"]) if place == 0] + [len(row["input_ids"])]
        assert [row["labels"][i] for i in starts[:-1]] == [IGNORED] * (len(starts) - 1)
        found += [row["input_ids"][a:b] for a, b in itertools.pairwise(starts)]
    assert sorted(found) == sorted(row["input_ids"] for row in examples)
    filled = sum(len(row["input_ids"]) for row in rows) / (64 * len(rows))
    assert filled > 0.9, f"only {filled:.2f} of the rows is filled"


def test_the_task_says_what_is_worse() -> None:
    generation, classification = TASKS["text-generation"], TASKS["text-classification"]
    assert (generation.drop(1.0, 1.5), classification.drop(0.9, 0.8)) == (0.5, pytest.approx(0.1))
    assert dataclasses.replace(generation, lower=False).drop(1.0, 1.5) == -0.5


def test_freed_tensors_go_back_to_the_system() -> None:
    """Every second one, so that no other free memory lies beside it."""
    with watch.frugal():
        blocks = [torch.ones(5 << 20, dtype=torch.uint8) for _ in range(24)]
        watch.reset_peak_resident()
        full = watch.peak_resident_bytes()
        del blocks[::2]
        watch.reset_peak_resident()
        assert watch.peak_resident_bytes() < full - (50 << 20)
