"""Adapters added up in a real language model's bundle: what PEFT's own sum of them gives, and what cannot be added."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from edgepeft.artifact import write_json
from edgepeft.backbone.load import quantized_model
from edgepeft.deploy import adapters as da
from edgepeft.deploy.bundle import bundle as collect
from edgepeft.deploy.mix import mix
from edgepeft.errors import ArtifactError
from edgepeft.runtime import load
from tests.adapt.foreign_settings import randomize
from tests.export.test_token_checks import make_run

IDS = [5, 17, 30, 8, 44, 21, 3]
WEIGHTS = {"default": 0.7, "second": -1.3}
EXACT, HALF = 1e-4, 1e-2  # of the largest logit; what float16 may change


def saved(config: Any, run: Any, folder: Path, settings: Any) -> Path:
    """A random adapter, as PEFT saves it."""
    peft = get_peft_model(quantized_model(run.path("quantized"), [], config), settings)
    randomize(peft, seed=3)
    peft.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path, Path]:
    """(config, run, its bundle with a second LoRA of other ranks on other linears, that LoRA's folder)."""
    place = tmp_path_factory.mktemp("mix")
    config, run = make_run(place, "llama", activation="float")
    told = {"method": "lora", "task": config.task, "rank": 4, "max_length": 96, "model": config.model}
    write_json(run.path("adapter") / "training.json", {"labels": [], "config": {**told, "data": config.data}})
    run.path("verify").mkdir()
    write_json(run.path("verify") / "report.json", {"checks": {}})
    run.make("bundle", "", lambda out: collect(config, run, out))
    settings = LoraConfig(
        r=7, lora_alpha=9, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    folder = saved(config, run, place / "second", settings)
    da.add(run.path("bundle"), folder, base=Path(config.model))
    return config, run, run.path("bundle"), folder


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def peft_sum(config: Any, run: Any, folders: dict[str, Path]) -> np.ndarray:
    """The logits of PEFT's own sum of some adapters, stacked along the rank."""
    name, *others = folders
    peft = PeftModel.from_pretrained(quantized_model(run.path("quantized"), [], config), str(folders[name]), name)
    for other in others:
        peft.load_adapter(str(folders[other]), other)
    if others:
        peft.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="cat")
        peft.set_adapter("sum")
    with torch.inference_mode():
        return peft.eval()(torch.tensor([IDS])).logits[0].numpy()


def test_a_sum_is_what_peft_makes_of_it(made: Any) -> None:
    config, run, bundle, folder = made
    mix(bundle, WEIGHTS, "sum", replace=True)
    model = load(bundle, threads=1)
    alone = model.logits(IDS, "default"), model.logits(IDS, "second"), model.logits(IDS, "none")
    exact, kept = model.logits(IDS, WEIGHTS), model.logits(IDS, "sum")
    assert min(error(exact, other) for other in alone) > 0.05
    in_bundle = {name: bundle / "adapters" / name for name in (*WEIGHTS, "sum")}
    assert error(exact, peft_sum(config, run, {name: in_bundle[name] for name in WEIGHTS})) < EXACT
    assert error(kept, peft_sum(config, run, {"sum": in_bundle["sum"]})) < EXACT
    as_saved = peft_sum(config, run, {"default": run.path("adapter"), "second": folder})
    assert max(error(exact, as_saved), error(kept, as_saved), error(kept, exact)) < HALF


def test_scales_do_not_add(made: Any, tmp_path: Path) -> None:
    config, run, bundle, _ = made
    settings = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    da.add(bundle, saved(config, run, tmp_path / "scales", settings), "scales", base=Path(config.model))
    before = da.entries(bundle)
    with pytest.raises(ArtifactError, match=r"'scales' changes .*, and only what B·A add can be summed"):
        mix(bundle, {"default": 1.0, "scales": 1.0}, "wrong")
    with pytest.raises(ArtifactError, match=r"'scales' changes .*; only what B·A add can be summed"):
        load(bundle, threads=1).logits(IDS, {"default": 1.0, "scales": 1.0})
    with pytest.raises(ArtifactError, match="nobody"):
        mix(bundle, {"default": 1.0, "nobody": 1.0}, "wrong")
    assert da.entries(bundle) == before
