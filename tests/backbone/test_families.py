"""The family rows name every part of the models they speak for."""

import json

import pytest
from builders import tiny_bert

from edgepeft.artifact import read_tensors
from edgepeft.backbone.families import FAMILIES, family_of
from edgepeft.errors import ModelError

MAKERS = {"bert": tiny_bert}


@pytest.mark.parametrize("tag", FAMILIES)
def test_a_row_names_every_tensor_of_a_real_model(tag, tmp_path):
    folder, family = MAKERS[tag](tmp_path / "model", layers=3), FAMILIES[tag]
    settings = json.loads((folder / "config.json").read_text())
    found = {family.rename(name) for name in read_tensors(folder / "model.safetensors")} - {None}
    assert found == set(family.tensors(settings))
    assert family_of(settings, "here") is family


@pytest.mark.parametrize("tag", FAMILIES)
def test_a_row_names_modules_of_the_task_model(tag, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    family = FAMILIES[tag]
    settings = AutoConfig.from_pretrained(MAKERS[tag](tmp_path / "model"))
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(settings)
    kinds = {"linears": torch.nn.Linear, "embeddings": torch.nn.Embedding, "norms": torch.nn.LayerNorm}
    for roles, kind in kinds.items():
        named = {name for name, _ in family.modules(getattr(family, roles), settings.to_dict())}
        there = {name for name, m in model.named_modules() if isinstance(m, kind)}
        assert named == {name for name in there if name.split(".")[0] not in family.heads}
    assert all(hasattr(model, head) for head in family.heads)


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


@pytest.mark.parametrize("kind", ["berd", "gpt2", None])
def test_an_unknown_family_is_refused_with_the_known_ones(kind):
    with pytest.raises(ModelError, match=r"some/folder: unknown model_type .* Known: bert") as caught:
        family_of({"model_type": kind}, "some/folder")
    assert ("Did you mean 'bert'" in str(caught.value)) == (kind == "berd")


def test_settings_without_a_number_of_layers_are_refused():
    with pytest.raises(ModelError, match="num_hidden_layers"):
        family_of({"model_type": "bert"}, "here")
