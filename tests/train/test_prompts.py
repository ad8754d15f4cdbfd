"""Prompts of rows, or of keys and values, learn on the packed bits of a decoder, and go on after a kill."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edgepeft.adapt import peft_files
from edgepeft.adapt.base import Base
from edgepeft.adapt.methods import METHODS
from edgepeft.adapt.peft_files import SETTINGS, TENSORS
from edgepeft.artifact import Run, read_json
from edgepeft.config import Config
from edgepeft.errors import ConfigError
from edgepeft.train import loop
from tests.train.killing import train_in_child

PROMPTS = [name for name, method in METHODS.items() if method.prompt]
NewRun = Callable[..., Run]


def trained(config: Config, run: Run) -> Path:
    run.make("adapter", run.key, lambda out: loop.train(config, run, out))
    return run.path("adapter")


@pytest.mark.parametrize("teacher", ["none", "self"])
@pytest.mark.parametrize("tag", PROMPTS)
def test_a_prompt_learns(new_chat_run: NewRun, brief_config: Config, tag: str, teacher: str) -> None:
    run = new_chat_run()
    config = brief_config.replace(method=tag, epochs=3, learning_rate=3e-2, prompt_tokens=6, teacher=teacher)
    folder = trained(config.replace(lesson_hidden=0.1 if teacher == "self" else 0.0), run)
    base = Base.open(run.path("quantized"))
    effect = peft_files.read(folder, base=base).effect(base)
    losses = [row["loss"] for row in read_json(folder / "training.json")["epochs"]]
    assert losses[2] < losses[0]
    assert not effect.modules
    assert {array.shape[2] for array in effect.prompt.values()} == {6}


@pytest.mark.parametrize("tag", PROMPTS)
def test_a_killed_training_ends_with_the_same_bytes(new_chat_run: NewRun, brief_config: Config, tag: str) -> None:
    config = brief_config.replace(method=tag, epochs=3, learning_rate=3e-2, prompt_tokens=6)
    whole, killed = new_chat_run("whole"), new_chat_run("killed")
    assert train_in_child(config, whole.folder, "never") == 0
    assert train_in_child(config, killed.folder, "between seal and removal") == -9
    assert train_in_child(config, killed.folder, "never") == 0
    assert read_json(killed.path("adapter") / "training.json")["resumed_at_step"]
    for name in (TENSORS, SETTINGS):
        assert (whole.path("adapter") / name).read_bytes() == (killed.path("adapter") / name).read_bytes()


def test_what_would_train_something_else_is_refused(new_chat_run: NewRun, brief_config: Config) -> None:
    with pytest.raises(ConfigError, match="take no prefix"):
        trained(brief_config.replace(method="prefix", checkpointing=True), new_chat_run("one"))
    with pytest.raises(ConfigError, match="at most 236, the model's positions less 20 of the prompt"):
        trained(brief_config.replace(method="prompt", max_length=240), new_chat_run("two"))
