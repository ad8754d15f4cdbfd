"""Bundles whose adapters stand before the text: they answer as PEFT does, and live beside adapters of other kinds."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import LABELS, tiny_bert, tiny_decoder

from edgepeft.adapt import layers, peft_files
from edgepeft.adapt.doctor import diagnose
from edgepeft.artifact import Run, read_json, read_tensors, write_json, write_tensors
from edgepeft.backbone.load import quantized_model
from edgepeft.config import Config
from edgepeft.deploy import adapters as da
from edgepeft.errors import ArtifactError
from edgepeft.export import webgpu
from edgepeft.runtime import load
from tests.deploy.test_adapters import finish
from tests.export.tiny_run import random_adapter

TEXTS, PROMPT = ["turn off the lamp", "play a song in the attic now", "kill the light"], "turn on the"
NUMBERS = {"num_layers": 2, "num_transformer_submodules": 1, "inference_mode": True, "base_model_name_or_path": "tiny"}
KINDS = {"prompt": "PROMPT_TUNING", "p-tuning": "P_TUNING", "prefix": "PREFIX_TUNING"}
Build = Callable[..., Run]


def write_prompt(run: Run, kind: str, rows: int, seed: int, classes: bool) -> None:
    """Write a random adapter of `rows` rows, as a training would have left it."""
    about, rng = read_json(run.path("quantized") / "quantized.json"), np.random.default_rng(seed)
    heads, width = (4, 64) if classes or kind != "prefix" else (2, 32)
    numbers = {**NUMBERS, "num_virtual_tokens": rows, "num_attention_heads": heads, "token_dim": width}
    tensors = {"prompt_embeddings": rng.standard_normal((rows, width * (4 if kind == "prefix" else 1)), np.float32)}
    if classes:
        tensors["base_model.classifier.weight"] = rng.standard_normal((len(LABELS), 64), np.float32)
        tensors["base_model.classifier.bias"] = rng.standard_normal(len(LABELS), np.float32)
    more = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]} if classes else {"task_type": "CAUSAL_LM"}
    settings = {"peft_type": KINDS[kind], **numbers, **more}
    peft_files.write(run.path("adapter"), settings, tensors, about["base_digest"], about["format"])


def builder(place: Path, config: Config, classes: bool) -> Build:
    """Return a function that gives the build of a kind of adapter on one packed model, made once."""
    from edgepeft.quant.stage import quantize

    first = Run(place / "first")
    first.make("quantized", "", lambda out: quantize(config, first, out))

    def build(kind: str, rows: int = 5, seed: int = 0) -> Run:
        run = Run(place / f"{kind}-{rows}-{seed}")
        if not run.folder.exists():
            shutil.copytree(first.path("quantized"), run.path("quantized"))
            if kind == "lora":
                random_adapter(run, run.path("adapter"))
            else:
                write_prompt(run, kind, rows, seed, classes)
            write_json(run.folder / "run.json", {"version": 1, "stages": {}})
            finish(config, run, list(LABELS) if classes else [])
        return run

    return build


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Build:
    place = tmp_path_factory.mktemp("classifiers")
    return builder(place, Config(model=str(tiny_bert(place / "model")), data="none.csv", threads=1), True)


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Build:
    place = tmp_path_factory.mktemp("writers")
    model = str(tiny_decoder(place / "model"))
    config = Config(model=model, data="none.jsonl", task="text-generation", context=64, threads=1)
    return builder(place, config, False)


def peft(run: Run, task: str, folder: Path | None = None) -> Any:
    """Return the packed model with an adapter as PEFT loads it."""
    labels = LABELS if task == "text-classification" else []
    model = quantized_model(run.path("quantized"), labels, Config(task=task))
    return layers.load(model, folder or run.path("bundle") / "adapters" / "default").eval()


def copied(run: Run, place: Path) -> Path:
    return Path(shutil.copytree(run.path("bundle"), place / "bundle"))


# --- classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_answers_as_peft_does(classifiers: Build, kind: str) -> None:
    import torch

    run = classifiers(kind)
    model = load(run.path("bundle"), threads=1, activation="float")
    ((_, arrays),) = model.tokens.batches(TEXTS, 8)
    with torch.inference_mode():
        wanted = peft(run, "text-classification")(**{n: torch.from_numpy(a) for n, a in arrays.items()}).logits.numpy()
    assert np.abs(model.run(arrays) - wanted).max() <= 1e-4


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_others_live_beside_a_prompt(classifiers: Build, kind: str, tmp_path: Path) -> None:
    bundle = copied(classifiers(kind), tmp_path)
    for name, run in {
        "lora": classifiers("lora"),
        "short": classifiers(kind, 3, 1),
        "same": classifiers(kind, 5, 2),
    }.items():
        da.add(bundle, run.folder, name)
        own = load(run.path("bundle"), threads=1).logits(TEXTS)
        np.testing.assert_allclose(load(bundle, threads=1).logits(TEXTS, name), own, atol=1e-6)
    model = load(bundle, threads=1)
    names = ["same", "default", "lora", "short", "default", "lora"]
    together = [found.scores for found in model.classify([*TEXTS, *TEXTS], adapter=names)]
    alone = [model.classify(text, adapter=name).scores for text, name in zip([*TEXTS, *TEXTS], names, strict=True)]
    assert all(a[key] == pytest.approx(b[key], abs=1e-6) for a, b in zip(together, alone, strict=True) for key in a)
    assert model.prompt("short") == 3


@pytest.mark.parametrize("kind", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_prompts_of_any_length_and_none_are_the_same_on_a_gpu(
    gpu, classifiers: Build, kind: str, tmp_path: Path
) -> None:
    bundle = copied(classifiers(kind), tmp_path)
    for name, run in {"lora": classifiers("lora"), "short": classifiers(kind, 3, 1)}.items():
        da.add(bundle, run.folder, name)
    webgpu.write(bundle)
    cpu = load(bundle, threads=1, library="none", check="quick")
    found = load(bundle, device="webgpu", check="quick")
    for name in ("default", "short", "lora", "none"):
        wanted = cpu.logits(TEXTS, name)
        assert np.abs(found.logits(TEXTS, name) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_what_has_no_place_is_named(classifiers: Build, tmp_path: Path) -> None:
    bundle = copied(classifiers("lora"), tmp_path)
    with pytest.raises(ArtifactError, match="the graph has no place for it"):
        da.add(bundle, classifiers("prompt").folder, "p")
    bundle = copied(classifiers("prompt"), tmp_path / "two")
    with pytest.raises(ArtifactError, match="its prompt of 33 and a text of 32 tokens take more than the 64 positions"):
        da.add(bundle, classifiers("prompt", 33).path("adapter"), "long", trust_base=True)
    assert load(bundle).adapters == ["default"]


# --- writers ---------------------------------------------------------------------------------------------------------


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    import torch

    found: list[int] = []
    with torch.inference_mode():
        while len(found) < count and 2 not in found:
            found.append(int(model(input_ids=torch.tensor([[*ids, *found]])).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_says_what_peft_says(writers: Build, kind: str) -> None:
    run = writers(kind)
    model = load(run.path("bundle"), threads=1, activation="float")
    wanted = greedy(peft(run, "text-generation"), model.encode(PROMPT), 12)
    assert model.generate(PROMPT, max_new_tokens=12).tokens == wanted
    assert model.generate(PROMPT, max_new_tokens=12, adapter="none").tokens != wanted


def test_what_comes_with_a_prompt_and_what_does_not(writers: Build) -> None:
    bundle = writers("prompt").path("bundle")
    assert not (bundle / "genai_config.json").exists()
    assert "GenAI has no place" in (bundle / "README.md").read_text()
    said = subprocess.run(
        [sys.executable, str(bundle / "sample.py"), PROMPT], capture_output=True, text=True, check=True
    )
    answer = load(bundle, threads=1).generate(PROMPT, max_new_tokens=64)
    assert answer.text
    assert answer.text in said.stdout
    settings = read_json(bundle / "adapters" / "default" / "adapter_config.json")
    assert (settings["peft_type"], settings["num_virtual_tokens"]) == ("PROMPT_TUNING", 5)


def test_prompts_of_any_kind_share_a_bundle(writers: Build, tmp_path: Path) -> None:
    bundle = copied(writers("prompt"), tmp_path)
    other = writers("prefix", 9, 1)
    da.add(bundle, other.folder, "prefix")
    bare = tmp_path / "bare"  # as PEFT itself saves it
    bare.mkdir()
    shutil.copy(other.path("adapter") / "adapter_config.json", bare)
    write_tensors(
        bare / "adapter_model.safetensors", dict(read_tensors(other.path("adapter") / peft_files.TENSORS)), {}
    )
    added = da.add(bundle, bare, "bare", trust_base=True)
    assert da.size_text(added).startswith("prefix_tuning, 9 prompt tokens, ")
    assert [(entry["rank"], entry["prompt_tokens"] > 0) for entry in da.entries(bundle)] == [(0, True)] * 3
    model = load(bundle, threads=1)
    wanted = load(other.path("bundle"), threads=1).generate(PROMPT, max_new_tokens=9).tokens
    rows = model.generate([PROMPT] * 4, adapter=["default", "prefix", "none", "bare"], max_new_tokens=9)
    assert [rows[1].tokens, rows[3].tokens] == [wanted, wanted]
    assert rows[0].tokens == load(writers("prompt").path("bundle"), threads=1).generate(PROMPT, max_new_tokens=9).tokens
    assert not list(bundle.rglob("*.onnx_adapter"))
    shutil.copy(writers("prompt").path("adapter") / "adapter_config.json", bare)
    tensors = dict(read_tensors(writers("prompt").path("adapter") / peft_files.TENSORS))
    write_tensors(bare / "adapter_model.safetensors", tensors, {})
    with pytest.raises(ArtifactError, match="the packed base was not given"):
        da.add(bundle, bare, "rows", trust_base=True)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_doctor_knows_what_fits(writers: Build, kind: str, tmp_path: Path) -> None:
    folder = writers(kind).path("adapter")
    for base in (writers("prompt").path("bundle"), writers("prompt").folder):
        report = diagnose(folder, base)
        assert (report.usable, report.as_dict()["method"]) == (True, KINDS[kind].lower())
    other = tiny_decoder(tmp_path / "other", hidden_size=128, num_attention_heads=8, num_key_value_heads=4)
    found = diagnose(folder, other)
    assert not found.usable
    assert "prompt_embeddings is for" in found.text()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_virtual_tokens": 4}, r"prompt_embeddings is \[5, 64\], its settings say \[4, 64\]"),
        ({"token_dim": None}, "token_dim should be a whole number above 0, found None"),
        ({"num_transformer_submodules": 2}, "of a model with two halves"),
        ({"peft_type": "CPT"}, "peft_type 'CPT' is not supported"),
    ],
)
def test_settings_that_do_not_fit_are_refused(writers: Build, change: dict, what: str, tmp_path: Path) -> None:
    shutil.copytree(writers("prompt").path("adapter"), tmp_path / "a")
    settings = read_json(tmp_path / "a" / "adapter_config.json")
    write_json(tmp_path / "a" / "adapter_config.json", {**settings, **change})
    with pytest.raises(ArtifactError, match=what):
        peft_files.read(tmp_path / "a")
