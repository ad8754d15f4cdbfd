"""What does not fit within a model folder is named before anything is made, by a build and by a dry run."""

import json
import re

import numpy as np
import pytest
from models import settings, tensors

from edgepeft.artifact import Run, read_tensors
from edgepeft.backbone.check import check_bindable, check_model
from edgepeft.backbone.load import open_folder
from edgepeft.config import Config
from edgepeft.errors import ConfigError, ModelError
from edgepeft.plan import plan_text
from edgepeft.quant.stage import quantize

WEIGHT, BIAS = "encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.bias"


def with_tensor(name, *shape):
    """Return a change that gives a tensor another shape."""
    return lambda m: tensors(m, lambda found: {**found, name: np.ones(shape, np.float32)})


def with_text(name, text):
    """Return a change that overwrites a file."""
    return lambda m: (m / name).write_text(text)


def with_setting(**changes):
    """Return a change of config.json."""
    return lambda m: settings(m, **changes)


def cut(name):
    """Return a change that cuts a file in half."""
    return lambda m: (m / name).write_bytes((m / name).read_bytes()[: (m / name).stat().st_size // 2])


def tokenizer(change):
    """Return a change of what tokenizer.json holds."""

    def apply(m):
        path = m / "tokenizer.json"
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return apply


def added(found, count=5):
    """Add special tokens behind the vocabulary."""
    first, last = found["added_tokens"][0], len(found["model"]["vocab"])
    found["added_tokens"] += [{**first, "id": last + i, "content": f"<new{i}>"} for i in range(count)]


def slow(m):
    """Leave a vocabulary alone, and one word too many in it."""
    (m / "tokenizer.json").unlink()
    with open(m / "vocab.txt", "a") as stream:
        stream.write("one-too-many\none-more\n")


PADDING = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_type_id": 0}
FAULTS = {
    "more tokens than rows": (
        tokenizer(lambda found: found["model"]["vocab"].update(zebra=122)),
        r"tokenizer\.json: expected ids below 122, .* word embedding, found 122 \(token 'zebra'\)",
    ),
    "added tokens": (tokenizer(added), r"tokenizer\.json: expected ids below 122, .* \(token '<new4>'\)"),
    "a [CLS] beyond": (
        tokenizer(lambda found: found["post_processor"].update(cls=["[CLS]", 999])),
        r"tokenizer\.json: expected ids below 122, .* found 999",
    ),
    "padding beyond": (
        tokenizer(lambda found: found.update(padding={**PADDING, "pad_id": 999, "pad_token": "[PAD]"})),
        r"tokenizer\.json: expected ids below 122, .* found 999",
    ),
    "more words, no tokenizer.json": (slow, r"tokenizer\.json: expected ids below 122, .* found 12\d"),
    "tokenizer not JSON": (with_text("tokenizer.json", "hello"), r"tokenizer\.json: not valid JSON"),
    "tokenizer truncated": (cut("tokenizer.json"), r"tokenizer\.json: not valid JSON"),
    "tokenizer empty": (with_text("tokenizer.json", ""), r"tokenizer\.json: not valid JSON"),
    "tokenizer a list": (with_text("tokenizer.json", "[1]"), r"tokenizer\.json: expected a JSON object"),
    "tokenizer something else": (with_text("tokenizer.json", '{"a": 1}'), r"tokenizer\.json: cannot be used: .*again"),
    "tokenizer of no kind": (
        tokenizer(lambda found: found["model"].update(type="Foo")),
        r"tokenizer\.json: cannot be used: .*again",
    ),
    "tokenizer settings truncated": (cut("tokenizer_config.json"), r"tokenizer_config\.json: not valid JSON"),
    "tokenizer settings a list": (
        with_text("tokenizer_config.json", "[]"),
        r"tokenizer_config\.json: expected a JSON obj",
    ),
    "heads": (
        with_setting(num_attention_heads=7),
        r"config\.json: num_attention_heads 7 does not divide hidden_size 64",
    ),
    "no heads": (with_setting(num_attention_heads=0), "num_attention_heads: expected a whole .* found 0"),
    "activation": (with_setting(hidden_act="foo"), r"config\.json: .*hidden_act 'foo' is not supported; known: gelu"),
    "activations": (with_setting(hidden_act=["gelu"]), r"config\.json: .*hidden_act \['gelu'\] is not supported"),
    "text": (with_setting(hidden_size="64"), r"config\.json: hidden_size: expected a whole .* found '64'"),
    "negative": (with_setting(intermediate_size=-128), r"config\.json: intermediate_size: expected .* found -128"),
    "zero": (with_setting(num_hidden_layers=0), r"config\.json: num_hidden_layers: expected .* found 0"),
    "true": (with_setting(type_vocab_size=True), r"config\.json: type_vocab_size: expected .* found True"),
    "fraction": (with_setting(vocab_size=122.0), r"config\.json: vocab_size: expected .* found 122\.0"),
    "none": (
        with_setting(max_position_embeddings=None),
        r"config\.json: max_position_embeddings: expected .* found None",
    ),
    "other size": (with_setting(intermediate_size=96), r"intermediate\.dense\.weight is \[128, 64\], not \[96, 64\]"),
    "one dimension": (with_tensor(WEIGHT, 64), r"output\.dense\.weight is \[64\], not \[64, 128\]"),
    "three dimensions": (with_tensor(WEIGHT, 64, 128, 1), r"output\.dense\.weight is \[64, 128, 1\], not \[64, 128\]"),
    "no dimension": (with_tensor(WEIGHT), r"output\.dense\.weight is \[\], not \[64, 128\]"),
    "turned": (with_tensor(WEIGHT, 128, 64), r"output\.dense\.weight is \[128, 64\], not \[64, 128\]"),
    "bias": (with_tensor(BIAS, 3), r"output\.dense\.bias is \[3\], not \[64\]"),
    "norm": (with_tensor("embeddings.LayerNorm.weight", 3), r"embeddings\.LayerNorm\.weight is \[3\], not \[64\]"),
    "embedding": (
        with_tensor("embeddings.word_embeddings.weight", 64),
        r"word_embeddings\.weight is \[64\], not \[122, 64",
    ),
}


@pytest.mark.parametrize("dry", [False, True], ids=["quantize", "dry run"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named_before_anything_is_written(model, tmp_path, fault, dry):
    change, expected = FAULTS[fault]
    change(model)
    out = tmp_path / "out"
    out.mkdir()
    config = Config(model=str(model), target="host", output=str(out))
    with pytest.raises(ModelError, match=expected) as caught:
        plan_text(config) if dry else quantize(config, Run(out), out)
    assert str(model) in str(caught.value)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("dry", [False, True], ids=["quantize", "dry run"])
@pytest.mark.parametrize(
    ("method", "most"), [("lora", "48, the model's pos"), ("prompt", "28, the model's positions less 20")]
)
def test_longer_texts_than_a_model_takes_are_refused_unless_nobody_asked_for_them(model, tmp_path, dry, method, most):
    settings(model, max_position_embeddings=48)
    tensors(model, lambda found: {**found, "embeddings.position_embeddings.weight": np.ones((48, 64), np.float32)})
    config, out = Config(model=str(model), output=str(tmp_path / "out"), method=method), tmp_path / "quantized"
    out.mkdir()
    longer = config.replace(max_length=65)
    with pytest.raises(ConfigError, match=f"--max-length: expected at most {most}"):
        plan_text(longer) if dry else quantize(longer, Run(out), out)
    said = plan_text(config) if dry else quantize(config, Run(out), out)
    assert not dry or re.search(rf"max_length +\| {most[:2]} ", said)


def test_a_row_knows_the_shape_of_every_tensor(bert):
    source = open_folder(bert)
    family = check_model(source)
    found = {family.rename(name): array.shape for name, array in read_tensors(bert / "model.safetensors").items()}
    shapes = family.shapes(source.settings)
    assert {name: shapes.get(name) for name in found} == found


def test_a_tensor_that_no_shader_of_the_target_binds_is_named_before_a_build(model):
    source = open_folder(model)
    family = check_model(source)
    check_bindable(Config(), source, family, 1)
    with pytest.raises(ModelError, match=r"--target web binds 0 MiB at most: .*encoder.layer.0.*i4b32.*smaller format"):
        check_bindable(Config(target="web"), source, family, 0)
    check_bindable(Config(size="1MB"), source, family, 0)
