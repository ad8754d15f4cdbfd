"""An adapter that Hugging Face PEFT saved becomes a verified bundle, or is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import LABELS, conversations, tiny_bert, tiny_data, tiny_decoder, write_rows

from edgepeft.artifact import Run
from edgepeft.config import Config
from edgepeft.errors import EdgePeftError
from edgepeft.pipeline import STAGES, run_stage, stage_named
from edgepeft.runtime import load
from edgepeft.train.attach import in_order


def saved(model: Path, folder: Path, auto: str, task: str, **settings) -> Path:
    """A random LoRA of a float model, saved by PEFT alone; settings with an `edgepeft` key anywhere are none of its."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    labels = {"num_labels": len(LABELS)} if task == "SEQ_CLS" else {}
    base = getattr(transformers, auto).from_pretrained(model, **labels)
    peft = get_peft_model(base, LoraConfig(task_type=task, init_lora_weights=False, **settings))
    for name, parameter in peft.named_parameters():
        if "classifier" in name and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    peft.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, data, and an adapter whose head has its labels in another order than the data's."""
    place = tmp_path_factory.mktemp("encoder")
    model = tiny_bert(place / "model")
    adapter = saved(
        model, place / "adapter", "AutoModelForSequenceClassification", "SEQ_CLS", r=4, use_rslora=True,
        target_modules=["query", "value"], rank_pattern={"value": 2},
    )  # fmt: skip
    (adapter / "labels.json").write_text(json.dumps(["music", "light_off", "light_on"]))
    return model, tiny_data(place / "data", "folder"), adapter


def build(config: Config) -> Path:
    """Do every stage; return the bundle."""
    run = Run(Path(config.output))
    for stage in STAGES:
        if stage.applies(config):
            run_stage(stage, config, run)
    return run.path("bundle")


def test_a_foreign_classifier_becomes_a_bundle(encoder, tmp_path: Path) -> None:
    import torch
    import transformers
    from peft import PeftModel

    model, data, adapter = encoder
    config = Config(
        model=str(model), data=str(data), format="i8c", adapter_from=str(adapter), output=str(tmp_path / "out")
    )
    text, bundle = "turn off the lamp in the kitchen", build(config)
    found = load(bundle, activation="float").classify(text)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    tokens = transformers.AutoTokenizer.from_pretrained(model)(text, return_tensors="pt")
    with torch.inference_mode():
        wanted = PeftModel.from_pretrained(base, str(adapter)).eval()(**tokens).logits[0].softmax(-1).numpy()
    scores = dict(zip(["music", "light_off", "light_on"], wanted, strict=True))
    assert {label: pytest.approx(score, abs=0.03) for label, score in scores.items()} == found.scores
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["method"] == "lora"


def test_an_adapter_that_was_trained_here_brings_its_labels(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"labels": ["b", "a"]}))
    tensors = {"base_model.model.classifier.weight": np.array([[1.0], [2.0]], np.float32)}
    found = in_order(tensors, ["a", "b"], ("classifier",), tmp_path)
    assert found["base_model.model.classifier.weight"].tolist() == [[2.0], [1.0]]


def test_a_foreign_decoder_adapter_becomes_a_bundle(tmp_path: Path) -> None:
    model = tiny_decoder(tmp_path / "model", "qwen2")
    data = write_rows(tmp_path / "chats.jsonl", conversations(40))
    adapter = saved(model, tmp_path / "adapter", "AutoModelForCausalLM", "CAUSAL_LM", r=4, use_dora=True,
                    target_modules="all-linear")  # fmt: skip
    config = Config(
        model=str(model), data=str(data), task="text-generation", adapter_from=str(adapter), max_length=64,
        output=str(tmp_path / "out"),
    )  # fmt: skip
    model = load(build(config))
    answers = [model.generate("turn off", max_new_tokens=8, adapter=name).text for name in ("default", "none")]
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (None, "does not say which label each one is"),
        (["music", "light_off"], "expected the 3 labels"),
        (["music", "light_off", "other"], "found music, light_off, other"),
        (["music", "music", "light_on"], "each one once"),
        ({"a": 1}, "expected a list"),
    ],
)
def test_labels_are_never_guessed(tmp_path: Path, labels, match: str) -> None:
    if labels is not None:
        (tmp_path / "labels.json").write_text(json.dumps(labels))
    tensors = {"base_model.model.classifier.weight": np.zeros((3, 4), np.float32)}
    with pytest.raises(EdgePeftError, match=match):
        in_order(tensors, sorted(LABELS), ("classifier",), tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "OFT"}, "peft_type 'OFT' is not supported"),
        ({"use_qalora": True, "use_dora": True}, "use_qalora"),
        ({"use_qalora": True}, "the base's linear is"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "changed the base weights"),
    ],
)
def test_what_is_not_exact_is_refused_and_leaves_nothing(encoder, tmp_path: Path, changes, match: str) -> None:
    model, data, adapter = encoder
    own = tmp_path / "adapter"
    own.mkdir()
    for path in adapter.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    settings = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    config = Config(model=str(model), data=str(data), adapter_from=str(own), output=str(tmp_path / "out"))
    run = Run(tmp_path / "out")
    run_stage(stage_named("quantize"), config, run)
    with pytest.raises(EdgePeftError, match=match):
        run_stage(stage_named("train"), config, run)
    assert not run.path("adapter").exists()


def test_another_models_adapter_is_refused(encoder, tmp_path: Path) -> None:
    _, data, adapter = encoder
    other = tiny_bert(tmp_path / "model", hidden=128)
    config = Config(model=str(other), data=str(data), adapter_from=str(adapter), output=str(tmp_path / "out"))
    run = Run(tmp_path / "out")
    run_stage(stage_named("quantize"), config, run)
    with pytest.raises(EdgePeftError, match=r"the base's linear is \[128, 128\]"):
        run_stage(stage_named("train"), config, run)
