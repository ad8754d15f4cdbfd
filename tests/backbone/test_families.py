"""The family rows name every part of the models they speak for."""

import json

import pytest
from builders import ALTERNATING, DECODERS, tiny_bert, tiny_decoder

from edgepeft.artifact import read_tensors
from edgepeft.backbone.families import FAMILIES, family_of
from edgepeft.errors import ModelError


def made(kind, folder):
    """Return a model of three layers, of BERT or one of DECODERS, and its settings as config.json has them."""
    if kind == "bert":
        model = tiny_bert(folder, layers=3)
    else:
        pattern = [*ALTERNATING["layer_types"], "full_attention"] if "layer_types" in DECODERS[kind][1] else None
        model = tiny_decoder(folder, kind, num_hidden_layers=3, **({"layer_types": pattern} if pattern else {}))
    return model, json.loads((model / "config.json").read_text())


every_model = pytest.mark.parametrize("kind", ["bert", *DECODERS])


def test_every_row_has_a_model_here(tmp_path):
    found = {made(kind, tmp_path / kind)[1]["model_type"] for kind in ("bert", *DECODERS)}
    assert found == {kind for row in FAMILIES.values() for kind in row.model_types}


@every_model
def test_a_row_names_every_tensor_of_a_real_model_with_its_shape(kind, tmp_path):
    folder, settings = made(kind, tmp_path / "model")
    family = family_of(settings, "here")
    found = {family.rename(name): array.shape for name, array in read_tensors(folder / "model.safetensors").items()}
    found.pop(None, None)
    assert set(found) == set(family.tensors(settings))
    assert found.items() <= family.shapes(settings).items()
    assert family is FAMILIES[settings["model_type"]]


@every_model
def test_a_row_names_modules_of_the_task_model(kind, tmp_path):
    import torch
    import transformers

    folder, settings = made(kind, tmp_path / "model")
    family = family_of(settings, "here")
    auto = {"encoder": "AutoModelForSequenceClassification", "decoder": "AutoModelForCausalLM"}[family.kind]
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(transformers.AutoConfig.from_pretrained(folder))
    kinds = {"linears": "Linear", "embeddings": "Embedding", "norms": "Norm"}
    for roles, ending in kinds.items():
        named = {name for name, _ in family.modules(getattr(family, roles), settings)}
        there = {name for name, module in model.named_modules() if type(module).__name__.endswith(ending)}
        there = {name for name in there if "rotary_emb" not in name}
        outside = {name for name in there if name.split(".")[0] in (*family.heads, family.head)}
        assert named == there - outside
    assert all(hasattr(model, head) for head in family.heads)
    assert not family.head or isinstance(model.get_submodule(family.head), torch.nn.Linear)
    assert type(model).__name__.startswith(family.class_prefix)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.weight"),
        ("bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.weight"),
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias"),
        ("cls.predictions.bias", None),
        ("classifier.weight", None),
        ("bert.embeddings.position_ids", None),
        ("embeddings.position_ids", None),
    ],
)
def test_checkpoint_names_become_those_of_the_task_model(old, new):
    assert FAMILIES["bert"].rename(old) == new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("lm_head.bias", "model.lm_head.bias"),
        ("score.weight", None),
        ("model.layers.31.self_attn.rotary_emb.inv_freq", None),
        ("model.rotary_emb.inv_freq", None),
    ],
)
def test_checkpoint_names_of_decoders_become_those_of_the_task_model(old, new):
    assert FAMILIES["llama"].rename(old) == new


@pytest.mark.parametrize("kind", ["berd", "gpt2", None])
def test_an_unknown_family_is_refused_with_the_known_ones(kind):
    with pytest.raises(ModelError, match=r"some/folder: unknown model_type .* Known: bert") as caught:
        family_of({"model_type": kind}, "some/folder")
    assert ("Did you mean 'bert'" in str(caught.value)) == (kind == "berd")


def test_settings_without_a_number_of_layers_are_refused():
    with pytest.raises(ModelError, match="num_hidden_layers"):
        family_of({"model_type": "bert"}, "here")
