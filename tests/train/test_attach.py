"""An adapter that Hugging Face PEFT saved becomes a verified bundle, or is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import LABELS, conversations, tiny_bert, tiny_data, tiny_decoder, write_rows

from edgepeft import pipeline
from edgepeft.adapt import peft_files
from edgepeft.adapt.base import Base
from edgepeft.adapt.terms import PREFIX
from edgepeft.artifact import Run, read_json, read_tensors, write_tensors
from edgepeft.backbone.check import check_model
from edgepeft.backbone.load import resolve_model
from edgepeft.config import Config
from edgepeft.errors import EdgePeftError
from edgepeft.pipeline import STAGES, run_stage, stage_named
from edgepeft.runtime import load
from edgepeft.train.attach import in_order, row_order

HEADS = ("classifier",)


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
    write_tensors(tmp_path / peft_files.TENSORS, tensors)
    found = in_order(tensors, row_order(tmp_path, ["a", "b"], HEADS), HEADS)
    assert found["base_model.model.classifier.weight"].tolist() == [[2.0], [1.0]]


DECODERS = {  # how they are made: flavour of the model, settings
    "dora": ("qwen2", {"use_dora": True, "target_modules": "all-linear"}),
    "tied": ("llama3", {"ensure_weight_tying": True, "target_modules": ["q_proj", "embed_tokens"]}),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_foreign_decoder_adapter_becomes_a_bundle(tmp_path: Path, name: str) -> None:
    """It is verified against PEFT on the way."""
    flavour, settings = DECODERS[name]
    model = tiny_decoder(tmp_path / "model", flavour)
    data = write_rows(tmp_path / "chats.jsonl", conversations(40))
    adapter = saved(model, tmp_path / "adapter", "AutoModelForCausalLM", "CAUSAL_LM", r=4, **settings)
    if name == "tied":
        assert f"{PREFIX}lm_head.lora_A.weight" in read_tensors(adapter / peft_files.TENSORS), "PEFT adapts it as well"
    config = Config(
        model=str(model), data=str(data), task="text-generation", adapter_from=str(adapter), max_length=64,
        output=str(tmp_path / "out"),
    )  # fmt: skip
    model = load(build(config))
    answers = [model.generate("turn off", max_new_tokens=8, adapter=name).text for name in ("default", "none")]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_a_prompt_is_judged_before_there_is_a_base(tmp_path: Path, kind: str) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    folder = tiny_decoder(tmp_path / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapter = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    adapter.save_pretrained(str(tmp_path / "adapter"))
    data = write_rows(tmp_path / "chats.jsonl", conversations(40))
    given = {"model": str(folder), "data": str(data), "task": "text-generation", "max_length": 64}
    pipeline.open_inputs(Config(**given, adapter_from=str(tmp_path / "adapter")))
    wider = tiny_decoder(tmp_path / "wider", "llama", hidden_size=128)
    with pytest.raises(EdgePeftError, match="prompt_embeddings is for"):
        pipeline.open_inputs(Config(**{**given, "model": str(wider)}, adapter_from=str(tmp_path / "adapter")))


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
    head = {"base_model.model.classifier.weight": np.zeros((3, 4), np.float32)}
    write_tensors(tmp_path / peft_files.TENSORS, head)
    with pytest.raises(EdgePeftError, match=match):
        row_order(tmp_path, sorted(LABELS), HEADS)


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


def odd_copy(adapter: Path, place: Path, labels: bool = True, **changes) -> Path:
    """The adapter with other settings, a value that is none, and a pair that does not fit the model."""
    tensors = {name: np.array(value) for name, value in read_tensors(adapter / peft_files.TENSORS).items()}
    a, b = (next(name for name in tensors if ending in name) for ending in ("value.lora_A", "query.lora_B"))
    tensors[a][0, 0], tensors[b] = np.nan, tensors[b][:-8]
    peft_files.write(place, {**read_json(adapter / peft_files.SETTINGS), **changes}, tensors, "", "")
    write_tensors(place / peft_files.TENSORS, tensors, {"format": "pt"})
    if labels:
        (place / "labels.json").write_text((adapter / "labels.json").read_text())
    return place


def test_a_build_tells_all_that_is_wrong_before_it_makes_a_folder(encoder, tmp_path: Path) -> None:
    model, data, adapter = encoder
    odd = odd_copy(adapter, tmp_path / "odd", labels=False, use_frob=True)
    config = Config(model=str(model), data=str(data), adapter_from=str(odd), output=str(tmp_path / "out"))
    with pytest.raises(EdgePeftError) as caught:
        pipeline.build(config)
    told = str(caught.value)
    reasons = ("use_frob = True", "hold NaN", "the base's linear is [64, 64]", "does not say which label")
    assert [reason for reason in reasons if reason not in told] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flavour", ["llama", "llama3"])  # a head of its own, and a tied one
def test_what_will_be_packed_is_known_before(tmp_path: Path, flavour: str) -> None:
    """The base that is planned has the modules, shapes and float tensors of the one that is packed."""
    model = tiny_decoder(tmp_path / "model", flavour)
    given = {"model": str(model), "data": "x.jsonl", "task": "text-generation", "output": str(tmp_path / "out")}
    for config in (Config(**given), Config(**given, embedding_format="float")):
        run = Run(tmp_path / "out" / config.embedding_format)
        run_stage(stage_named("quantize"), config, run)
        packed, source = Base.open(run.path("quantized")), resolve_model(config)
        planned = Base.planned(source, check_model(source), config)
        assert planned.digest == packed.digest
        for part in ("linears", "embeddings"):
            assert getattr(planned, part) == getattr(packed, part)
        assert planned.floats() == packed.floats()
        for module in packed.linears:
            error = planned.weight(module) - packed.weight(module)
            assert np.linalg.norm(error) <= 0.15 * np.linalg.norm(packed.weight(module))


def test_another_models_adapter_is_refused(encoder, tmp_path: Path) -> None:
    _, data, adapter = encoder
    other = tiny_bert(tmp_path / "model", hidden=128)
    config = Config(model=str(other), data=str(data), adapter_from=str(adapter), output=str(tmp_path / "out"))
    run = Run(tmp_path / "out")
    run_stage(stage_named("quantize"), config, run)
    with pytest.raises(EdgePeftError, match=r"the base's linear is \[128, 128\]"):
        run_stage(stage_named("train"), config, run)
