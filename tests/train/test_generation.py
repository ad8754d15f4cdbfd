"""Tuning a causal language model on packed bits: it learns to answer, and how steps are computed changes nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import conversations, write_rows

from edgepeft.adapt import peft_files
from edgepeft.artifact import Run, read_json, read_tensors
from edgepeft.config import Config
from edgepeft.errors import ConfigError, EdgePeftError
from edgepeft.train import loop
from edgepeft.train.data import load_splits
from tests.train.killing import train_in_child

NewRun = Callable[..., Run]


def trained(config: Config, run: Run) -> Path:
    run.make("adapter", run.key, lambda out: loop.train(config, run, out))
    return run.path("adapter")


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in read_tensors(folder / peft_files.TENSORS).items()}


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Return how far two adapters lie apart, for all that they learned: lora_B begins at zero."""
    names = [name for name in one if "lora_B" in name]
    apart, learned = (sum(float(np.square(value).sum()) for value in values) for values in (
        [one[name] - other[name] for name in names], [one[name] for name in names],
    ))  # fmt: skip
    return (apart / learned) ** 0.5


def answers(folder: Path, run: Run, config: Config, rows: list[dict[str, Any]]) -> list[str]:
    """Return what the tuned model says to the first turn of every conversation, likeliest token by token."""
    from peft import PeftModel

    from edgepeft.backbone.load import quantized_model

    model = PeftModel.from_pretrained(quantized_model(run.path("quantized"), (), config), str(folder)).eval()
    tokenizer = loop.load_tokenizer(run.path("quantized"))
    said = []
    for row in rows:
        asked = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        found = model.generate(input_ids=asked, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=2)
        said.append(tokenizer.decode(found[0, asked.shape[1] :], skip_special_tokens=True))
    return said


def test_it_learns_to_answer(new_chat_run: NewRun, chat_config: Config, capfd: Any) -> None:
    run = new_chat_run()
    folder = trained(chat_config, run)
    told = capfd.readouterr().err
    report = json.loads((folder / "training.json").read_text())
    losses = [row["loss"] for row in report["epochs"]]
    assert losses[-1] < 0.5 * losses[0]
    assert report["validation"]["token_accuracy"] > 0.85
    assert report["validation"]["loss"] == pytest.approx(min(losses), rel=1e-4)
    assert "test" not in report
    assert report["best_epoch"] == 1 + losses.index(min(losses))
    assert min(report["tokens_per_second"], report["peak_resident_bytes"] >> 20) > 0
    assert [line for line in told.splitlines() if not line.startswith("  ")] == [], "only our own lines"
    assert "perplexity" in told
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((run.folder / "logs").glob("events.*"))
    rows = conversations(10, seed=7)
    found = answers(folder, run, chat_config, rows)
    right = sum(text == row["messages"][1]["content"] for text, row in zip(found, rows, strict=True))
    assert right >= 8, f"{right} of {len(rows)} right: {found}"


def test_the_adapter_is_on_every_linear_of_the_backbone_and_nothing_else(
    new_chat_run: NewRun, brief_config: Config
) -> None:
    run = new_chat_run()
    folder = trained(brief_config, run)
    about = read_json(run.path("quantized") / "quantized.json")
    shapes = {layer["name"]: tuple(layer["shape"]) for layer in about["layers"] if layer["kind"] == "linear"}
    assert len(shapes) == 14
    adapter = peft_files.read(folder, about["base_digest"], shapes, ())
    assert adapter.modules == sorted(shapes)
    assert adapter.heads == {}
    device = peft_files.write_device(folder.parent / "device", folder, shapes=shapes)
    assert set(device.tensors) == set(adapter.tensors)


def test_equal_seeds_give_equal_bytes_and_memory_is_saved_for_nothing(
    new_chat_run: NewRun, brief_config: Config
) -> None:
    config = brief_config.replace(dropout=0.1)
    int8 = config.replace(train_activation="int8")
    saving = {"checkpointing": True}
    variants = [config, config, config.replace(**saving), config.replace(seed=1), int8, int8.replace(**saving)]
    folders = [trained(variant, new_chat_run(str(i))) for i, variant in enumerate(variants)]
    one, two, saved, other, rounded, rounded_saved = ((f / peft_files.TENSORS).read_bytes() for f in folders)
    assert one == two
    assert one == saved, "computing activations twice changed the gradients"
    assert len({one, other, rounded}) == 3
    assert rounded == rounded_saved


