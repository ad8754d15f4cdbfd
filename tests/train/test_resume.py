"""A training that was killed goes on and ends with the same bytes."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepeft.adapt.methods import METHODS
from edgepeft.adapt.peft_files import SETTINGS, TENSORS
from edgepeft.artifact import Run
from edgepeft.config import Config
from edgepeft.train import checkpoints
from edgepeft.train.loop import train
from edgepeft.train.watch import Sealer
from tests.train.killing import train_in_child

CHAIN = (
    "in the first epoch", "while a checkpoint is written", "in the middle of an epoch", "before the seal",
    "while the second checkpoint is written", "between seal and removal", "after training",
    "while the adapter is written", "never",
)  # fmt: skip


def adapter_bytes(run: Run) -> tuple[bytes, bytes]:
    return (run.path("adapter") / TENSORS).read_bytes(), (run.path("adapter") / SETTINGS).read_bytes()


def test_killed_at_every_bad_moment(new_run: Callable[..., Run], tiny_config: Config) -> None:
    config = tiny_config.replace(epochs=5)
    whole, killed = new_run(name="whole"), new_run(name="killed")
    assert train_in_child(config, whole.folder, "never") == 0
    codes = {moment: train_in_child(config, killed.folder, moment) for moment in CHAIN}
    assert codes == {moment: 0 if moment == "never" else -9 for moment in CHAIN}
    assert adapter_bytes(whole) == adapter_bytes(killed)
    report = json.loads((killed.path("adapter") / "training.json").read_text())
    assert report["resumed_at_step"] == 30, "the last start should have found the training done"
    again = json.loads((whole.path("adapter") / "training.json").read_text())
    assert (report["test"], report["epochs"]) == (again["test"], again["epochs"])


@pytest.mark.slow
def test_killed_at_random_moments(new_run: Callable[..., Run], tiny_config: Config) -> None:
    config = tiny_config.replace(epochs=10)
    whole, killed = new_run(name="whole"), new_run(name="killed")
    assert train_in_child(config, whole.folder, "never") == 0
    chance, kills = random.Random(0), 0
    while train_in_child(config, killed.folder, f"after ms {chance.randint(400, 6000)}" if kills < 25 else "never"):
        kills += 1
    assert kills > 2
    assert adapter_bytes(whole) == adapter_bytes(killed)


def checkpoint(work: Path, step: int, best: int) -> Path:
    folder = checkpoints.place(work, step)
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(step)))
    checkpoints.seal(work, step, best)
    return folder


def test_seal_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step, best in ((5, 5), (10, 5), (15, 15), (20, 15)):
        checkpoint(tmp_path, step, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-15", "checkpoint-20"]
    assert checkpoints.newest(tmp_path) == 20


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda work: (work / "checkpoint-20" / checkpoints.SEAL).unlink(), 15),
        (lambda work: (work / "checkpoint-20" / checkpoints.SEAL).write_text('{"files": {'), 15),
        (lambda work: (work / "checkpoint-20" / "adapter_model.safetensors").write_bytes(b"other"), 15),
        (lambda work: (work / "checkpoint-20" / "more").write_bytes(b""), 15),
        (lambda work: (work / "checkpoint-20" / "adapter_model.safetensors").unlink(), 15),
        (lambda work: (work / "checkpoint-15" / "adapter_model.safetensors").write_bytes(b"other"), None),
        (lambda work: shutil.rmtree(work / "checkpoint-15"), None),
        (lambda work: (work / "checkpoint-25").mkdir(), 20),
    ],
    ids=["no seal", "half a seal", "changed", "added", "lost", "best changed", "best lost", "one begun"],
)
def test_what_cannot_be_trusted_is_removed(tmp_path: Path, damage: Callable[[Path], object], left: int | None) -> None:
    checkpoint(tmp_path, 15, 15)
    checkpoint(tmp_path, 20, 15)
    damage(tmp_path)
    assert checkpoints.newest(tmp_path) == left
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == {None: [], 15: ["checkpoint-15"], 20: ["checkpoint-15", "checkpoint-20"]}[left]


def test_best_goes_by_accuracy_then_loss_then_time() -> None:
    rows = [(5, 0.8, 0.5), (10, 0.9, 0.4), (15, 0.9, 0.3), (20, 0.9, 0.3), (25, 0.7, 0.1)]
    log = [{"step": step, "eval_accuracy": accuracy, "eval_loss": loss} for step, accuracy, loss in rows]
    assert checkpoints.best_step([{"step": 1, "loss": 2.0}, *log], "accuracy") == 15


@pytest.mark.parametrize(
    "tag", [tag if tag in ("adalora", "qalora") else pytest.param(tag, marks=pytest.mark.slow) for tag in METHODS]
)
def test_every_method_goes_on_to_the_same_bytes(
    new_run: Callable[..., Run], tiny_config: Config, monkeypatch: pytest.MonkeyPatch, tag: str
) -> None:
    """AdaLoRA's checkpoints come after its ranks were given away: what is left is a mask that must go on to hold."""

    def interrupt(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 9:
            raise KeyboardInterrupt

    def trained(run: Run) -> tuple[bytes, bytes]:
        run.make("adapter", run.key, lambda out: train(config, run, out))
        return adapter_bytes(run)

    config = tiny_config.replace(method=tag, epochs=3)
    whole, broken = new_run(name="whole"), new_run(name="broken")
    with monkeypatch.context() as patched:
        patched.setattr(Sealer, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trained(broken)
    assert checkpoints.newest(broken.folder / ".train.work") == 6
    assert trained(broken) == trained(whole)
