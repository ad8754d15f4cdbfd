"""The decoder's graph, on stock ONNX Runtime and our library, against transformers and PEFT: whole and step by step."""

import numpy as np
import onnx
import pytest
import torch
from builders import DECODERS

from edgepeft.adapt import peft_files
from edgepeft.artifact import digests, read_tensors
from edgepeft.backbone.families import family_of
from edgepeft.errors import ModelError
from edgepeft.export import decoder, ops
from edgepeft.export.emitter import AdapterFile, Weights
from edgepeft.export.parity import OnnxModel, differences, largest_error, torch_trace
from edgepeft.export.stage import check
from edgepeft.runtime.adapters import for_graph
from tests.export.tiny_decoder import CONTEXT, RANK, Stepper, export_decoder, random_adapter, write_graph

TIGHT = 1e-4  # float32 rounding over the layers
LENGTH, GENERATED = 40, 36  # beyond every window of DECODERS

CASES = [
    *((kind, "i4b32", "i4b32") for kind in DECODERS),
    ("llama", "i8c", "i8b32"),
    ("qwen2", "nf4b64", "i8b32"),
    ("gemma2", "i8c", "float"),
    ("qwen3", "i4b64", "float"),
    ("phi3", "nf4b64", "i8b32"),
]
LIBRARIES = ["stock", "library"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What is this small takes longer on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A function that gives an exported decoder, each made once: do not write into it."""
    made = {}

    def get(*case, **changes):
        key = (*case, *sorted(changes.items()))
        if key not in made:
            made[key] = export_decoder(tmp_path_factory.mktemp("decoder"), *case, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def stepper(exported):
    """A function that gives a session on an exported decoder, each made once; `where` is one of LIBRARIES."""
    from edgepeft.deploy.compile import host_library

    made = {}

    def get(where, *case, **changes):
        key = (where, *case, *sorted(changes.items()))
        if key not in made:
            made[key] = Stepper(exported(*case, **changes), host_library() if where == "library" else None)
        return made[key]

    return get


def tokens(rows=1, length=LENGTH, seed=0):
    """Random ids."""
    return np.random.default_rng(seed).integers(3, 262, (rows, length))


def by_torch(model, ids, **more):
    """Logits of every token."""
    with torch.no_grad():
        return model(torch.from_numpy(ids), **more).logits.numpy()


def rank_zero(session):
    """Feeds that turn the adapter off."""
    shapes = {item.name: item.shape for item in session.get_overridable_initializers() if "lora_" in item.name}
    return {name: np.zeros((0, shape[1]), np.float16) for name, shape in shapes.items()}


@pytest.mark.parametrize("where", LIBRARIES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_prompt_equals_transformers(exported, stepper, case, where):
    """With the adapter and without it, at every token."""
    model, graph, ids = exported(*case), stepper(where, *case), tokens()
    want, base = by_torch(model.torch, ids), by_torch(model.base, ids)
    assert largest_error(graph.whole(ids), want) < TIGHT
    assert largest_error(graph.whole(ids, rank_zero(graph.session)), base) < TIGHT
    assert largest_error(want, base) > 0.05


@pytest.mark.parametrize("where", LIBRARIES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_rows_under_stacked_adapters_equal_each_adapter_alone(exported, stepper, tmp_path, case, where):
    """A and B of the exported adapter, none and another stacked along R, a gate that is each row's own."""
    model, graph, ids = exported(*case), stepper(where, *case), tokens(3, 9)
    quantized, folder = model.run.path("quantized"), "adapter_model.safetensors"
    files = [model.adapter, random_adapter(quantized, tmp_path, rank=7, seed=3)]
    own = [for_graph(read_tensors(path / folder)) for path in files]
    alone = [graph.whole(ids[:1]), graph.whole(ids[1:2], rank_zero(graph.session)), graph.whole(ids[2:], own[1])]
    feeds = {name: np.concatenate([part[name] for part in own]) for name in own[0]}
    gates = [gate for name in feeds if (gate := name.replace("lora_A.weight", "gate")) != name]
    ranks = np.repeat([0, 1], [RANK, 7])
    rows = np.array([ranks == place for place in (0, 2, 1)], np.float32)[:, None]
    feeds |= dict.fromkeys(gates, rows)
    graph.start(3)
    found = graph.step(ids, feeds={"logits_to_keep": np.array([9]), **feeds})
    for row, want in enumerate(alone):
        assert largest_error(found[row : row + 1], want) < TIGHT


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_parts_and_single_tokens_equal_the_whole(stepper, case):
    """Whatever the prompt is cut into, on buffers that past and present share."""
    graph, ids = stepper("library", *case), tokens(seed=1)
    whole = graph.whole(ids)
    for parts in ([1] * LENGTH, [17] + [1] * (LENGTH - 17), [5, 9, 1, 3, 12, 1, 1, 8]):
        graph.start()
        ends = np.cumsum(parts)
        got = [graph.step(ids[:, end - part : end]) for part, end in zip(parts, ends, strict=True)]
        assert [logits.shape[1] for logits in got] == [1] * len(parts)
        assert largest_error(np.concatenate(got, 1), whole[:, ends - 1]) < TIGHT


@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_tokens_equal_generate(exported, stepper, kind):
    case = (kind, "i4b32", "i4b32")
    model, ids = exported(*case).torch, tokens(length=13, seed=2)
    mask = torch.ones(ids.shape, dtype=torch.int64)
    with torch.no_grad():
        how = {"max_new_tokens": GENERATED, "do_sample": False, "eos_token_id": None}
        want = model.generate(torch.from_numpy(ids), attention_mask=mask, **how).tolist()
    for where in LIBRARIES:
        assert greedy(stepper(where, *case), ids).tolist() == want


def greedy(graph, ids):
    """Prompt and answer, GENERATED tokens long."""
    graph.start()
    logits = graph.step(ids)
    for _ in range(GENERATED):
        token = logits[:, -1:].argmax(-1)
        ids = np.concatenate([ids, token], 1)
        logits = graph.step(token)
    return ids


@pytest.mark.parametrize("kind", DECODERS)
def test_rows_of_different_lengths(stepper, kind):
    """Padded on the right in the first run, each row is what it is alone; then all grow together.

    Unless asked for more, the logits are those of each row's own last token.
    """
    graph, lengths = stepper("stock", kind, "i4b32", "i4b32"), (21, 6, 1)
    ids, more = tokens(3, 21, seed=3), tokens(3, 12, seed=4)
    alone = [graph.whole(np.concatenate([ids[i : i + 1, :n], more[i : i + 1]], 1)) for i, n in enumerate(lengths)]
    for fill in (0, 99):
        padded = np.where(np.arange(21)[None] < np.array(lengths)[:, None], ids, fill)
        graph.start(3)
        last = graph.step(padded, lengths)
        graph.start(3)
        first = graph.step(padded, lengths, {"logits_to_keep": np.array([0])})
        later = np.concatenate([graph.step(more[:, i : i + 1]) for i in range(12)], 1)
        for i, n in enumerate(lengths):
            assert largest_error(first[i : i + 1, :n], alone[i][:, :n]) < TIGHT
            assert largest_error(last[i : i + 1], alone[i][:, n - 1 : n]) < TIGHT
            assert largest_error(later[i : i + 1], alone[i][:, n:]) < TIGHT


@pytest.mark.parametrize("keep", [1, 3, LENGTH, 0, 1000])
def test_logits_to_keep(stepper, keep):
    graph, ids = stepper("stock", "llama", "i4b32", "i4b32"), tokens()
    graph.start()
    got = graph.step(ids, feeds={"logits_to_keep": np.array([keep])})
    count = keep if 0 < keep < LENGTH else LENGTH
    assert largest_error(got, graph.whole(ids)[:, -count:]) < 1e-5


@pytest.mark.parametrize("rank", [1, 9])
@pytest.mark.parametrize("kind", ["llama-biased", "phi3"])
def test_another_adapter_is_fed_without_a_reload(exported, stepper, tmp_path, kind, rank):
    case = (kind, "i4b32", "i4b32")
    model, graph, ids = exported(*case), stepper("library", *case), tokens(seed=5)
    other = random_adapter(model.run.path("quantized"), tmp_path, rank, seed=rank)
    before, feeds = graph.whole(ids), for_graph(read_tensors(other / peft_files.TENSORS))
    assert largest_error(graph.whole(ids, feeds), by_torch(model.torch_model(other), ids)) < TIGHT
    assert np.array_equal(graph.whole(ids), before)


def test_a_model_without_adapter_is_the_base(exported, stepper):
    case = ("qwen3", "i4b32", "i4b32")
    bare = stepper("stock", *case, adapter=False)
    assert list(bare.shapes()) == ["logits_to_keep"]
    assert largest_error(bare.whole(tokens()), by_torch(exported(*case).base, tokens())) < TIGHT


@pytest.mark.parametrize("kind", DECODERS)
def test_layers_are_named_and_computed_as_in_transformers(exported, kind):
    model, ids = exported(kind, "i4b32", "i4b32"), tokens()
    about, graph = model.about, OnnxModel(model.folder, None, traced=True)
    past = np.zeros((1, about.kv_heads, 0, about.head_dim), np.float32)
    pasts = {f"past_key_values.{i}.{part}": past for i in range(about.layers) for part in ("key", "value")}
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    got = graph.trace({**batch, **pasts}, {"logits_to_keep": np.array([LENGTH])})
    rows = differences(got, torch_trace(model.torch, batch, graph.layers), TIGHT)
    assert [row.layer for row in rows if row.missed] == []
    family = family_of(model.settings, kind)
    norms = {role: name for role, name in family.norms.items() if role not in ("q_norm", "k_norm")}
    modules = {name for roles in (family.linears, norms) for name, _ in family.modules(roles, model.settings)}
    outputs = {f"model.layers.{i}" for i in range(about.layers)} | {"logits"}
    outputs |= {"lm_head"} if about.logits_softcap else set()
    embedding = {"model.embed_tokens"} if about.embedding_scale == 1 else set()
    assert {row.layer for row in rows} == modules | outputs | embedding


@pytest.mark.parametrize(("kind", "windows"), [("mistral", [8, 8]), ("gemma2", [8, -1]), ("gemma3", [8, -1])])
def test_a_window_is_one_where_it_is_smaller_than_the_context(exported, kind, windows):
    """And it bites in the tests above: without it their logits would be others."""
    model, ids = exported(kind, "i4b32", "i4b32"), tokens()
    assert [attention(node)["local_window_size"] for node in build_nodes(model, 64)] == windows
    assert [attention(node)["local_window_size"] for node in build_nodes(model, 8)] == [-1, -1]
    narrow, settings = by_torch(model.base, ids), model.base.config
    settings.sliding_window = 100
    wide = by_torch(model.base, ids)
    settings.sliding_window = 8
    assert largest_error(wide[:, :8], narrow[:, :8]) < 1e-5
    assert largest_error(wide[:, 8:], narrow[:, 8:]) > 1e-2


def build_nodes(model, context):
    """The nodes of a graph without an adapter."""
    weights, none = Weights(model.run.path("quantized")), AdapterFile.read(None)
    graph = decoder.build(family_of(model.settings, ""), model.settings, weights, none, "float", context)
    return [node for node in graph.nodes if node.op_type == "GroupQueryAttention"]


def attention(node):
    """A node's attributes."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_file_stays_within_what_the_oldest_runtime_reads(exported, case):
    """ONNX Runtime 1.20: opset 21, IR version 10, and of GroupQueryAttention the inputs and attributes of its time."""
    folder = exported(*case).folder
    check(folder / "model.onnx")
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    assert proto.ir_version <= 10
    assert {o.domain: o.version for o in proto.opset_import} == {"": 21, "com.microsoft": 1, "edgepeft": ops.VERSION}
    known = {"num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "rotary_interleaved"}
    for node in (node for node in proto.graph.node if node.op_type == "GroupQueryAttention"):
        assert (set(attention(node)), len(node.input)) == (known, 9)


@pytest.mark.parametrize("kind", DECODERS)
def test_onnxruntime_finds_nothing_to_fold(exported, kind, tmp_path):
    """Each kind of change that it makes costs a third of loading, as it goes through the whole graph again."""
    import onnxruntime as ort

    from edgepeft.deploy.compile import host_library

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "after.onnx"), 3
    options.register_custom_ops_library(str(host_library()))
    path = exported(kind, "i4b32", "i4b32").folder / "model.onnx"
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    before, after = (
        sorted((node.op_type, *node.output) for node in onnx.load(file, load_external_data=False).graph.node)
        for file in (path, tmp_path / "after.onnx")
    )
    assert after == before


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_tied_head_is_stored_once(exported, case):
    model = exported(*case)
    proto = onnx.load(model.folder / "model.onnx", load_external_data=False)
    names = [t.name for t in proto.graph.initializer if t.name.startswith(("lm_head.q", "lm_head.w", "model.embed_"))]
    embedding = ["weight"] if case[2] == "float" else ["qscale", "qweight"]
    want = [f"model.embed_tokens.{part}" for part in embedding]
    assert sorted(names) == ([] if model.about.tied else ["lm_head.qscale", "lm_head.qweight"]) + want


def test_export_is_the_same_every_time(exported, tmp_path):
    model = exported("gemma3", "i4b32", "i4b32")
    write_graph(model.run, tmp_path, model.adapter, model.settings, CONTEXT)
    assert digests(tmp_path) == digests(model.folder)


@pytest.mark.parametrize(
    ("kind", "change", "context", "words"),
    [
        ("llama", {"head_dim": 24}, 64, ["a head size of 24", "a rotated part of the head of 24"]),
        ("mistral", {"sliding_window": 1}, 64, ["window of one token"]),
        ("llama", {}, 257, ["a context of 257 tokens", "1 to 256"]),
        ("llama", {}, 0, ["a context of 0 tokens"]),
        ("phi4", {}, 65, ["a context of 65 tokens", "1 to 64"]),
    ],
)
def test_what_would_not_be_exact_is_refused(exported, kind, change, context, words):
    model = exported(kind, "i4b32", "i4b32")
    weights, none = Weights(model.run.path("quantized")), AdapterFile.read(None)
    with pytest.raises(ModelError) as raised:
        decoder.build(family_of(model.settings, kind), {**model.settings, **change}, weights, none, "float", context)
    assert [word for word in words if word not in str(raised.value)] == []