def test_a_step_is_the_same_in_one_pass_and_in_several(
    new_chat_run: NewRun, chat_config: Config, tmp_path: Path
) -> None:
    """Rows of uneven length: a mean of means would weigh their tokens unequally."""
    rows = conversations(8)
    for i, row in enumerate(rows):
        row["messages"][1]["content"] += " the" * i
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "validation.jsonl", conversations(4, seed=1))
    config = chat_config.replace(data=str(tmp_path), epochs=3, packing=False, learning_rate=1e-3)
    whole, parts = (
        tensors(trained(config.replace(batch_size=size, accumulation=8 // size), new_chat_run(str(size))))
        for size in (8, 2)
    )
    assert difference(whole, parts) < 1e-2


@pytest.mark.parametrize("activation", ["float", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_killed_training_ends_with_the_same_bytes(
    new_chat_run: NewRun, brief_config: Config, activation: str
) -> None:
    config = brief_config.replace(epochs=2, dropout=0.1, accumulation=2, train_activation=activation)
    whole, killed = new_chat_run("whole"), new_chat_run("killed")
    assert train_in_child(config, whole.folder, "never") == 0
    moments = ("in the middle of an epoch", "while the second checkpoint is written", "never")
    assert [train_in_child(config, killed.folder, moment) for moment in moments] == [-9, -9, 0]
    one, two = ((run.path("adapter") / peft_files.TENSORS).read_bytes() for run in (whole, killed))
    assert one == two


def test_evaluation_needs_no_logits_and_counts_tokens(
    quantized_decoder: Path, chat_config: Config, tmp_path: Path
) -> None:
    import torch

    from edgepeft.backbone.load import quantized_model

    model = quantized_model(quantized_decoder, (), chat_config)
    tokenizer, splits = loop.load_tokenizer(quantized_decoder), load_splits(chat_config)
    rows = splits.validation.encode(tokenizer, 160)
    lost, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].detach()
        labels = torch.tensor(row["labels"][1:])
        lost += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    found = loop.evaluate(model, chat_config, splits.validation, tokenizer)
    assert found["loss"] == pytest.approx(lost / count, rel=1e-5)
    assert found["examples"] == len(rows)
    figures = loop.predict(model, chat_config, splits.validation, tokenizer)
    assert figures[:, 1].tolist() == [sum(label != -100 for label in row["labels"]) for row in rows]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "bfloat16"}, "--precision bfloat16: expected a processor or GPU"),
        ({"max_length": 300}, "--max-length: expected at most 256, the model's positions; found 300"),
        ({"learning_rate": 1e30}, r"training step \d+: expected a finite loss"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    new_chat_run: NewRun, chat_config: Config, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "native_bfloat16", lambda: False)
    with pytest.raises(EdgePeftError, match=said):
        trained(chat_config.replace(**changes), new_chat_run())


def test_bfloat16_learns_where_it_is_allowed(
    new_chat_run: NewRun, brief_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "native_bfloat16", lambda: True)
    config = brief_config
    exact, rounded = (
        trained(config.replace(precision=precision), new_chat_run(precision)) for precision in ("float32", "bfloat16")
    )
    reports = [json.loads((folder / "training.json").read_text())["validation"] for folder in (exact, rounded)]
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=0.1)
    assert reports[0]["loss"] != reports[1]["loss"]
    assert {value.dtype for value in tensors(rounded).values()} == {np.dtype(np.float32)}


def test_tasks_have_settings_of_their_own() -> None:
    chats, classes = Config(task="text-generation"), Config()
    assert (chats.max_length, chats.batch_size, chats.epochs, chats.learning_rate) == (512, 4, 3, 2e-4)
    assert (classes.max_length, classes.batch_size, classes.epochs, classes.learning_rate) == (64, 32, 8, 2e-3)
    assert Config(task="text-generation", epochs=7, max_length=0).replace(rank=2).epochs == 7
    with pytest.raises(ConfigError, match="--max-length: expected at least 4"):
        Config(max_length=3)


def run_command(*command: str, **settings: Any) -> subprocess.CompletedProcess:
    """Run the command line in processes of their own."""
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command, *flags], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_two_processes_take_the_steps_of_two_passes(new_chat_run: NewRun, chat_config: Config, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", conversations(24))
    write_rows(tmp_path / "validation.jsonl", conversations(6, seed=1))
    names = ("model", "task", "rank", "dropout", "learning_rate", "max_length", "threads")
    settings = {name: getattr(chat_config, name) for name in names}
    settings |= {"data": tmp_path, "epochs": 3, "batch_size": 3, "output": tmp_path / "out"}
    assert run_command("edgepeft", "quantize", **settings).returncode == 0
    launch = ("torch.distributed.run", "--nproc_per_node", "2", "-m", "edgepeft")
    done = run_command(*launch, "train", "--no-packing", **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "out" / "adapter")]
    assert done.stderr.count("epoch 1/3") == 1
    config = chat_config.replace(data=str(tmp_path), epochs=3, batch_size=3, accumulation=2, packing=False)
    alone = tensors(trained(config, new_chat_run()))
    together = tensors(tmp_path / "out" / "adapter")
    assert difference(alone, together) < 1e-2
    shared = settings | {"output": tmp_path / "shared"}
    assert run_command("edgepeft", "quantize", **shared).returncode == 0
    done = run_command(*launch, "train", "--no-packing", "--shard", **shared)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / out / "adapter" / peft_files.TENSORS for out in ("out", "shared")]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = run_command(*launch, "train", "--no-packing", **settings)
    assert (again.returncode, again.stderr.count("up to date")) == (0, 1)
    refused = run_command(*launch, "export", **settings)
    assert refused.returncode != 0
    assert refused.stderr.count("several processes (torchrun) can only train") == 1
