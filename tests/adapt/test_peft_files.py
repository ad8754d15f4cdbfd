"""An adapter folder is read exactly or refused; what is written means the same to PEFT and to us."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import tiny_bert

from edgepeft.adapt import peft_files
from edgepeft.adapt.methods import PREFIX
from edgepeft.artifact import read_tensors, tensor_header, write_json, write_tensors
from edgepeft.errors import ArtifactError

BASE = "ab" * 32
HEAD = {f"{PREFIX}classifier.weight": np.ones((3, 64), np.float32), f"{PREFIX}classifier.bias": np.ones(3, np.float32)}


def adapter(folder: Path, rank: int = 4, tensors: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Write an adapter of one module as PEFT would."""
    chance = np.random.default_rng(0)
    pair = {
        f"{PREFIX}layer.0.query.lora_A.weight": chance.standard_normal((rank, 64)).astype(np.float32),
        f"{PREFIX}layer.0.query.lora_B.weight": chance.standard_normal((32, rank)).astype(np.float32),
    }
    base = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "modules_to_save": ["classifier"], "bias": "none"}
    peft_files.write(folder, {**base, **settings}, {**pair, **HEAD, **(tensors or {})}, BASE, "i4b32")
    return folder


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    read = peft_files.read(adapter(tmp_path), BASE, {"layer.0.query": (32, 64)}, ["classifier"])
    assert read.modules == ["layer.0.query"]
    assert read.scale("layer.0.query") == 2.0
    assert sorted(read.heads) == sorted(HEAD)
    assert read.metadata["edgepeft.format"] == "i4b32"


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = (adapter(tmp_path / name, target_modules={"b", "a", "c"}) for name in "xy")
    for name in (peft_files.SETTINGS, peft_files.TENSORS):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"query": 12}}, 3.0),
        ({"alpha_pattern": {"uery": 12}}, 2.0),
        ({"alpha_pattern": {r"layer\.\d+\.query": 6, "query": 12}}, 1.5),
        ({"r": 16, "lora_alpha": 16, "rank_pattern": {"query": 4}}, 4.0),
    ],
)
def test_the_scale_is_pefts(tmp_path: Path, settings: dict[str, Any], expected: float) -> None:
    folder = adapter(tmp_path, **settings)
    assert peft_files.read(folder).scale("layer.0.query") == expected
    ours = peft_files.write_device(tmp_path / "device", folder)
    assert ours.scale("layer.0.query") == 1.0
    name = f"{PREFIX}layer.0.query.lora_B.weight"
    assert np.allclose(ours.tensors[name], read_tensors(folder / peft_files.TENSORS)[name] * expected, rtol=1e-3)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "OFT"}, "peft_type 'OFT'"),
    "another kind's tensors": ({"peft_type": "IA3"}, "belong to nothing"),
    "DoRA without magnitudes": ({"use_dora": True}, "lora_magnitude_vector belongs to use_dora = true, which is True"),
    "bias of B that is not there": ({"lora_bias": True}, "lora_B.bias belongs to lora_bias = true"),
    "DoRA and a bias of B": ({"use_dora": True, "lora_bias": True}, "use_dora with lora_bias"),
    "an activated LoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "QA-LoRA of no blocks": ({"use_qalora": True, "qalora_group_size": 0.5}, "a whole qalora_group_size"),
    "trained tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "a setting nobody knows": ({"use_something_new": 3}, "use_something_new = 3"),
    "modules that PEFT leaves out": ({"target_modules": ["value"]}, "target_modules does not name them (1 of 1"),
    "modules outside the expression": ({"target_modules": ".*value"}, "target_modules does not name them (1 of 1"),
    "PiSSA unconverted": ({"init_lora_weights": "pissa"}, "changed the base weights"),
    "rank of another file": ({"r": 8}, "expected lora_A [8, K]"),
    "rank 0": ({"r": 0}, "r should be a number above 0"),
    "alpha of text": ({"lora_alpha": "16"}, "lora_alpha should be a number"),
    "a pattern that is none": ({"alpha_pattern": {"(": 2}}, "no regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_would_be_wrong_are_refused(tmp_path: Path, case: str) -> None:
    settings, expected = REFUSED[case]
    with pytest.raises(ArtifactError) as caught:
        peft_files.read(adapter(tmp_path, **settings))
    assert expected in str(caught.value)


A, B = (f"{PREFIX}layer.0.query.lora_{side}.weight" for side in "AB")
DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({A: np.full((4, 64), np.nan, np.float32)}, "hold NaN"),
    "infinity in the head": ({f"{PREFIX}classifier.bias": np.full(3, np.inf, np.float32)}, "hold NaN, infinity"),
    "integers": ({A: np.ones((4, 64), np.int32)}, "no floats"),
    "another's tensor": ({f"{PREFIX}layer.0.query.lora_magnitude": np.ones(32, np.float32)}, "belong to nothing"),
    "a magnitude nobody uses": (
        {f"{PREFIX}layer.0.query.lora_magnitude_vector": np.ones(32, np.float32)},
        "which is False here",
    ),
    "a bias nobody trained": ({f"{PREFIX}layer.0.query.base_layer.bias": np.ones(32, np.float32)}, "belong to nothing"),
    "half a pair": ({f"{PREFIX}layer.1.query.lora_A.weight": np.ones((4, 64), np.float32)}, "lora_B is missing"),
    "a shape": ({B: np.ones((32, 5), np.float32)}, "found [4, 64], [32, 5]"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    tensors, expected = DAMAGED[case]
    with pytest.raises(ArtifactError) as caught:
        peft_files.read(adapter(tmp_path, tensors=tensors))
    assert expected in str(caught.value)


def test_all_reasons_come_at_once(tmp_path: Path) -> None:
    """Of settings, values, shapes, modules, heads and the base; each once, of many modules the first few."""
    query = f"{PREFIX}layer.{{}}.query.lora_{{}}.weight"
    sides = [(i, side) for i in range(1, 10) for side in ("A", "B")]
    more = {query.format(i, s): np.ones((4, 64) if s == "A" else (32, 4), np.float32) for i, s in sides}
    more |= {A: np.full((4, 64), np.nan, np.float32), query.format(2, "B"): np.ones((8, 4), np.float32)}
    folder = adapter(tmp_path, use_dora=True, use_qalora=True, tensors=more)
    with pytest.raises(ArtifactError) as caught:
        peft_files.read(folder, "cd" * 32, {f"layer.{i}.query": (32, 64) for i in range(3)}, ["score"])
    told = str(caught.value)
    words = ("use_dora", "use_qalora", "NaN", "another base", "head 'score' is missing", "adapter's [8, ")
    assert [word for word in words if word not in told] == []
    assert "layer.6.query and 3 more: the base has no such linear or embedding (7 of 10 modules)" in told
    assert "6 more modules likewise" in told
    assert len(told.splitlines()) == len(set(told.splitlines())) <= 14


def test_matrices_that_peft_ties_are_the_same_turned_round(tmp_path: Path) -> None:
    """PEFT saves an embedding's and its head's; others than each other's, or one alone, are refused."""
    a_rk, b_nr = np.ones((4, 64), np.float32), np.arange(40, dtype=np.float32).reshape(10, 4)
    pair = {f"{PREFIX}lm_head.lora_A.weight": a_rk, f"{PREFIX}lm_head.lora_B.weight": b_nr}
    twin = {f"{PREFIX}embed.lora_embedding_A": b_nr.T.copy(), f"{PREFIX}embed.lora_embedding_B": a_rk.T.copy()}
    given = {"target_modules": ["query", "embed"], "ensure_weight_tying": True}
    peft_files.read(adapter(tmp_path / "fine", tensors={**pair, **twin}, **given))
    other = {**twin, f"{PREFIX}embed.lora_embedding_A": b_nr.T * 2}
    for name, tensors in {"head": pair, "embedding": twin, "other": {**pair, **other}}.items():
        with pytest.raises(ArtifactError, match="the same two matrices"):
            peft_files.read(adapter(tmp_path / name, tensors=tensors, **given))


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"base_digest": "cd" * 32}, "trained on another base: expected cdcdcdcdcdcd…, found abababababab…"),
        ({"shapes": {"layer.0.query": (32, 32)}}, r"the base's linear is \[32, 32\], the adapter's \[32, 64\]"),
        ({"shapes": {}}, "the base has no such linear"),
        ({"heads": ["score"]}, "the trained head 'score' is missing"),
    ],
)
def test_another_base_is_refused(tmp_path: Path, expected: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        peft_files.read(adapter(tmp_path), **expected)


def test_a_file_that_names_no_base_is_refused(tmp_path: Path) -> None:
    tensors = read_tensors(adapter(tmp_path / "a") / peft_files.TENSORS)
    (tmp_path / "b").mkdir()
    write_json(tmp_path / "b" / peft_files.SETTINGS, json.loads((tmp_path / "a" / peft_files.SETTINGS).read_text()))
    write_tensors(tmp_path / "b" / peft_files.TENSORS, tensors)
    peft_files.read(tmp_path / "b")
    with pytest.raises(ArtifactError, match="does not say which base"):
        peft_files.read(tmp_path / "b", BASE)


@pytest.mark.parametrize("name", [peft_files.SETTINGS, peft_files.TENSORS])
def test_missing_and_cut_files_are_named(tmp_path: Path, name: str) -> None:
    folder = adapter(tmp_path)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=name):
        peft_files.read(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        peft_files.read(folder)


def peft_model(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """Return a float tiny BERT with a random LoRA and head in it, and the PEFT folder it was saved to."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert(folder / "base"), num_labels=3)
    names = ["query", "value", "intermediate.dense"]
    own = {"r": 4, "lora_alpha": 8, "target_modules": names, "init_lora_weights": False, "task_type": "SEQ_CLS"}
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(**{**own, **settings})).eval()
    model.save_pretrained(str(folder / "peft"))
    return model, folder / "peft"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layer.0.attention.self.query": 2, "value": 8}, "alpha_pattern": {"intermediate.dense": 3}},
        {"rank_pattern": {"value": 8}, "alpha_pattern": {"query": 5}, "use_rslora": True},
    ],
    ids=["plain", "rslora", "patterns", "both"],
)
def test_peft_loads_the_device_form_and_computes_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model, folder = peft_model(tmp_path, **settings)
    device = tmp_path / "device"
    peft_files.write_device(device, folder, heads=["classifier"])
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    ids = torch.arange(5, 45).view(4, 10)
    plain = base.eval()(ids).logits
    loaded = PeftModel.from_pretrained(base, str(device)).eval()
    expected, found = model(ids).logits.detach(), loaded(ids).logits.detach()
    assert (expected - plain).abs().max() > 0.1, "the adapter should matter"
    assert torch.allclose(found, expected, atol=5e-3 * float(expected.abs().max()))
    for name, module in loaded.named_modules():
        if isinstance(getattr(module, "scaling", None), dict):
            assert module.scaling["default"] == 1.0, name
    for name, terms in peft_files.read(folder).effect().modules.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        delta = terms.delta(np.zeros((layer.out_features, layer.in_features), np.float32))
        assert np.allclose(delta, layer.get_delta_weight("default").detach().numpy(), atol=1e-5), name


def test_the_device_form_names_the_base(tmp_path: Path) -> None:
    peft_files.write_device(tmp_path / "device", adapter(tmp_path / "a"), base_digest=BASE)
    header, metadata, _ = tensor_header(tmp_path / "device" / peft_files.TENSORS)
    assert metadata == {"format": "pt", "edgepeft.base": BASE, "edgepeft.format": "i4b32"}
    assert {name.split(".")[-2]: entry["dtype"] for name, entry in header.items()} == {
        "lora_A": "F16", "lora_B": "F16", "classifier": "F32",
    }  # fmt: skip


def test_what_overflows_float16_is_refused(tmp_path: Path) -> None:
    large = adapter(tmp_path / "a", tensors={B: np.full((32, 4), 1e5, np.float32)})
    with pytest.raises(ArtifactError, match=r"layer.0.query: b_nr reaches .*65504"):
        peft_files.write_device(tmp_path / "device", large)
    assert not (tmp_path / "device").exists()


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = adapter(tmp_path)
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(folder / peft_files.TENSORS).items()}
    save_file(tensors, folder / peft_files.TENSORS)
    found = peft_files.read(folder).tensors
    assert all(np.array_equal(found[name], t.float().numpy()) for name, t in tensors.items())
