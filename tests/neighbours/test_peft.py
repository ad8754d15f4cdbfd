"""PEFT reads what we ship, and we run what PEFT saves."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import LABELS

from edgepeft.adapt import peft_files
from edgepeft.artifact import read_json, read_tensors, write_json
from edgepeft.runtime import load
from tests.export.tiny_run import random_adapter, torch_model
from tests.neighbours.conftest import Made

HALF = 2e-3  # A and B as float16
FLOAT = 1e-4
TEXTS = ["turn off the lamp in the kitchen", "play a song", "turn on the light"]


@pytest.fixture
def float_model(made: Made):
    """The float model as transformers loads it, with the shipped adapter as PEFT loads it."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(made.config.model, num_labels=len(LABELS))
    return PeftModel.from_pretrained(base, str(made.bundle / "adapters/default")).eval()


def test_peft_computes_each_adapted_linear_as_shipped(made: Made, float_model) -> None:
    tensors = read_tensors(made.bundle / "adapters/default" / peft_files.TENSORS)
    checked = 0
    for name, module in float_model.named_modules():
        a = tensors.get(f"{name}.lora_A.weight")
        if a is None:
            continue
        b = tensors[f"{name}.lora_B.weight"].astype(np.float64)
        x = np.random.default_rng(checked).standard_normal((5, a.shape[1]))
        with torch.inference_mode():
            x32 = torch.from_numpy(x).float()
            found = (module(x32) - module.base_layer(x32)).numpy()
        np.testing.assert_allclose(found, x @ a.astype(np.float64).T @ b.T, rtol=FLOAT, atol=FLOAT)
        checked += 1
    assert checked == sum(name.endswith("lora_A.weight") for name in tensors) > 0


def test_peft_gives_the_trained_answers_from_the_shipped_files(made: Made, float_model) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(made.config.model, num_labels=len(LABELS))
    trained = PeftModel.from_pretrained(base, str(made.run.path("adapter"))).eval()
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = (model(input_ids=ids).logits.numpy() for model in (trained, float_model))
    np.testing.assert_allclose(found, expected, rtol=HALF, atol=HALF * np.abs(expected).max())


def by_torch(model, folder: Path) -> np.ndarray:
    """Return PyTorch's logits of TEXTS, one by one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return np.concatenate([model(**tokenizer(text, return_tensors="pt")).logits.numpy() for text in TEXTS])


@pytest.mark.parametrize("rank", [3, 12])
def test_an_adapter_of_another_rank_dropped_into_a_bundle_equals_pytorch(made: Made, tmp_path: Path, rank: int) -> None:
    bundle = Path(shutil.copytree(made.bundle, tmp_path / "bundle"))
    random_adapter(made.run, tmp_path / "peft", rank=rank, seed=rank)
    second = bundle / "adapters/second"
    peft_files.write_device(second, tmp_path / "peft", heads=("classifier",))
    write_json(second / "labels.json", list(reversed(LABELS)))
    model = load(bundle, library="none")
    expected = by_torch(torch_model(made.config, made.run, second), made.bundle)
    np.testing.assert_allclose(model.logits(TEXTS, "second"), expected, rtol=FLOAT, atol=FLOAT)
    default = by_torch(torch_model(made.config, made.run, bundle / "adapters/default"), made.bundle)
    np.testing.assert_allclose(model.logits(TEXTS), default, rtol=FLOAT, atol=FLOAT)
    best = expected.argmax(1)
    assert [p.label for p in model.classify(TEXTS, "second")] == [LABELS[::-1][i] for i in best]


def test_the_library_agrees_with_the_bodies_within_int8_noise(made: Made) -> None:
    stock, ours = load(made.bundle, library="none"), load(made.bundle)
    assert ours.library is not None
    expected = stock.logits(TEXTS)
    assert np.abs(ours.logits(TEXTS) - expected).max() < 0.05 * np.abs(expected).max()
    exact = load(made.bundle, activation="float").logits(TEXTS)
    np.testing.assert_allclose(exact, expected, rtol=FLOAT, atol=FLOAT * np.abs(expected).max())
    assert read_json(made.bundle / "manifest.json")["activation"] == "int8"
