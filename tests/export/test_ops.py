"""The op against its numpy reference: the body on stock ONNX Runtime and the node on our library, over the tables."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepeft.export import ops
from edgepeft.quant.formats import FORMATS, TILE_ROWS

FORMAT_TAGS = sorted(FORMATS)


def make_inputs(tag, leading, k, rows, rank, dtype=np.float16, gate="one", scales="one", bias="some", offset=0, seed=0):
    """Random inputs of one node, in order. `rank` is a number or one per group; `offset`: blocks of w_offset."""
    rng = np.random.default_rng(seed)
    n = sum(rows)
    packed = FORMATS[tag].quantize(rng.standard_normal((n, k), np.float32) / np.sqrt(k))
    x = rng.standard_normal((*leading, k), np.float32)
    one = np.ones(1, np.float32)
    inputs = [x, packed.w, packed.scale, one if scales == "one" else rng.random(k, np.float32) + 0.5]
    for n_g, r in zip(rows, np.broadcast_to(rank, len(rows)), strict=True):
        shape = {"one": (1,), "rank": (r,), "token": (*leading, r), "text": (*leading[:-1], 1, r)}[gate]
        inputs += [
            (rng.standard_normal((r, k)) / np.sqrt(k)).astype(dtype),
            rng.standard_normal((r, n_g)).astype(dtype),
            one if gate == "one" else rng.standard_normal(shape).astype(np.float32),
            one if scales == "one" else rng.random(n_g, np.float32) + 0.5,
            0 * one if bias == "none" else rng.standard_normal(n_g, np.float32),
        ]
    shape = offset, len(packed.w) * TILE_ROWS
    return [*inputs, (rng.standard_normal(shape) / np.sqrt(k)).astype(dtype)] if offset else inputs


def has_offset(rows, inputs):
    return len(inputs) > len(ops.input_names(len(rows)))


def node_model(tag, k, rows, inputs, activation="float"):
    """One node as a model: weights constant, x and the adapter's tensors fed."""
    offset = has_offset(rows, inputs)
    names = ops.input_names(len(rows), offset)
    dims = dict(zip(names, inputs, strict=True))
    fixed = {"w", "w_scale", "w_offset"} & set(names)
    to_proto = helper.np_dtype_to_tensor_dtype
    fed = [
        helper.make_tensor_value_info(n, to_proto(a.dtype), [f"{n}.{i}" for i in range(a.ndim)])
        for n, a in dims.items()
        if n not in fixed
    ]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ops.output_names(len(rows))]
    node = helper.make_node(
        ops.op_type(tag, len(rows), offset),
        names,
        ops.output_names(len(rows)),
        domain=ops.DOMAIN,
        **ops.attributes(k, rows, activation),
    )
    graph = helper.make_graph([node], "one", fed, outs, [numpy_helper.from_array(dims[n], n) for n in sorted(fixed)])
    opsets = [
        helper.make_opsetid("", ops.OPSET),
        helper.make_opsetid(ops.DOMAIN, ops.VERSION),
        helper.make_opsetid("com.microsoft", 1),
    ]
    return helper.make_model(
        graph, functions=[ops.function_proto(tag, len(rows), offset)], opset_imports=opsets, ir_version=ops.IR_VERSION
    )


