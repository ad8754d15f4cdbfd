"""The small functions against their numpy references: the body on stock ONNX Runtime, the node on our own."""

import functools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from edgepeft.export.body import FLOAT32
from edgepeft.export.functions import FUNCTIONS
from edgepeft.export.ops import DOMAIN, IR_VERSION, OPSET, VERSION
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS

EPSILON = 1e-6
TIGHT = 4e-6  # of the largest value: float32 means of some hundred numbers, and ONNX Runtime's exp and tanh
EMBEDDINGS = [name for name in FUNCTIONS if "Embedding_" in name]
ATTENTION = {"PaddedAttention": 7, "PaddedAttention_one": 1}  # queries
CACHED = "GroupQueryAttention"  # proved in tests/kernels, against ONNX Runtime's own too
FLOATS = sorted({*FUNCTIONS} - {*EMBEDDINGS, *ATTENTION, CACHED})
HEADS = 4
ATTRIBUTES = {"epsilon": EPSILON, "num_heads": HEADS}
SHAPES = [(1, 1, 64), (2, 5, 80), (3, 2, 4, 33), (0, 64), (7, 1)]
VOCABULARY, K = 40, 384  # rows that fill no whole tile


@pytest.fixture(scope="session")
def library():
    """Our op library for this machine."""
    from edgepeft.deploy.compile import host_library

    return host_library()


def floats(name, shape, seed=0, scale=1.0):
    """Random inputs of a function on floats, in order."""
    rng = np.random.default_rng(seed)
    sizes = {"weight": shape[-1:], "bias": shape[-1:]}
    one = functools.partial(rng.normal, 0, scale)
    return [one(size=sizes.get(part, shape)).astype(np.float32) for part in FUNCTIONS[name].inputs]


def embedding(name, ids_shape, seed=0):
    """Random ids and a packed weight."""
    rng, (kind, _, tag) = np.random.default_rng(seed), name.partition("_")
    formats = {"PackedEmbedding": FORMATS, "RowEmbedding": EMBEDDING_FORMATS}[kind]
    packed = formats[tag].quantize(rng.standard_normal((VOCABULARY, K), np.float32))
    return [rng.integers(0, VOCABULARY, ids_shape), packed.w, packed.scale]


def model(name, inputs):
    """One node as a model: a packed weight is constant, all else is fed."""
    function = FUNCTIONS[name]
    attrs = {key: ATTRIBUTES[key] for key in function.attributes}
    node = helper.make_node(name, list(function.inputs), list(function.outputs), domain=DOMAIN, **attrs)
    fixed = {"w", "scale"}
    arrays = dict(zip(function.inputs, inputs, strict=True))
    fed = [
        helper.make_tensor_value_info(
            part, helper.np_dtype_to_tensor_dtype(a.dtype), [f"{part}.{i}" for i in range(a.ndim)]
        )
        for part, a in arrays.items()
        if part not in fixed
    ]
    outs = [helper.make_tensor_value_info(part, FLOAT32, None) for part in function.outputs]
    stored = [numpy_helper.from_array(a, part) for part, a in arrays.items() if part in fixed]
    graph = helper.make_graph([node], "one", fed, outs, stored)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, functions=[function.proto()], opset_imports=opsets, ir_version=IR_VERSION)


def session(name, inputs, library=None, optimized=None):
    """A session on one node, by its body or by our library."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library))
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model(name, inputs).SerializeToString(), options, ["CPUExecutionProvider"])


def run(name, inputs, library=None):
    """The outputs of one node."""
    made = session(name, inputs, library)
    feeds = dict(zip(FUNCTIONS[name].inputs, inputs, strict=True))
    return made.run(None, {item.name: feeds[item.name] for item in made.get_inputs()})


def reference(name, inputs):
    function = FUNCTIONS[name]
    return function.reference(*inputs, *(ATTRIBUTES[key] for key in function.attributes))


@pytest.mark.parametrize("where", ["body", "library"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
@pytest.mark.parametrize("name", FLOATS)
def test_floats_equal_the_reference(name, shape, scale, where, library):
    inputs = floats(name, shape, scale=scale)
    got, want = run(name, inputs, library if where == "library" else None), reference(name, inputs)
    assert [y.shape for y in got] == [w.shape for w in want]
    for y, w in zip(got, want, strict=True):
        assert np.abs(y - w).max(initial=0) <= TIGHT * np.abs(w).max(initial=0)


@pytest.mark.parametrize("where", ["body", "library"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3,), (0,), ()], ids=str)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_gives_the_rows_exactly(name, shape, where, library):
    inputs = embedding(name, shape)
    inputs[0].reshape(-1)[:1] = VOCABULARY - 1
    (got,) = run(name, inputs, library if where == "library" else None)
    (want,) = reference(name, inputs)
    assert got.dtype == want.dtype == np.float32
    assert np.array_equal(got, want)


@pytest.mark.parametrize("where", ["body", "library"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_equals_the_reference(name, where, library):
    rng, queries, keys = np.random.default_rng(0), ATTENTION[name], 7
    inputs = [rng.normal(size=(2, size, HEADS * 24)).astype(np.float32) for size in (queries, keys, keys)]
    inputs.append(np.array([[1] * 7, [1] * 4 + [0] * 3]))
    (got,), (want,) = run(name, inputs, library if where == "library" else None), reference(name, inputs)
    assert np.abs(got - want).max() <= TIGHT * np.abs(inputs[2]).max()


@pytest.mark.parametrize("name", ["RMSNorm", "SkipRMSNorm"])
def test_onnxruntime_fuses_the_norms(name, tmp_path):
    session(name, floats(name, (2, 64)), optimized=tmp_path / "model.onnx")
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert kinds == {"SimplifiedLayerNormalization"} | ({"Sum"} if name == "SkipRMSNorm" else set())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_what_is_not_finite_stays_so_in_its_row(name, value, library):
    inputs = floats(name, (3, 64))
    clean = run(name, inputs, library)[0]
    inputs[0][1, 5] = value
    for got in (run(name, inputs)[0], run(name, inputs, library)[0]):
        assert not np.isfinite(got[1]).all()
        assert np.allclose(got[[0, 2]], clean[[0, 2]], rtol=1e-5)


def test_schemas():
    """What kernels and files agree on."""
    want = {
        "RMSNorm": (["x", "weight"], ["y"], ["epsilon"]),
        "SkipRMSNorm": (["x", "skip", "weight"], ["y", "sum"], ["epsilon"]),
        "SkipLayerNorm": (["x", "skip", "weight", "bias"], ["y"], ["epsilon"]),
        "ErfGelu": (["x"], ["y"], []),
        **{name: (["q", "k", "v", "mask"], ["y"], ["num_heads"]) for name in ATTENTION},
        "GatedActivation_silu": (["gate", "up"], ["y"], []),
        "GatedActivation_gelu_tanh": (["gate", "up"], ["y"], []),
        **{name: (["ids", "w", "scale"], ["y"], []) for name in EMBEDDINGS},
        CACHED: (
            ["q", "k", "v", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"],
            ["y", "present_key", "present_value"],
            ["num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "rotary_interleaved"],
        ),
    }
    protos = {name: function.proto() for name, function in FUNCTIONS.items()}
    assert {n: (list(p.input), list(p.output), list(p.attribute)) for n, p in protos.items()} == want
    assert {
        (p.domain, n == p.name, p.opset_import[0].domain, p.opset_import[0].version) for n, p in protos.items()
    } == {("edgepeft", True, "", 21)}
