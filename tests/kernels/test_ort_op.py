"""The op inside ONNX Runtime against its numpy reference: every format, kernel and form of input; and its refusals."""

import ctypes

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepeft.deploy.compile import host_library
from edgepeft.export import ops
from edgepeft.quant.formats import FORMATS

GROUPS = {1: [37], 2: [16, 32], 3: [48, 16, 16]}
ELEMENT = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
}


def some(rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def inputs(
    format: str, k: int, rows, leading=(3,), rank=16, dtype=np.float16, scaled=False, gate="one", offset=0, seed=0
) -> list[np.ndarray]:
    """Return the node's inputs in order; rank may be one number, or one per group; offset: blocks of w_offset."""
    rng = np.random.default_rng(seed)
    ranks = [rank] * len(rows) if isinstance(rank, int) else rank
    packed = FORMATS[format].quantize(some(rng, sum(rows), k) / k**0.5)
    one = np.ones(1, np.float32)
    values = [some(rng, *leading, k), packed.w, packed.scale, 1 + 0.5 * some(rng, k) if scaled else one]
    for n, r in zip(rows, ranks, strict=True):
        gates = {"one": one, "number": 2 * one, "vector": some(rng, r), "per row": some(rng, *leading, r)}
        gates["per text"] = some(rng, *leading[:-1], 1, r)
        gates["for all rows"] = some(rng, *(1 for _ in leading), r)
        gates["one for all rows"] = np.ones((*(1 for _ in leading), 1), F)
        values += [(some(rng, r, k) / k**0.5).astype(dtype), some(rng, r, n).astype(dtype), gates[gate]]
        values += [1 + 0.5 * some(rng, n) if scaled else one, some(rng, n)]
    return [*values, (some(rng, offset, 16 * len(packed.w)) / k**0.5).astype(dtype)] if offset else values


def session(
    format: str, k: int, rows, values, activation="int8", fed=("x",), threads=2, version=ops.VERSION, **changed
):
    """A session of one node; inputs named in `fed` are graph inputs, the others constants."""
    offset = len(values) > len(ops.input_names(len(rows)))
    names = ops.input_names(len(rows), offset)
    attributes = {**ops.attributes(k, rows, activation), **changed}
    node = helper.make_node(
        ops.op_type(format, len(rows), offset),
        names,
        ops.output_names(len(rows)),
        "node",
        domain=ops.DOMAIN,
        **attributes,
    )
    shapes = {name: [f"{name}{i}" for i in range(value.ndim)] for name, value in zip(names, values, strict=True)}
    pairs = dict(zip(names, values, strict=True))
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info(n, ELEMENT[pairs[n].dtype.name], shapes[n]) for n in names if n in fed],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ops.output_names(len(rows))],
        [numpy_helper.from_array(pairs[n], n) for n in names if n not in fed],
    )  # fmt: skip
    imports = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, version)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ops.IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(host_library()))
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: made.run(None, {n: pairs[n] for n in names if n in fed})


def agree(format: str, activation: str, rows, values, outputs) -> None:
    limits = ops.magnitude(format, rows, values)
    k = values[0].shape[-1]
    for y, expected, limit in zip(outputs, ops.reference(format, activation, rows, values), limits, strict=True):
        assert y.shape == expected.shape
        assert y.dtype == np.float32
        assert np.isfinite(y).all()
        assert (np.abs(y - expected) <= ops.tolerance(format, activation, k) * limit).all()


@pytest.mark.parametrize("activation", ["int8", "float"])
@pytest.mark.parametrize("format", FORMATS)
def test_formats_and_groups_under_every_kernel(kernel, library, format: str, activation: str) -> None:
    row = f"{format}_{'int8' if activation == 'int8' else 'float32'}_{kernel}"
    if row not in library.edgepeft_kernels().decode().split():
        pytest.skip(f"{kernel} has no row for {format}, {activation}")
    for rows in GROUPS.values():
        cases = ((1,), 16, 0), ((2, 3), [5, 0, 70][: len(rows)], 0), ((40,), 8, 0), ((1,), 0, 6), ((2, 9), 20, 12)
        for leading, rank, offset in cases:
            values = inputs(format, 384, rows, leading, rank, offset=offset)
            agree(format, activation, rows, values, session(format, 384, rows, values, activation)())


