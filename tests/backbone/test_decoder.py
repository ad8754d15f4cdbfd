"""Causal language models: one description of them all, their packed layers in transformers' model, what is refused."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from builders import DECODERS, LLAMA3_ROPE, LONG_ROPE, YARN_ROPE, tiny_decoder
from models import settings, shards, tensors

from edgepeft.artifact import Run, read_json, read_tensors, tensor_header
from edgepeft.backbone.decoder import describe, full_config, rope_tables, stop_tokens
from edgepeft.backbone.load import open_folder, quantized_model
from edgepeft.bench.memory import resident_bytes
from edgepeft.config import Config
from edgepeft.errors import ArtifactError, ConfigError, ModelError
from edgepeft.plan import plan_text, sizes
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS, Packed
from edgepeft.quant.linear import QuantEmbedding, QuantLinear
from edgepeft.quant.stage import quantize

TASK = {"task": "text-generation"}
WORD, HEAD = "model.embed_tokens", "lm_head"
TIED = [kind for kind, (name, flags) in DECODERS.items() if flags.get("tie_word_embeddings") or "Gemma" in name]
UNTIED = [kind for kind in DECODERS if kind not in TIED]
# Of a tied pair the last stays float; i8c does not fit the 96 inputs of `down`.
FORMAT_PAIRS = [("i4b32", "i4b32"), ("i8c", "i8b32"), ("nf4b64", "float")]
every_kind = pytest.mark.parametrize("kind", DECODERS)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Make each kind of model once."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tiny_decoder(tmp_path_factory.mktemp(kind) / "model", kind)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def packed_as(folder_of, tmp_path_factory):
    """Pack each kind of model in each pair of formats once."""
    made = {}

    def make(kind, tag="i4b32", embedding="i4b32"):
        key = (kind, tag, embedding)
        if key not in made:
            made[key] = packed_of(folder_of(kind), tmp_path_factory.mktemp("packed") / "out", tag, embedding)
        return made[key]

    return make


@pytest.fixture
def decoder(tmp_path):
    """A tied model that a test may damage."""
    return tiny_decoder(tmp_path / "model", "qwen2")


def settings_of(folder):
    return read_json(folder / "config.json")


def float_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def ids(count, rows=1):
    return torch.from_numpy(np.random.default_rng(0).integers(3, 262, (rows, count)))


def packed_of(model, out, tag="i4b32", embedding="i4b32", **changes):
    out.mkdir(exist_ok=True)
    config = Config(model=str(model), format=tag, embedding_format=embedding, **TASK, **changes)
    quantize(config, Run(out / "run"), out)
    return out


def built(packed):
    return quantized_model(packed, (), Config(**TASK))


# --- the description -----------------------------------------------------------------------------------------------


def seen_by_layers(model, count):
    """Return what each layer's attention is given as (cos, sin), and its weights, for one text."""
    found = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(kwargs["position_embeddings"]), with_kwargs=True
        )
    with torch.no_grad():
        return found, model(ids(count), output_attentions=True).attentions


