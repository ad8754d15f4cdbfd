"""Adapters that PEFT began from the weights, gradients or inputs of a model: exact, or refused with a way that is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import tiny_decoder

from edgepeft.adapt import peft_files
from edgepeft.errors import ArtifactError
from tests.adapt.foreign_settings import randomize

CHANGES_THE_BASE = ("pissa", "pissa_niter_4", "olora", "lora_ga")
LEAVES_IT = ("eva", "mica", "orthogonal", "gaussian")


def batch() -> dict[str, Any]:
    import torch

    ids = torch.arange(5, 45).view(4, 10)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return model(**batch()).logits.numpy()


def train_step(model: Any) -> None:
    model(**batch(), labels=batch()["input_ids"]).loss.backward()


def begun(folder: Path, start: str, **settings: Any) -> Any:
    """Return a tiny float Llama under a LoRA that PEFT began as `start` says, with what that looks at."""
    import torch
    from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model
    from peft.tuners.lora.eva import initialize_lora_eva_weights
    from peft.tuners.lora.loraga import preprocess_loraga
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder if folder.exists() else tiny_decoder(folder))
    own: dict[str, Any] = {"eva": {"eva_config": EvaConfig()}, "lora_ga": {"lora_ga_config": LoraGAConfig()}}
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **own.get(start, {}), **settings}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=start, **given)
    if start == "lora_ga":
        preprocess_loraga(base, config, lambda: train_step(base))
    peft = get_peft_model(base, config)
    if start == "eva":
        initialize_lora_eva_weights(peft, [batch()] * 3)
    return peft.eval()


def applied(adapter: peft_files.Adapter, model: Any) -> np.ndarray:
    """Return the logits of a float model with an adapter's terms in its weights."""
    import torch

    with torch.no_grad():
        for name, terms in adapter.effect().modules.items():
            weight = model.get_submodule(name).weight
            weight += torch.from_numpy(terms.delta(np.zeros(weight.shape, np.float32)))
    return logits(model)


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("start", LEAVES_IT)
def test_a_start_that_leaves_the_base_is_read(tmp_path: Path, start: str) -> None:
    peft = begun(tmp_path / "base", start)
    randomize(peft)
    peft.save_pretrained(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / peft_files.SETTINGS).read_text())["init_lora_weights"] == start
    adapter, wanted = peft_files.read(tmp_path / "adapter"), logits(peft)
    np.testing.assert_allclose(applied(adapter, plain(tmp_path / "base")), wanted, atol=1e-4)
    assert np.abs(logits(plain(tmp_path / "base")) - wanted).max() > 0.1, "the adapter should matter"


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=str)
@pytest.mark.parametrize("start", CHANGES_THE_BASE)
def test_a_start_that_changes_the_base_is_refused_and_both_ways_out_are_exact(
    tmp_path: Path, start: str, settings: dict[str, Any]
) -> None:
    peft = begun(tmp_path / "base", start, **settings)
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(str(tmp_path / "begun"))
    peft.peft_config["default"].init_lora_weights = start
    randomize(peft)
    wanted = logits(peft)
    peft.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(ArtifactError, match=r"changed the base weights.*path_initial_model_for_weight_conversion"):
        peft_files.read(tmp_path / "raw")

    converted = tmp_path / "converted"
    peft.save_pretrained(str(converted), path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    np.testing.assert_allclose(applied(peft_files.read(converted), plain(tmp_path / "base")), wanted, atol=1e-4)

    text = (tmp_path / "raw" / peft_files.SETTINGS).read_text()
    settings = {**json.loads(text), "init_lora_weights": True}
    (tmp_path / "raw" / peft_files.SETTINGS).write_text(json.dumps(settings))
    adapter = peft_files.read(tmp_path / "raw")
    with peft.disable_adapter():
        changed = logits(peft)
    peft.unload()
    found = applied(adapter, peft.get_base_model())
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(changed - logits(plain(tmp_path / "base"))).max() > 1e-3, "its base is another"


def test_loftq_has_one_way_out(tmp_path: Path) -> None:
    """What LoftQ takes from the base is not what its adapter begins with, so converting would not be exact."""
    peft = begun(tmp_path / "base", "gaussian")
    peft.save_pretrained(str(tmp_path / "adapter"))
    path = tmp_path / "adapter" / peft_files.SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "loftq"}))
    with pytest.raises(ArtifactError, match="changed the base weights as well; give the changed base"):
        peft_files.read(tmp_path / "adapter")
