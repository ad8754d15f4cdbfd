"""What reaches each linear on calibration texts is what reaches it in the whole model, padding left out."""

import json

import numpy as np
import pytest
import torch
from builders import tiny_bert, tiny_decoder
from safetensors.numpy import load_file

from edgepeft.backbone.families import family_of
from edgepeft.backbone.load import resolve_model
from edgepeft.config import Config
from edgepeft.quant.stream import Stream

ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]


@pytest.mark.parametrize("kind", ["bert", "gemma3"])
def test_inputs_are_the_models_own_without_padding(tmp_path, kind):
    from transformers import AutoModel

    folder = tiny_bert(tmp_path) if kind == "bert" else tiny_decoder(tmp_path, kind)
    task = "text-classification" if kind == "bert" else "text-generation"
    config = Config(model=str(folder), task=task)
    model = AutoModel.from_pretrained(folder, dtype="float32").eval()
    family = family_of(model.config.to_dict(), "tiny")
    tensors = {family.rename(name): value for name, value in load_file(folder / "model.safetensors").items()}
    stream = Stream(config, resolve_model(config), family, ROWS)
    hidden = stream.embed(tensors)
    module = f"{family.prefix}.{family.linears['q'].format(i=0)}"
    found = np.concatenate([x.numpy() for x in stream.inputs(0, stream.layer(0, tensors), module, hidden)])
    wanted = []
    model.get_submodule(module.removeprefix(f"{family.prefix}.")).register_forward_pre_hook(
        lambda _, given: wanted.append(given[0][0].numpy())
    )
    for row in ROWS:
        with torch.inference_mode():
            model(input_ids=torch.tensor([row]))
    rows = np.concatenate(wanted)
    assert found.shape == rows.shape
    distance = np.abs(found[:, None] - rows[None]).max(-1)
    assert distance.min(0).max() < 1e-5
    assert distance.min(1).max() < 1e-5


def test_a_generator_that_is_left_early_leaves_gradients_on(tmp_path):
    config = Config(model=str(tiny_decoder(tmp_path)), task="text-generation")
    source = resolve_model(config)
    family = family_of(json.loads((tmp_path / "config.json").read_text()), "tiny")
    tensors = {family.rename(n): v for n, v in load_file(tmp_path / "model.safetensors").items()}
    stream = Stream(config, source, family, ROWS * 8)
    hidden = stream.embed(tensors)
    one, two = stream.top(hidden), stream.top(hidden)
    assert next(one).shape == next(two).shape
    assert torch.is_grad_enabled()
    one.close()
    two.close()
    assert torch.is_grad_enabled()
