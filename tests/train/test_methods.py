"""Every method trains on the packed bits, changes nothing of the base, and leaves a folder that PEFT reads."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgepeft.adapt import peft_files
from edgepeft.adapt.base import Base
from edgepeft.adapt.methods import METHODS
from edgepeft.artifact import Run, read_json
from edgepeft.config import Config
from edgepeft.train.loop import train


def trained(config: Config, run: Run) -> Path:
    run.make("adapter", "k", lambda out: train(config, run, out))
    return run.path("adapter")


@pytest.mark.parametrize("tag", [tag for tag in METHODS if tag != "lora"])
def test_a_method_learns(new_run: Callable[..., Run], tiny_config: Config, tag: str) -> None:
    run = new_run("i8c") if tag == "dora" else new_run()
    rate = tiny_config.learning_rate / (16 if tag == "loraplus" else 1)  # its B learns 16 times as fast
    config = tiny_config.replace(method=tag, epochs=4, learning_rate=rate, format="i8c" if tag == "dora" else "i4b32")
    folder = trained(config, run)
    base = Base.open(run.path("quantized"))
    effect = peft_files.read(folder, base=base).effect(base)
    losses = [row["train_loss"] for row in read_json(folder / "training.json")["epochs"]]
    assert min(losses[1:]) < losses[0]
    assert effect.modules or effect.prompt
    if tag == "adalora":
        ranks = [len(terms.a_rk) for terms in effect.modules.values()]
        assert sum(ranks) <= tiny_config.rank * len(base.linears) < 6 * len(base.linears)
        assert len(set(ranks)) > 1, "some linears get more than others"
    if tag == "share-layers":
        one, two = (effect.modules[f"bert.encoder.layer.{i}.attention.self.query"].a_rk for i in (0, 1))
        assert np.array_equal(one, two)