GATES = ["one", "number", "vector", "per row", "per text", "for all rows", "one for all rows"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("m", [1, 3, 7, 300])
def test_gates_scales_and_adapter_types(m: int, gate: str, dtype) -> None:
    for rank in (1, 16, 33, 130):
        leading = (m, 4) if gate == "per text" else (m,)
        values = inputs("i4b32", 256, [96, 32], leading, rank, dtype, scaled=True, gate=gate)
        agree("i4b32", "int8", [96, 32], values, session("i4b32", 256, [96, 32], values)())


def test_everything_but_the_weight_may_come_at_run_time() -> None:
    values = inputs("nf4b64", 128, [48], (2, 5), scaled=True, gate="per row")
    fed = [name for name in ops.input_names(1) if name not in ("w", "w_scale")]
    agree("nf4b64", "int8", [48], values, session("nf4b64", 128, [48], values, fed=fed)())


@pytest.mark.parametrize("bias", [0.0, -2.5])
@pytest.mark.parametrize("m", [1, 6])
def test_a_neutral_scale_or_bias_may_be_any_number(m: int, bias: float) -> None:
    values = inputs("i4b32", 64, [37], (m,))
    values[3], values[7], values[8] = (np.full(1, number, np.float32) for number in (3, 0.5, bias))
    agree("i4b32", "int8", [37], values, session("i4b32", 64, [37], values)())


def test_a_file_of_another_version_is_refused() -> None:
    values = inputs("i4b32", 64, [32])
    with pytest.raises(Exception, match=r"AdapterMatMul_i4b32_g1.* is not a registered function/op"):
        session("i4b32", 64, [32], values, version=ops.VERSION - 1)


@pytest.mark.parametrize("activation", ["int8", "float"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_mixed_batch_is_what_it_is_alone(activation: str, threads: int) -> None:
    """Adapters stacked along R, of which a gate leaves each row its own: the bits of that adapter by itself."""
    rows, owns = [96, 32], [2, 0, 1, 2, 3]  # the last row has no adapter
    x, w, w_scale, s_in, *groups = inputs("i4b32", 256, rows, (len(owns),), 48)
    gate = np.repeat(np.arange(3) == np.array(owns)[:, None], 16, axis=1).astype(F)
    stacked = [x, w, w_scale, s_in]
    for a, b, _, s_out, bias in (groups[:5], groups[5:]):
        stacked += [a, b, gate, s_out, bias]
    mixed = session("i4b32", 256, rows, stacked, activation, fed=("x", "gate_0", "gate_1"), threads=threads)()
    agree("i4b32", activation, rows, stacked, mixed)
    for row, own in enumerate(owns):
        alone = [x[row : row + 1], w, w_scale, s_in]
        part = slice(16 * own, 16 * own + 16)
        for a, b, _, s_out, bias in (groups[:5], groups[5:]):
            alone += [a[part], b[part], np.ones(1, F), s_out, bias]
        for y, expected in zip(mixed, session("i4b32", 256, rows, alone, activation)(), strict=True):
            np.testing.assert_array_equal(y[row], expected[0])


@pytest.mark.parametrize("m", [1, 2, 5, 40])
@pytest.mark.parametrize("rank", [40, 300])
def test_what_no_gate_lets_through_is_not_computed(rank: int, m: int) -> None:
    values = inputs("i4b32", 128, [37], (m,), rank, gate="per row")
    values[4], values[5], values[6] = (values[i].copy() for i in (4, 5, 6))
    values[6][..., 16:32] = 0
    clean = session("i4b32", 128, [37], values)()[0]
    values[4][16:32], values[5][16:32] = np.nan, np.nan
    np.testing.assert_array_equal(session("i4b32", 128, [37], values)()[0], clean)


def test_no_rows_give_no_rows() -> None:
    values = inputs("i4b32", 64, [32], (0, 4))
    assert session("i4b32", 64, [32], values)()[0].shape == (0, 4, 32)


@pytest.mark.parametrize("activation", ["int8", "float"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_not_finite_in_its_row_alone(bad: float, activation: str) -> None:
    values = inputs("i4b32", 128, [32], (6,), rank=0)
    values[0][2, 77] = bad
    y = session("i4b32", 128, [32], values, activation)()[0]
    assert not np.isfinite(y[2]).any()
    assert np.isfinite(np.delete(y, 2, axis=0)).all()


def test_outputs_keep_the_names_of_dimensions() -> None:
    values = inputs("i4b32", 64, [32], (2, 3))
    node = helper.make_node(
        ops.op_type("i4b32", 1), ops.input_names(1), ["y"], domain=ops.DOMAIN, **ops.attributes(64, [32], "int8")
    )
    shape = ["batch", "sequence", 64]
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, n) for n, v in zip(ops.input_names(1)[1:], values[1:], strict=True)],
    )  # fmt: skip
    imports = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(host_library()))
    model = helper.make_model(graph, opset_imports=imports, ir_version=ops.IR_VERSION)
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert made.get_outputs()[0].shape == ["batch", "sequence", 32]


def replaced(values: list[np.ndarray], index: int, value: np.ndarray) -> list[np.ndarray]:
    return [*values[:index], value, *values[index + 1 :]]


F = np.float32
WRONG = {
    "x": (0, np.zeros((3, 128), F), r"input 0 \(x\): expected float32 \[..,64\], found float32 \[3,128\]"),
    "w": (1, np.zeros((2, 3, 256), np.uint8), r"input 1 \(w\): expected uint8 \[2,2,256\], found uint8 \[2,3,256\]"),
    "w_scale": (
        2,
        np.zeros((2, 1, 16), np.float16),
        r"input 2 \(w_scale\): expected \[2,2,16\], found float16 \[2,1,16\]",
    ),
    "s_in": (3, np.zeros(5, F), r"input 3 \(s_in\): expected float32 \[1\] or \[64\], found float32 \[5\]"),
    "a": (
        4,
        np.zeros((16, 32), np.float16),
        r"input 4 \(a0\): expected float16 or float32 \[R,64\], found float16 \[16,32\]",
    ),
    "a type": (
        4,
        np.zeros((16, 64), np.int32),
        r"input 4 \(a0\): expected float16 or float32 \[R,64\], found int32 \[16,64\]",
    ),
    "rank": (
        5,
        np.zeros((8, 32), np.float16),
        r"input 5 \(b0\): expected float16 \[16,32\], to go with a, found float16 \[8,32\]",
    ),
    "b type": (
        5,
        np.zeros((16, 32), F),
        r"input 5 \(b0\): expected float16 \[16,32\], to go with a, found float32 \[16,32\]",
    ),
    "gate": (6, np.zeros((2, 16), F), r"input 6 \(gate0\): expected float32 \[1\], \[16\] or \[..,16\]"),
    "s_out": (7, np.zeros(3, F), r"input 7 \(s_out0\): expected float32 \[1\] or \[32\], found float32 \[3\]"),
    "bias": (8, np.zeros(48, F), r"input 8 \(bias0\): expected float32 \[1\] or \[32\], found float32 \[48\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_input_is_named(what: str) -> None:
    index, value, message = WRONG[what]
    values = replaced(inputs("i4b32", 64, [32]), index, value)
    with pytest.raises(Exception, match=f"AdapterMatMul_i4b32_g1 'node': {message}"):
        session("i4b32", 64, [32], values)()


@pytest.mark.parametrize("shape", [(3, 32), (2, 37), (0, 32), (64,)])
def test_offsets_that_do_not_fit_are_named(shape) -> None:
    values = [*inputs("i4b32", 64, [32]), np.zeros(shape, np.float16)]
    with pytest.raises(
        Exception, match=r"input 9 \(w_offset\): expected float16 or float32 \[J,32\], K/J a multiple of 32"
    ):
        session("i4b32", 64, [32], values)


def test_offsets_that_are_no_constant_are_refused() -> None:
    with pytest.raises(Exception, match="input w_offset: expected a constant initializer"):
        session("i4b32", 64, [32], inputs("i4b32", 64, [32], offset=2), fed=("x", "w_offset"))


def test_a_weight_that_is_no_constant_is_refused() -> None:
    with pytest.raises(Exception, match=r"inputs 1 \(w\) and 2 \(w_scale\): expected constant initializers"):
        session("i4b32", 64, [32], inputs("i4b32", 64, [32]), fed=("x", "w"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"K": 50}, "attribute K: expected a positive multiple of 32, found 50"),
        ({"N": 48}, "attribute N: expected 32, .*found 48"),
        ({"n0": 0}, "n0: expected at least 1, found 0"),
        ({"activation": "int4"}, "attribute activation: expected int8 or float, found int4"),
    ],
)
def test_a_wrong_attribute_is_named(changed, message: str) -> None:
    with pytest.raises(Exception, match=message):
        session("i4b32", 64, [32], inputs("i4b32", 64, [32]), **changed)


def test_kernels_can_be_forced_by_row_and_by_isa(library) -> None:
    rows = library.edgepeft_kernels().decode().split()
    assert rows[-1].endswith("_scalar")
    assert library.edgepeft_force_kernel(rows[0].encode()) == 0
    assert library.edgepeft_force_kernel(b"scalar") == 0
    assert library.edgepeft_force_kernel(b"sparc") == -1
    assert library.edgepeft_force_kernel(None) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_and_matmul_from_c(library, format: str) -> None:
    spec, (m, n, k) = FORMATS[format], (5, 37, 256)
    packed = spec.quantize(some(np.random.default_rng(1), n, k))
    x, y, w = some(np.random.default_rng(2), m, k), np.zeros((m, n), F), np.zeros((n, k), F)
    size = ctypes.c_int64
    at = [array.ctypes.data_as(ctypes.c_void_p) for array in (packed.w, packed.scale, w, x, y)]
    assert library.edgepeft_dequantize(format.encode(), 0, at[0], at[1], size(n), size(k), at[2]) == 0
    assert (w == spec.dequantize(packed)).all()
    assert library.edgepeft_dequantize(b"i3", 0, at[0], at[1], size(n), size(k), at[2]) == -1
    for row in library.edgepeft_kernels().decode().split():
        kind = int("_int8_" in row)
        said = library.edgepeft_matmul(
            format.encode(), row.encode(), kind, at[0], at[1], size(n), size(k), at[3], size(m), at[4]
        )
        assert said == (0 if row.startswith(f"{format}_") else -1)
        if said == 0:
            assert np.abs(y - x @ w.T).max() <= (0.02 if kind else 1e-5) * np.abs(x @ w.T).max() + 1e-4