@pytest.mark.parametrize("length", [40, 200])  # longrope: within the original context and beyond it
@every_kind
def test_rope_tables_are_what_the_layers_of_the_model_turn_by(folder_of, kind, length):
    folder = folder_of(kind)
    about, tables = describe(settings_of(folder)), rope_tables(settings_of(folder), length)
    found, _ = seen_by_layers(float_model(folder), length)
    assert len(about.ropes) == len(found) == about.layers
    for place, pair in zip(about.ropes, found, strict=True):
        for table, own in zip(tables[place], pair, strict=True):
            assert table.shape == (length, about.rotary_dims // 2)
            np.testing.assert_array_equal(np.concatenate([table, table], axis=1), own[0].numpy())


def test_each_kind_of_rope_has_frequencies_of_its_own(folder_of):
    kinds = ["llama", "llama3", "qwen2-yarn", "phi4"]
    tables = [rope_tables(settings_of(folder_of(kind)), 40)[0][0][:, 5] for kind in kinds]
    tables += [pair[0][:, 5] for pair in rope_tables(settings_of(folder_of("gemma3")), 40)]
    tables += [rope_tables(settings_of(folder_of("phi4")), 200)[0][0][:40, 5]]
    for i, one in enumerate(tables):
        assert not [j for j, other in enumerate(tables) if j != i and np.array_equal(one, other)]


@every_kind
def test_windows_are_what_the_layers_of_the_model_see(folder_of, kind):
    folder, count = folder_of(kind), 20
    _, attentions = seen_by_layers(float_model(folder), count)
    back = np.arange(count)[:, None] - np.arange(count)
    for window, weights in zip(describe(settings_of(folder)).windows, attentions, strict=True):
        assert np.array_equal((weights[0] > 0).all(0).numpy(), (back >= 0) & (back < (window or count)))


@every_kind
def test_a_model_is_described_alike_from_its_file_and_from_all_its_settings(folder_of, kind):
    found = settings_of(folder_of(kind))
    assert describe(full_config(found).to_dict()) == describe(found)


OLD_NAMES = {
    "theta": ("llama", {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
    "linear": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    ),
    "llama3": ("llama", {"rope_scaling": LLAMA3_ROPE}, LLAMA3_ROPE),
    "yarn": ("qwen2", {"rope_scaling": YARN_ROPE}, YARN_ROPE),
    "longrope": (
        "phi4",
        {
            "rope_scaling": {key: LONG_ROPE[key] for key in ("short_factor", "long_factor")} | {"type": "longrope"},
            "partial_rotary_factor": LONG_ROPE["partial_rotary_factor"],
            "original_max_position_embeddings": 64,
        },
        LONG_ROPE,
    ),
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_settings_of_older_releases_say_the_same(folder_of, name):
    kind, old, new = OLD_NAMES[name]
    plain = {key: value for key, value in settings_of(folder_of(kind)).items() if key != "rope_parameters"}
    both = [{**plain, **old}, {**plain, "rope_parameters": new, **{k: v for k, v in old.items() if k[:2] == "or"}}]
    for one, other in zip(*(rope_tables(each, 100)[0] for each in both), strict=True):
        np.testing.assert_array_equal(one, other)


REFUSED = {
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
    "activation": ("llama", {"hidden_act": "relu"}, "activation 'relu' is not supported; known: silu"),
    "gemma's activation": ("gemma2", {"hidden_activation": "gelu"}, "activation 'gelu' is not supported"),
    "both ways": ("gemma3", {"use_bidirectional_attention": True}, "only causal models"),
    "half a rope": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5 is supported for phi3 alone",
    ),
    "groups": ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    "nothing": ("llama", {"vocab_size": 0}, "vocab_size: expected a whole number of at least 1, found 0"),
    "a text": ("llama", {"intermediate_size": "96"}, "'96'"),
    "no number of layers": ("llama", {"num_hidden_layers": None}, "num_hidden_layers: expected a whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_with_its_place(folder_of, tmp_path, name):
    kind, changes, expected = REFUSED[name]
    model = tiny_decoder(tmp_path / "model", kind)
    changed = {**settings_of(model), **changes}
    (model / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError, match=expected) as caught:
        packed_of(model, tmp_path / "out")
    assert str(model) in str(caught.value)
    assert "config.json" in str(caught.value)


def test_all_that_cannot_be_expressed_is_named_at_once(folder_of):
    changes = {"hidden_act": "relu", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    with pytest.raises(ModelError, match=r"activation 'relu'.*; rotary positions of type 'dynamic'"):
        describe({**settings_of(folder_of("llama")), **changes})


def test_a_setting_that_the_class_does_not_read_means_nothing(folder_of):
    found = settings_of(folder_of("llama"))
    stray = {"sliding_window": 8, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    assert describe({**found, **stray, "query_pre_attn_scalar": 7, "hidden_activation": "relu"}) == describe(found)


def test_every_token_that_ends_an_answer_is_found(decoder):
    (decoder / "generation_config.json").unlink(missing_ok=True)
    assert stop_tokens(decoder) == (2,)
    (decoder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert stop_tokens(decoder) == (2, 7)


# --- the packed model ----------------------------------------------------------------------------------------------


def decoded(packed):
    """Return {module: float weight} of a packed folder, decoded by numpy."""
    stored, found = read_tensors(packed / "weights.safetensors"), {}
    for layer in read_json(packed / "quantized.json")["layers"]:
        name, tiles = layer.get("tied_to", layer["name"]), layer["layout"] == "tiles"
        packed_weight = Packed(layer["format"], *layer["shape"], stored[f"{name}.qweight"], stored[f"{name}.qscale"])
        found[layer["name"]] = (FORMATS if tiles else EMBEDDING_FORMATS)[layer["format"]].dequantize(packed_weight)
    return found


def same_answers(model, reference, packed):
    """Check a packed model against a float one, once that has the decoded weights, on two texts of 30 and 24 tokens."""
    weights = decoded(packed)
    for name, weight in weights.items():
        reference.get_submodule(name).weight.data.copy_(torch.from_numpy(weight))
    text = ids(30, rows=2)
    mask = torch.ones_like(text)
    mask[1, 24:] = 0
    with torch.no_grad():
        found, expected = (m(input_ids=text, attention_mask=mask).logits for m in (model, reference))
    valid = mask.bool()
    assert (found - expected)[valid].abs().max() <= 1e-5 * expected[valid].abs().max()
    assert {name for name, m in model.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding))} == set(weights)


@pytest.mark.parametrize(("tag", "embedding"), FORMAT_PAIRS)
@every_kind
def test_the_model_computes_what_the_float_one_does_on_the_decoded_weights(folder_of, packed_as, kind, tag, embedding):
    model = built(packed_as(kind, tag, embedding))
    same_answers(model, float_model(folder_of(kind)), packed_as(kind, tag, embedding))
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) >= 2 * (3 if kind.startswith("phi") else 6)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_caps_hold_where_the_class_knows_them(tmp_path, kind):
    folder = tiny_decoder(tmp_path / "model", kind, attn_logit_softcapping=0.5, final_logit_softcapping=2.0)
    packed, about = packed_of(folder, tmp_path / "out"), describe(settings_of(folder))
    assert (about.attention_softcap, about.logits_softcap) == (0.5 if kind == "gemma2" else 0.0, 2.0)
    model = built(packed)
    same_answers(model, float_model(folder), packed)
    with torch.no_grad():
        capped = model(ids(9)).logits
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert capped.abs().max() < 2
        assert ((model(ids(9)).logits - capped).abs().max() > 1e-3) == (kind == "gemma2")


@every_kind
def test_a_cache_of_keys_and_values_changes_nothing(packed_as, kind):
    model, text = built(packed_as(kind)), ids(16)
    with torch.no_grad():
        whole = model(text).logits
        step = model(text[:, :11], use_cache=True)
        logits = [step.logits]
        for i in range(11, 16):
            step = model(text[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("embedding", [*EMBEDDING_FORMATS, "float"])
@pytest.mark.parametrize("kind", TIED)
def test_a_tied_pair_is_stored_once_and_stays_one_tensor(packed_as, kind, embedding):
    packed = packed_as(kind, embedding=embedding)
    about, names = read_json(packed / "quantized.json"), set(read_tensors(packed / "weights.safetensors"))
    assert {name for name in names if name.startswith((WORD, HEAD))} == (
        {f"{WORD}.weight"} if embedding == "float" else {f"{WORD}.qweight", f"{WORD}.qscale"}
    )
    word, head = (
        next(part for part in (*about["layers"], *about["kept"]) if part["name"] == name) for name in (WORD, HEAD)
    )
    assert (word["kind"], head["kind"], head["tied_to"], head["shape"]) == ("embedding", "head", WORD, word["shape"])
    if embedding != "float":
        tag = {"i4b32": "i4b32", "i8b32": "i8c"}[embedding]
        assert (word["format"], head["format"], word["layout"], head["bytes"]) == (tag, tag, "tiles", 0)
        assert word["bytes"] == FORMATS[tag].size_bytes(262, 64)
    model = built(packed)
    for each in (model, copy.deepcopy(model), model.to(torch.bfloat16)):
        each.tie_weights()
        kept = "weight" if embedding == "float" else "qweight"
        assert getattr(each.lm_head, kept).data_ptr() == getattr(each.model.embed_tokens, kept).data_ptr()
        assert each(ids(3)).logits.isfinite().all()
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert sum(held.values()) < 1.05 * (packed / "weights.safetensors").stat().st_size


@pytest.mark.parametrize("embedding", [*EMBEDDING_FORMATS, "float"])
@pytest.mark.parametrize("kind", UNTIED)
def test_an_untied_head_is_packed_as_a_linear_is(packed_as, kind, embedding):
    packed = packed_as(kind, "i4b64", embedding)
    head = next(layer for layer in read_json(packed / "quantized.json")["layers"] if layer["name"] == HEAD)
    assert (head["kind"], head["format"], head["layout"], head["shape"]) == ("head", "i4b64", "tiles", [262, 64])
    assert isinstance(built(packed).lm_head, QuantLinear)
    assert {layer["layout"] for layer in read_json(packed / "quantized.json")["layers"] if layer["name"] == WORD} == (
        set() if embedding == "float" else {"rows"}
    )


def test_what_is_packed_is_told_with_the_head(folder_of, tmp_path, capsys):
    packed_of(folder_of("qwen2"), tmp_path / "tied", "i4b32", "i8b32")
    text = f"quantized 14 of 14 linears (i4b32), 1 of 1 embeddings (i8c), 1 of 1 head (i8c, tied to {WORD})"
    said = capsys.readouterr().err
    assert text in said
    assert f"| {HEAD}" not in said
    packed_of(folder_of("llama"), tmp_path / "untied", "i4b64")
    assert "1 of 1 head (i4b64); kept float: " in capsys.readouterr().err
    packed_of(folder_of("qwen2"), tmp_path / "float", "i8c", "float")
    said = capsys.readouterr().err
    assert "quantized 12 of 14 linears (i8c), 0 of 1 embeddings, 0 of 1 head; kept float: " in said
    assert f"{WORD} (--embedding-format float), {HEAD} (tied to {WORD})" in said


def test_a_pair_that_does_not_fit_tiles_stays_float_and_one(tmp_path):
    folder = tiny_decoder(tmp_path / "model", "qwen3", hidden_size=96)
    packed = packed_of(folder, tmp_path / "out", "i4b32", "i8b32")
    kept = {part["name"]: part["reason"] for part in read_json(packed / "quantized.json")["kept"]}
    assert kept == {WORD: "K=96 is no multiple of 64", HEAD: f"tied to {WORD}"}
    model = built(packed)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def peak_above(before_that, make):
    """Return by how many bytes resident memory grows at most while something is made, for the second time."""
    before_that()  # what Python and the libraries keep of the first is not counted
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes()["peak_bytes"]
    make()
    return resident_bytes()["peak_bytes"] - before


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_no_float_copy_of_the_weights_exists_at_any_time(packed_as, tmp_path, kind):
    rows, hidden = 20_000, 256
    folder = tiny_decoder(tmp_path / "model", kind, vocab_size=rows, hidden_size=hidden)
    packed = packed_of(folder, tmp_path / "out")
    assert built(packed).lm_head.out_features == rows
    assert peak_above(lambda: built(packed_as(kind)), lambda: built(packed)) < 0.25 * 4 * rows * hidden


def test_a_model_of_another_task_is_refused(folder_of, packed_as, bert, tmp_path):
    with pytest.raises(ConfigError, match=r"text-class.* is a causal language model \(llama\)\. Give --task text-g"):
        quantize(Config(model=str(folder_of("llama"))), Run(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match=r"text-generation: .* an encoder \(bert\)\. Give --task text-classification"):
        quantize(Config(model=str(bert), **TASK), Run(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match="a causal language model"):
        quantized_model(packed_as("llama"), ("a", "b"), Config())
    with pytest.raises(ConfigError, match="a causal language model"):
        plan_text(Config(model=str(folder_of("llama")), data="nowhere.csv"))


# --- checkpoints ---------------------------------------------------------------------------------------------------


def same_bytes(one, other):
    a, b = (read_tensors(folder / "weights.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


OTHER_FORMS = {
    "head too": lambda found: {**found, f"{HEAD}.weight": found[f"{WORD}.weight"]},
    "head alone": lambda found: {
        (f"{HEAD}.weight" if name == f"{WORD}.weight" else name): array for name, array in found.items()
    },
    "without a head": lambda found: {name.removeprefix("model."): array for name, array in found.items()},
    "frequencies": lambda found: {
        **found,
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "rotary_emb.inv_freq": np.ones(8, np.float32),
    },
    "of a classifier": lambda found: {**found, "score.weight": np.ones((2, 64), np.float32)},
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_a_checkpoint_in_another_form_gives_the_same_bytes(packed_as, decoder, tmp_path, form):
    tensors(decoder, OTHER_FORMS[form])
    other = packed_of(shards(decoder) if form == "head too" else decoder, tmp_path / "other")
    same_bytes(other, packed_as("qwen2"))
    parts = {row["part"]: row["tensors"] for row in sizes_of(decoder)}
    assert (parts["embedding"], "head" in parts) == (1, False)


STRANGE = {
    "another head": (
        lambda found: {**found, f"{HEAD}.weight": found[f"{WORD}.weight"] + 1},
        r"lm_head is the word embedding .* hold another lm_head\.weight",
    ),
    "an extra tensor": (
        lambda found: {**found, "model.layers.1.self_attn.sinks": np.ones(4, np.float32)},
        r"not known to the family: model\.layers\.1\.self_attn\.sinks",
    ),
    "a bias": (
        lambda found: {**found, "model.layers.0.mlp.up_proj.bias": np.ones(96, np.float32)},
        r"not known to the family: model\.layers\.0\.mlp\.up_proj\.bias",
    ),
    "no bias": (
        lambda found: {name: array for name, array in found.items() if not name.endswith("1.self_attn.q_proj.bias")},
        r"missing: model\.layers\.1\.self_attn\.q_proj\.bias",
    ),
    "another size": (
        lambda found: {**found, "model.layers.0.self_attn.k_proj.weight": np.ones((64, 64), np.float32)},
        r"k_proj\.weight is \[64, 64\], not \[32, 64\]",
    ),
    "more rows": (
        lambda found: {**found, f"{WORD}.weight": np.ones((300, 64), np.float32)},
        r"embed_tokens\.weight is \[300, 64\], not \[262, 64\]",
    ),
}


@pytest.mark.parametrize("fault", STRANGE)
def test_a_checkpoint_that_is_not_what_it_says_is_refused(decoder, tmp_path, fault):
    change, expected = STRANGE[fault]
    with pytest.raises(ModelError, match=expected):
        packed_of(tensors(decoder, change), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_untied_model_without_its_head_is_refused(tmp_path):
    model = tiny_decoder(tmp_path / "model", "llama")
    tensors(model, lambda found: {name: array for name, array in found.items() if name != f"{HEAD}.weight"})
    with pytest.raises(ModelError, match=r"missing: lm_head\.weight"):
        packed_of(model, tmp_path / "out")


def test_an_unknown_architecture_is_refused_with_the_parts_that_are_unknown(decoder, tmp_path):
    settings(decoder, model_type="mamba")
    tensors(
        decoder,
        lambda found: {
            **{name: array for name, array in found.items() if "self_attn" not in name},
            **{f"model.layers.{i}.mixer.{part}": np.ones(4, np.float32) for i in (0, 1) for part in ("A_log", "D")},
            "model.layers.0.mixer.in_proj.weight": np.ones((4, 4), np.float32),
        },
    )
    with pytest.raises(
        ModelError,
        match=r"unknown model_type 'mamba'\. .*Known: .*llama.* no family has: "
        r"model\.layers\.\{i\}\.mixer, model\.layers\.\{i\}\.mixer\.in_proj\.$",
    ):
        packed_of(decoder, tmp_path / "out")


@pytest.mark.parametrize("fault", ["head", "tie"])
def test_a_packed_folder_whose_pair_was_taken_apart_is_refused(packed_as, tmp_path, fault):
    packed = shutil.copytree(packed_as("qwen2"), tmp_path / "packed")
    about = read_json(packed / "quantized.json")
    if fault == "head":
        about["layers"] = [layer for layer in about["layers"] if layer["name"] != HEAD]
        (packed / "quantized.json").write_text(json.dumps(about))
        with pytest.raises(ArtifactError, match=r"lacks lm_head\.weight"):
            built(packed)
    else:
        settings(packed, vocab_size=300)
        with pytest.raises(ModelError, match=r"embed_tokens: packed as 262 x 64, config\.json makes it 300 x 64"):
            built(packed)


def sizes_of(folder, **changes):
    source = open_folder(folder)
    from edgepeft.backbone.check import check_model

    return sizes(Config(model=str(folder), **TASK, **changes), source, check_model(source))


def test_a_plan_tells_the_size_of_a_lora_and_of_no_other_method(folder_of):
    told = {
        tag: "adapter" in {row["part"] for row in sizes_of(folder_of("llama"), method=tag)}
        for tag in ("lora", "dora", "qalora", "share-layers", "ia3", "prompt", "experts", "bitfit")
    }
    assert [tag for tag in told if told[tag]] == ["lora", "dora", "qalora"]


@pytest.mark.parametrize(("tag", "embedding"), FORMAT_PAIRS)
@every_kind
def test_a_plan_gives_the_sizes_that_come_out(folder_of, packed_as, kind, tag, embedding):
    packed = packed_as(kind, tag, embedding)
    header, _, _ = tensor_header(packed / "weights.safetensors")
    spans = [entry["data_offsets"] for entry in header.values()]
    rows = {row["part"]: row for row in sizes_of(folder_of(kind), format=tag, embedding_format=embedding)}
    shipped = sum(row["shipped"] for part, row in rows.items() if part not in ("adapter", "sum"))
    assert shipped * 1e6 == pytest.approx(sum(end - start for start, end in spans))
    assert ("head" in rows) == (kind in UNTIED)