def run_op(tag, k, rows, inputs, activation="float", library=None):
    """Run one node, by its body or by our library."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library))
    model = node_model(tag, k, rows, inputs, activation).SerializeToString()
    session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
    feeds = dict(zip(ops.input_names(len(rows), has_offset(rows, inputs)), inputs, strict=True))
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})


@pytest.fixture(scope="session")
def library():
    """Our op library for this machine."""
    from edgepeft.deploy.compile import host_library

    return host_library()


def worst(tag, activation, rows, inputs, outputs):
    """Largest |y - reference| / (tolerance * magnitude); NaN counts as infinite."""
    wanted = ops.reference(tag, activation, rows, inputs)
    sizes = ops.magnitude(tag, rows, inputs)
    limit = ops.tolerance(tag, activation, inputs[0].shape[-1])
    ratios = [np.abs(y - w) / (limit * s + 1e-30) for y, w, s in zip(outputs, wanted, sizes, strict=True)]
    assert [y.shape for y in outputs] == [w.shape for w in wanted]
    return max(float(np.nan_to_num(r, nan=np.inf).max(initial=0)) for r in ratios)


K = 384
CASES = [
    {"leading": (1,), "rows": (48,), "rank": 4},
    {"leading": (2, 5), "rows": (40,), "rank": 3},  # N is no multiple of 16
    {"leading": (3, 4), "rows": (32, 16, 48), "rank": (4, 0, 7), "dtype": np.float32},
    {"leading": (2, 3), "rows": (16, 32), "rank": 5, "gate": "rank", "scales": "some"},
    {"leading": (2, 3), "rows": (16, 32), "rank": 5, "gate": "token", "scales": "some", "dtype": np.float32},
    {"leading": (2, 3), "rows": (16, 32), "rank": 5, "gate": "text", "scales": "some"},
    {"leading": (7,), "rows": (33,), "rank": 0, "bias": "none"},
    {"leading": (0,), "rows": (16,), "rank": 2},
    {"leading": (1,), "rows": (40,), "rank": 0, "offset": 12},
    {"leading": (2, 5), "rows": (40,), "rank": 3, "offset": 6, "scales": "some", "dtype": np.float32},
    {"leading": (3, 4), "rows": (32, 16, 48), "rank": (4, 0, 7), "gate": "token", "offset": 3},
    {"leading": (0, 2), "rows": (16,), "rank": 2, "offset": 1},
]


@pytest.mark.parametrize("tag", FORMAT_TAGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_body_equals_reference(tag, case):
    inputs = make_inputs(tag, k=K, **case)
    assert worst(tag, "float", case["rows"], inputs, run_op(tag, K, case["rows"], inputs)) <= 1


@pytest.mark.parametrize("activation", ["int8", "float"])
@pytest.mark.parametrize("tag", FORMAT_TAGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_library_equals_reference(tag, case, activation, library):
    inputs = make_inputs(tag, k=K, **case)
    assert worst(tag, activation, case["rows"], inputs, run_op(tag, K, case["rows"], inputs, activation, library)) <= 1


@pytest.mark.parametrize("tag", FORMAT_TAGS)
def test_tolerance_bites(tag):
    """One scale off by a hundredth, one code off by one: both are found, and NaN too."""
    rows, inputs = (48,), make_inputs(tag, (4,), K, (48,), 4)
    right = run_op(tag, K, rows, inputs)
    changes = {1: lambda w: w ^ 1, 2: lambda scale: scale * np.asarray(1.01, scale.dtype)}
    for place, change in changes.items():
        wrong = list(inputs)
        wrong[place] = inputs[place].copy()
        wrong[place].reshape(-1)[17] = change(inputs[place].reshape(-1)[17])
        assert worst(tag, "float", rows, wrong, right) > 1
    right[0][1, 5] = np.nan
    assert worst(tag, "float", rows, inputs, right) == np.inf


@pytest.mark.parametrize("tag", FORMAT_TAGS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(tag, value, library):
    """Under int8 as under float: the row with it has no finite output, the others are untouched."""
    inputs = make_inputs(tag, (3,), K, (32,), 0)
    clean = run_op(tag, K, (32,), inputs, "int8", library)[0]
    inputs[0][1, 70] = value
    for y in (run_op(tag, K, (32,), inputs, "int8", library)[0], ops.reference(tag, "int8", (32,), inputs)[0]):
        assert not np.isfinite(y[1]).any()
        assert np.isfinite(y[[0, 2]]).all()
    assert np.array_equal(run_op(tag, K, (32,), inputs, "int8", library)[0][[0, 2]], clean[[0, 2]])


def test_activations_round_as_stated():
    x = np.array([[127, 2.5, -3.5, 0.5] + [0] * 60, [0] * 64, [1e-31] * 64, [np.nan] + [1] * 63], np.float32)
    q, scale = ops.quantize_activations(x, 64)
    assert q[0, 0, :4].tolist() == [127, 2, -4, 0]
    np.testing.assert_array_equal(scale[:, 0], np.array([1, 0, 0, np.nan], np.float32))
    assert not q[1:3].any()


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_schema(groups, offset):
    names = ["x", "w", "w_scale", "s_in"]
    names += [f"{name}_{g}" for g in range(groups) for name in ("a", "b", "gate", "s_out", "bias")]
    names += ["w_offset"] * offset
    body = ops.function_proto("i4b32", groups, offset)
    assert (body.domain, body.name) == ("edgepeft", f"AdapterMatMul_i4b32_g{groups}" + "_offset" * offset)
    assert list(body.input) == names
    assert list(body.output) == [f"y_{g}" for g in range(groups)]
    assert sorted(body.attribute) == ["K", "N", "activation", "n0", "n1", "n2"]
    assert ops.attributes(64, [33], "int8") == {"K": 64, "N": 48, "n0": 33, "n1": 0, "n2": 0, "activation": "int8"}
