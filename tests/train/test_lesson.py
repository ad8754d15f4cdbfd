"""Learning from a teacher: the loss is the stated one, the teacher's words reach the right rows, others are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import LABELS, tiny_bert, tiny_decoder

from edgepeft.adapt import peft_files
from edgepeft.artifact import Run, read_tensors
from edgepeft.config import Config
from edgepeft.errors import ArtifactError, ConfigError, ModelError
from edgepeft.train import lesson, loop, losses, teacher
from edgepeft.train.data import load_splits
from edgepeft.train.lesson import Lesson
from edgepeft.train.tasks import TASKS
from tests import models

NewRun = Callable[..., Run]
HIDDEN, VOCABULARY, TOKENS = 16, 50, 23


def trained(config: Config, run: Run) -> Path:
    run.make("adapter", run.key, lambda out: loop.train(config, run, out))
    return run.path("adapter")


def weights(folder: Path) -> bytes:
    return (folder / peft_files.TENSORS).read_bytes()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_the_loss_of_tokens_is_the_stated_one(
    softcap: float, weight: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", at_once * VOCABULARY * losses.FLOAT_BYTES)
    torch.manual_seed(0)
    own, theirs = torch.nn.Linear(HIDDEN, VOCABULARY, False), torch.nn.Linear(24, VOCABULARY, False)
    h, said = torch.randn(TOKENS, HIDDEN).mul_(4).requires_grad_(True), torch.randn(TOKENS, 24).mul(4).half()
    target, scale = torch.randint(VOCABULARY, (TOKENS,)), torch.rand(TOKENS)
    about = Lesson(
        TASKS["text-generation"],
        weight,
        2.5,
        0.0,
        (),
        np.zeros(1),
        np.zeros(1),
        None,
        theirs.requires_grad_(False),
        5.0,
    )
    z = h @ own.weight.detach().T
    z = softcap * torch.tanh(z / softcap) if softcap else z
    t = 5.0 * torch.tanh(theirs(said.float()) / 5.0)
    kl = torch.nn.functional.kl_div(
        (z / 2.5).log_softmax(-1), (t / 2.5).log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    wanted = (1 - weight) * torch.nn.functional.cross_entropy(z, target, reduction="none") + weight * 2.5**2 * kl
    (slope,) = torch.autograd.grad(wanted @ scale, h)
    found, hits = losses.token_losses(h, own, target, softcap, lesson.taught_score(about, said))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found @ scale, h)[0], slope, rtol=1e-3, atol=1e-5)
    assert torch.equal(hits, z.argmax(-1) == target)
    torch.testing.assert_close(lesson.divergence(z, t, 2.5), 2.5**2 * kl, rtol=1e-4, atol=1e-5)


def test_layers_are_matched_by_depth() -> None:
    assert teacher.matched_layers(6, 6) == [(2, 2), (3, 3), (5, 5), (6, 6)]
    assert teacher.matched_layers(2, 12) == [(1, 6), (2, 12)]
    assert teacher.matched_layers(12, 3) == [(4, 1), (8, 2), (12, 3)]


# --- what was said reaches its rows ---------------------------------------------------------------------------------


def lesson_of(config: Config, run: Run, tmp_path: Path) -> tuple[Lesson, Any, list[dict[str, Any]], Any]:
    """Return (lesson, the float model, training rows, tokenizer) of `--teacher self`."""
    splits, tokenizer = load_splits(config), loop.load_tokenizer(run.path("quantized"))
    student = loop._packed_model(run.path("quantized"), splits, config)
    rows = splits.train.encode(tokenizer, config.max_length, "train")
    if TASKS[config.task].packs:
        rows = loop.pack(rows, config.max_length, config.seed)
    work = tmp_path / "work"
    work.mkdir()
    found = teacher.lesson_for(student, rows, splits, tokenizer, config, work)
    return found, teacher.float_model(loop_source(config), splits.labels, config).eval(), rows, tokenizer


def loop_source(config: Config) -> Any:
    from edgepeft.backbone.load import resolve_model

    return resolve_model(config)


def test_a_classifier_hears_what_was_said_about_its_texts(new_run: NewRun, tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config.replace(teacher="self", lesson_hidden=1.0)
    found, model, rows, tokenizer = lesson_of(config, new_run(), tmp_path)
    assert found.weight == 0.0, "a backbone has no classes to teach"
    chosen = [5, 0, 17]
    batch = found.collate([found.numbered(rows)[i] for i in chosen], tokenizer.pad_token_id)
    said, wanted = batch.pop("lesson"), batch["attention_mask"].bool()
    batch.pop("labels")
    states = model(**batch, output_hidden_states=True).hidden_states
    assert found.layers == (1, 2)
    for i, layer in enumerate(found.layers):
        torch.testing.assert_close(said["hidden"][:, i].float(), states[layer][wanted], rtol=1e-2, atol=1e-2)
    assert lesson.hidden_error(found, states, wanted, said["hidden"]).max() < 1e-5
    assert "lesson" not in found.collate(rows[:2], tokenizer.pad_token_id)


def test_a_language_model_hears_what_was_said_about_its_targets(
    new_chat_run: NewRun, brief_config: Config, tmp_path: Path
) -> None:
    """A student that is its own teacher has nothing to learn."""
    config = brief_config.replace(teacher="self", lesson_hidden=2.0, lesson_weight=1.0)
    found, model, rows, tokenizer = lesson_of(config, new_chat_run(), tmp_path)
    wrapped = loop.adapted(model, config).eval()
    task = TASKS[config.task]
    batch = found.collate([found.numbered(rows)[i] for i in (3, 1)], tokenizer.pad_token_id)
    with task.answering(wrapped), task.taught(wrapped, found):
        taught = wrapped(**{n: t for n, t in batch.items() if n != "labels"})[0]
        plain = wrapped(**{n: t for n, t in batch.items() if n not in ("labels", "lesson")})[0]
    assert (taught[:, 0] / taught[:, 1]).abs().max() < 1e-4
    assert (plain[:, 0] / plain[:, 1]).min() > 1
    torch.testing.assert_close(taught[:, 1:], plain[:, 1:])
    assert "forward" not in vars(model)


# --- training -------------------------------------------------------------------------------------------------------


def test_a_tuned_teacher_speaks_before_the_student_learns(new_run: NewRun, tiny_config: Config, capfd: Any) -> None:
    config, run = tiny_config.replace(teacher="tuned", epochs=6), new_run()
    capfd.readouterr()
    folder = trained(config, run)
    told = capfd.readouterr().err
    assert told.index("the teacher: the same training") < told.index("the student:")
    said = np.load(run.folder / ".train.work" / "lesson" / lesson.ANSWERS)
    labels = np.asarray(load_splits(config).train.labels)
    assert said.shape == (len(labels), len(LABELS))
    assert np.mean(said.argmax(1) == labels) > 0.9, "the teacher's words lie with the wrong texts"
    assert json.loads((folder / "training.json").read_text())["test"]["accuracy"] > 0.7


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_a_backbone_drops_nothing_while_hidden_states_are_taught(
    hidden: float, new_run: NewRun, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config.replace(teacher="tuned", lesson_hidden=hidden, dropout=0.25, epochs=1)
    quantized, splits = new_run().path("quantized"), load_splits(config)
    model = loop.adapted(loop._packed_model(quantized, splits, config), config)
    tokenizer = loop.load_tokenizer(quantized)
    rows = splits.train.encode(tokenizer, config.max_length)
    found = teacher.lesson_for(model, rows, splits, tokenizer, config, tmp_path)

    def dropped() -> dict[str, float]:
        return {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}

    before = dropped()
    backbone = {name for name in before if ".bert." in name and "lora" not in name}
    assert {before[name] for name in backbone} == {0.1}
    with lesson.taught_classes(model, found):
        assert dropped() == before | (dict.fromkeys(backbone, 0.0) if hidden else {})
    assert dropped() == before


def test_hidden_states_are_followed(new_run: NewRun, tiny_config: Config) -> None:
    config = tiny_config.replace(teacher="self", lesson_hidden=10.0, epochs=2)
    assert weights(trained(config, new_run())) != weights(trained(config.replace(teacher="none"), new_run(name="b")))


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2, "checkpointing": True, "lesson_hidden": 1.0}])
def test_a_language_model_learns_the_words_of_its_float_self(
    new_chat_run: NewRun, chat_config: Config, changes: dict[str, Any]
) -> None:
    """With no share of the labels the loss is the divergence alone, which quantization made and training lowers."""
    config = chat_config.replace(teacher="self", lesson_weight=1.0, epochs=2, learning_rate=3e-3, **changes)
    run = new_chat_run()
    rows = json.loads((trained(config, run) / "training.json").read_text())["epochs"]
    assert rows[1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert (run.folder / ".train.work" / "lesson" / lesson.HEAD).exists()


def test_a_lesson_is_heard_once_and_training_goes_on_with_it(
    new_run: NewRun, tiny_config: Config, monkeypatch: Any
) -> None:
    config, run = tiny_config.replace(teacher="tuned", epochs=1), new_run()
    first = weights(trained(config, run))

    def never(*_: Any) -> Any:
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr(teacher, "_teacher", never)
    assert weights(trained(config, run)) == first


# --- teachers of other folders --------------------------------------------------------------------------------------


def classifier(folder: Path, labels: tuple[str, ...], **changes: Any) -> Path:
    """Write a random BERT with a head over `labels`, on the tokenizer of the tests."""
    from transformers import AutoModelForSequenceClassification

    tiny_bert(folder, **changes)
    names = dict(enumerate(labels))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels), id2label=names)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    return folder


def followed(config: Config, run: Run, said: np.ndarray) -> float:
    """Return the mean KL from what a teacher said about the training texts to what a student says after training."""
    from peft import PeftModel

    from edgepeft.backbone.load import quantized_model

    folder, splits = trained(config, run), load_splits(config)
    model = PeftModel.from_pretrained(quantized_model(run.path("quantized"), splits.labels, config), str(folder))
    found = loop.predict(model, config, splits.train)
    return float(lesson.divergence(torch.from_numpy(found), torch.from_numpy(said), 1.0).mean())


def test_a_larger_teacher_with_its_labels_in_another_order(
    new_run: NewRun, tiny_config: Config, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    place = classifier(tmp_path / "big", ("music", "other", "light_on", "light_off"), hidden=128, layers=3)
    config, run = tiny_config.replace(teacher=str(place), epochs=4, lesson_weight=1.0), new_run()
    trained(config, run)
    said = np.load(run.folder / ".train.work" / "lesson" / lesson.ANSWERS)
    model = AutoModelForSequenceClassification.from_pretrained(place)
    logits = loop.predict(model, config, load_splits(config).train)
    np.testing.assert_allclose(said, logits[:, [3, 2, 0]], atol=1e-4)
    assert followed(config, run, said) < 0.5 * followed(config.replace(teacher="none"), new_run(name="plain"), said)
    with pytest.raises(ConfigError, match=r"64 numbers per hidden state, found 128.*--lesson-hidden 0"):
        trained(config.replace(lesson_hidden=1.0), new_run(name="hidden"))


def test_teachers_that_cannot_teach_are_refused(new_run: NewRun, tiny_config: Config, tmp_path: Path) -> None:
    strange = classifier(tmp_path / "strange", ("light_on", "light_off"))
    headless = models.settings(tiny_bert(tmp_path / "headless"), id2label=dict(enumerate(LABELS)))
    decoder = tiny_decoder(tmp_path / "decoder")
    tokens = classifier(tmp_path / "tokens", LABELS)
    words = json.loads((tokens / "tokenizer.json").read_text())
    words["model"]["vocab"]["elsewhere"] = len(words["model"]["vocab"])
    (tokens / "tokenizer.json").write_text(json.dumps(words))
    cases: list[tuple[str, type[Exception], str]] = [
        ("self", ConfigError, r"a backbone knows no classes.*--lesson-hidden 1"),
        (str(tmp_path / "nothing"), ConfigError, "expected none, self, tuned or a model folder"),
        (str(strange), ModelError, "lacks 1 of 3: music"),
        (str(headless), ModelError, "trained head, found no classifier"),
        (str(decoder), ConfigError, "text-generation"),
        (str(tokens), ModelError, "another vocabulary"),
    ]
    for i, (name, error, words) in enumerate(cases):
        with pytest.raises(error, match=words):
            trained(tiny_config.replace(teacher=name), new_run(name=str(i)))


def test_a_backbone_that_changed_since_it_was_quantized_teaches_nothing(
    new_run: NewRun, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config.replace(teacher="tuned", model=str(tiny_bert(tmp_path / "other", seed=9)))
    with pytest.raises(ArtifactError, match="expected the weights that were quantized"):
        trained(config, new_run())


def test_the_teacher_is_no_part_of_what_is_shipped(new_run: NewRun, tiny_config: Config) -> None:
    plain, taught = (
        read_tensors(trained(tiny_config.replace(epochs=1, teacher=name), new_run(name=name)) / peft_files.TENSORS)
        for name in ("none", "tuned")
    )
    assert {n: t.shape for n, t in plain.items()} == {n: t.shape for n, t in taught.items()}
