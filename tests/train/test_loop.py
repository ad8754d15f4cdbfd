"""Training on packed bits: it learns, it leaves the backbone alone, and it says what happened."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import tiny_data, write_rows

from edgepeft.adapt import peft_files
from edgepeft.artifact import Run, read_json, read_tensors
from edgepeft.config import Config
from edgepeft.errors import ConfigError, EdgePeftError
from edgepeft.train import checkpoints, loop, watch
from edgepeft.train.batches import LengthBatches
from edgepeft.train.data import Split, load_splits
from edgepeft.train.tasks import TASKS


def trained(config: Config, run: Run) -> Path:
    run.make("adapter", run.key, lambda out: loop.train(config, run, out))
    return run.path("adapter")


@pytest.mark.parametrize("tag", ["i4b32", "nf4b64", "i8c"])
def test_it_learns_on_packed_bits(new_run: Callable[..., Run], tiny_config: Config, tag: str, capfd: Any) -> None:
    from peft import PeftModel

    from edgepeft.backbone.load import quantized_model

    config, run = tiny_config.replace(format=tag), new_run(tag)
    capfd.readouterr()
    folder, splits = trained(config, run), load_splits(tiny_config)
    report = json.loads((folder / "training.json").read_text())
    assert report["test"]["accuracy"] >= 0.85
    assert report["labels"] == ["light_off", "light_on", "music"]
    assert [round(row["epoch"]) for row in report["epochs"]] == list(range(1, 11))
    assert min(report["peak_resident_bytes"] >> 20, report["samples_per_second"], report["seconds"]) > 0
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((run.folder / "logs").glob("events.*"))
    told = capfd.readouterr().err
    assert [line for line in told.splitlines() if not line.startswith("  ")] == [], "only our own lines"
    assert told.count("epoch ") == 11
    packed = quantized_model(run.path("quantized"), splits.labels, config)
    loaded = PeftModel.from_pretrained(packed, str(folder))
    again = loop.evaluate(loaded, config, splits.test)
    assert again == pytest.approx(report["test"])


def test_the_folder_is_a_peft_adapter_of_every_linear(new_run: Callable[..., Run], tiny_config: Config) -> None:
    run = new_run()
    folder = trained(tiny_config.replace(epochs=2), run)
    about = read_json(run.path("quantized") / "quantized.json")
    shapes = {layer["name"]: tuple(layer["shape"]) for layer in about["layers"] if layer["kind"] == "linear"}
    adapter = peft_files.read(folder, about["base_digest"], shapes, ["classifier"])
    assert adapter.modules == sorted(shapes)
    assert sorted(adapter.heads) == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]
    assert adapter.metadata["edgepeft.format"] == "i4b32"
    text = (folder / peft_files.SETTINGS).read_text()
    assert json.loads(text)["lora_alpha"] == 8.0
    assert str(run.folder) not in text
    assert str(Path(tiny_config.model).parent) not in text
    assert sorted(adapter.effect().modules) == adapter.modules, "none of them does nothing"


def test_equal_seeds_give_equal_bytes_and_others_do_not(new_run: Callable[..., Run], tiny_config: Config) -> None:
    config = tiny_config.replace(epochs=1)
    folders = [trained(config.replace(seed=seed), new_run(name=str(i))) for i, seed in enumerate((3, 3, 4))]
    one, two, other = ((folder / peft_files.TENSORS).read_bytes() for folder in folders)
    assert one == two != other


def test_only_the_adapter_and_the_head_are_trained(new_run: Callable[..., Run], tiny_config: Config) -> None:
    from edgepeft.backbone.load import quantized_model

    packed = quantized_model(new_run().path("quantized"), ("a", "b", "c"), tiny_config)
    names = {name for name, p in loop.adapted(packed, tiny_config).named_parameters() if p.requires_grad}
    assert {name for name in names if ".lora_A." not in name and ".lora_B." not in name} == {
        f"base_model.model.classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")
    }


def test_a_backbone_that_changes_is_noticed(new_run: Callable[..., Run], tiny_config: Config, monkeypatch: Any) -> None:
    real = watch.GuardedLoss.__call__

    def meddling(self: Any, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        model.base_model.model.bert.encoder.layer[0].output.dense.base_layer.qweight[0, 0, 0] += 1
        return real(self, outputs, labels)

    made = loop.adapted
    model: Any = None

    def keep(*args: Any) -> Any:
        nonlocal model
        model = made(*args)
        return model

    monkeypatch.setattr(loop, "adapted", keep)
    monkeypatch.setattr(watch.GuardedLoss, "__call__", meddling)
    with pytest.raises(RuntimeError, match="frozen backbone changed"):
        trained(tiny_config.replace(epochs=1, batch_size=72), new_run())


def test_a_backbone_that_could_be_trained_is_refused(tiny_config: Config, monkeypatch: Any) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    def loose(model: Any, settings: Any) -> Any:
        wrapped = real(model, settings)
        next(p for name, p in wrapped.named_parameters() if "LayerNorm" in name).requires_grad_(True)
        return wrapped

    real = peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", loose)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_config.model)
    with pytest.raises(RuntimeError, match=r"would be trained: .*LayerNorm"):
        loop.adapted(model, tiny_config)


def test_a_loss_that_is_not_finite_stops_with_a_way_out(new_run: Callable[..., Run], tiny_config: Config) -> None:
    with pytest.raises(
        EdgePeftError, match=r"training step \d+: expected a finite loss, found .*--learning-rate 1e\+29"
    ):
        trained(tiny_config.replace(learning_rate=1e30), new_run())


def test_an_interrupt_keeps_the_checkpoint(
    new_run: Callable[..., Run], tiny_config: Config, monkeypatch: Any, capsys: Any
) -> None:
    def interrupt(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt

    run, config = new_run(), tiny_config.replace(epochs=2)
    with monkeypatch.context() as patched:
        patched.setattr(watch.Sealer, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trained(config, run)
    assert "checkpoint of step 6 kept" in capsys.readouterr().err
    assert checkpoints.newest(run.folder / ".train.work") == 6
    trained(config, run)
    assert "going on from the checkpoint of step 6" in capsys.readouterr().err


def test_long_texts_are_cut_and_counted(
    new_run: Callable[..., Run], tiny_config: Config, tmp_path: Path, capsys: Any
) -> None:
    data = tiny_data(tmp_path / "long", "folder")
    rows = [{"text": "please " * 40, "label": "music"}, {"text": "turn on", "label": "light_on"}]
    write_rows(data / "validation.csv", rows)
    trained(tiny_config.replace(data=str(data), epochs=1), new_run())
    assert "validation: 1 of 2 texts are longer than 24 tokens and were cut" in capsys.readouterr().err


def test_more_tokens_than_positions_are_refused(new_run: Callable[..., Run], tiny_config: Config) -> None:
    with pytest.raises(ConfigError, match=r"--max-length: expected at most 64.*found 65"):
        trained(tiny_config.replace(max_length=65), new_run())


def test_logits_stand_in_the_order_of_the_split(tiny_config: Config) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_config.model, num_labels=3)
    texts = ("turn on the lamp in the hall please", "sing", "kill the light", "play a song in the attic now")
    together = loop.predict(model, tiny_config, Split(texts, (1, 2, 0, 2)))
    alone = [loop.predict(model, tiny_config, Split((text,), (0,)))[0] for text in texts]
    assert np.allclose(together, alone, atol=1e-5)
    assert loop.evaluate(model, tiny_config, Split(texts, (1, 2, 0, 2)))["examples"] == 4


def test_metrics_are_scikit_learns() -> None:
    from sklearn import metrics as sklearn

    chance = np.random.default_rng(0)
    logits, labels = chance.standard_normal((200, 5)).astype(np.float32), chance.integers(0, 4, 200)
    found = TASKS["text-classification"].metrics(logits, labels)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, logits.argmax(1)))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(labels, logits.argmax(1), average="macro"))
    assert found["loss"] == pytest.approx(sklearn.log_loss(labels, p, labels=range(5)), rel=1e-5)


def test_batches_hold_each_example_once_and_depend_on_seed_and_epoch_alone() -> None:
    lengths = np.random.default_rng(0).integers(3, 30, 101)
    first, again, later, other = (
        list(LengthBatches(lengths, 8, seed, lambda e=epoch: e)) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again
    assert first not in (later, other)
    assert sorted(i for batch in first for i in batch) == list(range(101))
    assert len(first) == len(LengthBatches(lengths, 8, 0, lambda: 0)) == 13
    padded = sum(lengths[batch].max() * len(batch) for batch in first)
    assert padded < 1.3 * lengths.sum()


def test_epoch_rows_average_the_loss_between_evaluations() -> None:
    figures = {"eval_accuracy": 0.5, "eval_macro_f1": 0.4}
    log = [{"loss": 2.0}, {"loss": 1.0}, {"eval_loss": 0.9, "epoch": 1, "step": 2, **figures}, {"train_runtime": 1}]
    assert watch.epoch_rows(log) == [
        {"epoch": 1, "step": 2, "train_loss": 1.5, "loss": 0.9, "accuracy": 0.5, "macro_f1": 0.4}
    ]


def test_the_peak_is_measured_anew_after_a_reset() -> None:
    big = np.ones(200 << 20, np.uint8)
    high = watch.peak_resident_bytes()
    del big
    watch.reset_peak_resident()
    low = watch.peak_resident_bytes()
    held = np.ones(64 << 20, np.uint8)
    assert low + (150 << 20) < high
    assert watch.peak_resident_bytes() > low + (50 << 20)
    assert held[-1] == 1


def test_every_tensor_of_the_best_checkpoint_is_shipped(new_run: Callable[..., Run], tiny_config: Config) -> None:
    run, config = new_run(), tiny_config.replace(epochs=3)
    folder = trained(config, run)
    report = json.loads((folder / "training.json").read_text())
    best = checkpoints.place(run.folder / ".train.work", report["best_step"]) / peft_files.TENSORS
    ours, theirs = read_tensors(folder / peft_files.TENSORS), read_tensors(best)
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert report["config"] == dataclasses.asdict(config)
