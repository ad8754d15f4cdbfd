"""The stage `quantize`: what it writes, says and refuses."""

import json

import numpy as np
import pytest
from builders import tiny_bert
from models import settings, tensors

from edgepeft.artifact import Run, digests, read_json, read_tensors, sha256_file, tensor_header
from edgepeft.config import Config
from edgepeft.errors import ModelError
from edgepeft.quant import stage
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS, Packed
from edgepeft.quant.nf4_block import decode_absmax
from edgepeft.quant.stage import quantize


def quantized(model, out, **changes):
    out.mkdir(exist_ok=True)
    summary = quantize(Config(model=str(model), **changes), Run(out / "run"), out)
    return summary, read_json(out / "quantized.json"), read_tensors(out / "weights.safetensors")


@pytest.mark.parametrize("embedding", [*EMBEDDING_FORMATS, "float"])
@pytest.mark.parametrize("tag", FORMATS)
def test_what_is_written_decodes_to_the_source_within_the_stated_error(bert, tmp_path, tag, embedding):
    summary, about, stored = quantized(bert, tmp_path / "out", format=tag, embedding_format=embedding)
    source = {f"bert.{name}": array for name, array in read_tensors(bert / "model.safetensors").items()}
    for layer in about["layers"]:
        name, table = layer["name"], FORMATS if layer["kind"] == "linear" else EMBEDDING_FORMATS
        packed = Packed(layer["format"], *layer["shape"], stored[f"{name}.qweight"], stored[f"{name}.qscale"])
        decoded, w_nk = table[layer["format"]].dequantize(packed), source[f"{name}.weight"]
        error = np.linalg.norm(w_nk - decoded) / np.linalg.norm(w_nk)
        assert error == pytest.approx(layer["relative_error"], rel=1e-3)
        assert np.abs(w_nk - decoded).max() == pytest.approx(layer["max_error"], rel=1e-3)
        assert layer["bytes"] == packed.w.nbytes + packed.scale.nbytes
        assert error < (0.03 if "8" in tag.split("b")[0] and layer["kind"] == "linear" else 0.15)
    for name in source.keys() - {f"{layer['name']}.weight" for layer in about["layers"]}:
        np.testing.assert_array_equal(stored[name], source[name])
    assert len(stored) == len(source) + len(about["layers"])
    assert summary["linears"] + summary["embeddings"] + summary["kept"] == 16
    assert summary["bytes"] == (tmp_path / "out" / "weights.safetensors").stat().st_size


def test_errors_are_the_same_measured_in_pieces(bert, tmp_path, monkeypatch):
    whole = quantized(bert, tmp_path / "whole", embedding_format="i8b32")[1]
    monkeypatch.setattr(stage, "PIECE", 1000)
    pieces = quantized(bert, tmp_path / "pieces", embedding_format="i8b32")[1]
    for one, other in zip(whole["layers"], pieces["layers"], strict=True):
        assert one == {**other, "relative_error": pytest.approx(other["relative_error"], rel=1e-6)}


def test_the_folder_describes_itself(bert, tmp_path):
    _, about, _ = quantized(bert, tmp_path / "out", format="nf4b64")
    _, meta, _ = tensor_header(tmp_path / "out" / "weights.safetensors")
    digest = sha256_file(bert / "model.safetensors")
    assert meta == {"format": "pt", "edgepeft.base": digest, "edgepeft.format": "nf4b64"}
    expected = {"base_digest": digest, "family": "bert", "prefix": "bert", "format": "nf4b64", "solver": "rtn"}
    assert expected.items() <= about.items()
    copied = {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"}
    assert set(digests(tmp_path / "out")) == {"weights.safetensors", "quantized.json", *copied}
    for name in copied:
        assert sha256_file(tmp_path / "out" / name) == sha256_file(bert / name)
    assert str(bert.parent) not in (tmp_path / "out" / "quantized.json").read_text()


def test_equal_models_give_equal_bytes(bert, tmp_path):
    for name in ("one", "two"):
        quantized(bert, tmp_path / name)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_scales_of_double_quantization_are_stored_beside_what_they_decode_to(bert, tmp_path):
    _, about, stored = quantized(bert, tmp_path / "out", format="nf4b64", double_quant=True)
    for layer in (layer for layer in about["layers"] if layer["kind"] == "linear"):
        parts = ("absmax_codes", "absmax_code", "absmax_scale", "absmax_offset")
        decoded = decode_absmax({part: stored[f"{layer['name']}.{part}"] for part in parts})
        n, k = layer["shape"]
        packed = Packed("nf4b64", n, k, stored[f"{layer['name']}.qweight"], stored[f"{layer['name']}.qscale"])
        np.testing.assert_array_equal(FORMATS["nf4b64"].unpack(packed)[1].reshape(-1), decoded)


def test_what_does_not_fit_is_kept_and_told(bert, tmp_path, capsys):
    _, about, stored = quantized(bert, tmp_path / "out", format="i4b128", embedding_format="i8b32")
    said = capsys.readouterr().err
    assert "quantized 2 of 13 linears (i4b128), 2 of 3 embeddings (i8b32); kept float: " in said
    assert "bert.encoder.layer.0.attention.self.query (K=64 is no multiple of 128)" in said
    assert all(f"| {layer['name']} " in said for layer in about["layers"])
    kept = {entry["name"]: entry for entry in about["kept"]}
    assert kept["bert.embeddings.token_type_embeddings"]["reason"] == "2 rows are not worth packing"
    assert stored["bert.encoder.layer.0.attention.self.query.weight"].dtype == np.float32


def test_a_model_that_the_format_fits_nowhere_is_refused(tmp_path):
    model = tiny_bert(tmp_path / "model", hidden=40)
    with pytest.raises(ModelError, match=r"no linear layer can take the format i4b64: K=40 .* 64 \(11 linears\)"):
        quantized(model, tmp_path / "out", format="i4b64")


def test_a_checkpoint_with_a_head_and_old_names_gives_the_same_bytes(bert, model, tmp_path):
    def old(found):
        renamed = {}
        for name, array in found.items():
            for new, before in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
                name = name.replace(new, before)
            renamed[f"bert.{name}"] = array
        head = {"cls.predictions.bias": np.zeros(9, np.float32), "classifier.weight": np.zeros((2, 64), np.float32)}
        return {**renamed, **head, "bert.embeddings.position_ids": np.arange(64)[None]}

    _, _, plain = quantized(bert, tmp_path / "plain")
    _, _, other = quantized(tensors(model, old), tmp_path / "other")
    assert plain.keys() == other.keys()
    for name in plain:
        np.testing.assert_array_equal(plain[name], other[name])


def test_a_missing_pooler_is_drawn_and_told(model, tmp_path, capsys):
    tensors(model, lambda found: {name: array for name, array in found.items() if not name.startswith("pooler")})
    summary, _, stored = quantized(model, tmp_path / "out")
    assert "bert.pooler.dense.weight: not in the checkpoint, drawn anew" in capsys.readouterr().err
    assert summary["linears"] == 13
    assert not stored["bert.pooler.dense.bias"].any()


def without(found, name):
    return {key: array for key, array in found.items() if key != name}


FAULTS = {
    "missing": (
        lambda found: without(found, "encoder.layer.1.output.dense.bias"),
        "missing: bert.encoder.layer.1.output",
    ),
    "strange": (
        lambda found: {
            **found,
            "encoder.layer.0.attention.self.distance_embedding.weight": np.ones((3, 4), np.float32),
        },
        "not known to the family: .*distance_embedding",
    ),
    "another layer": (
        lambda found: {**found, "encoder.layer.2.output.dense.bias": np.ones(64, np.float32)},
        "not known",
    ),
    "no matrix": (
        lambda found: {**found, "encoder.layer.0.output.dense.weight": np.ones(64, np.float32)},
        r"of another shape: bert.encoder.layer.0.output.dense.weight is \[64\], not \[64, 128\]",
    ),
    "NaN": (
        lambda found: {**found, "encoder.layer.0.output.dense.weight": np.full((64, 128), np.nan, np.float32)},
        "encoder.layer.0.output.dense.weight holds 8192 NaN",
    ),
    "too large": (
        lambda found: {**found, "encoder.layer.0.output.dense.weight": np.full((64, 128), 1e9, np.float32)},
        "too large for its float16 scales",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_is_not_what_it_says_is_refused(model, tmp_path, fault):
    change, expected = FAULTS[fault]
    with pytest.raises(ModelError, match=expected):
        quantized(tensors(model, change), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unknown_family_is_refused(model, tmp_path):
    with pytest.raises(ModelError, match="unknown model_type 'gpt2'"):
        quantized(settings(model, model_type="gpt2"), tmp_path / "out")


def test_a_tokenizer_without_its_json_gets_one(model, tmp_path):
    (model / "tokenizer.json").unlink()
    quantized(model, tmp_path / "out")
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("turn on the lamp").tokens
    assert found == ["[CLS]", "turn", "on", "the", "lamp", "[SEP]"]


def test_the_stage_needs_no_torch(bert, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from edgepeft.config import Config; from edgepeft.artifact import Run;"
        "from edgepeft.quant.stage import quantize; out = Path(sys.argv[2]); out.mkdir();"
        "quantize(Config(model=sys.argv[1]), Run(out / 'run'), out); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bert), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
    assert json.loads((tmp_path / "out" / "quantized.json").read_text())["layers"]
