"""The op's body under stock ONNX Runtime against the numpy reference, over formats, groups, rows, ranks and dtypes."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepeft.export import ops
from edgepeft.quant.formats import FORMATS

FORMAT_TAGS = sorted(FORMATS)


def make_inputs(tag, leading, k, rows, rank, dtype=np.float16, gate="one", scales="one", seed=0):
    """Random inputs of one node, in order. `rank` is a number or one per group."""
    rng = np.random.default_rng(seed)
    n = sum(rows)
    packed = FORMATS[tag].quantize(rng.standard_normal((n, k), np.float32) / np.sqrt(k))
    bias = np.zeros(len(packed.w) * 16, np.float32)
    bias[:n] = rng.standard_normal(n)
    x = rng.standard_normal((*leading, k), np.float32)
    one = np.ones(1, np.float32)
    inputs = [x, packed.w, packed.scale, bias, one if scales == "one" else rng.random(k, np.float32) + 0.5]
    for n_g, r in zip(rows, np.broadcast_to(rank, len(rows)), strict=True):
        shape = {"one": (1,), "rank": (r,), "token": (*leading, r)}[gate]
        inputs += [
            (rng.standard_normal((r, k)) / np.sqrt(k)).astype(dtype),
            rng.standard_normal((n_g, r)).astype(dtype),
            one if gate == "one" else rng.standard_normal(shape).astype(np.float32),
            one if scales == "one" else rng.random(n_g, np.float32) + 0.5,
        ]
    return inputs


def node_model(tag, k, rows, inputs, activation="float"):
    """One node as a model: weights constant, x and the adapter's tensors fed."""
    names = ops.input_names(len(rows))
    dims = dict(zip(names, inputs, strict=True))
    fixed = {"w", "w_scale", "bias"}
    to_proto = helper.np_dtype_to_tensor_dtype
    fed = [
        helper.make_tensor_value_info(n, to_proto(a.dtype), [f"{n}.{i}" for i in range(a.ndim)])
        for n, a in dims.items()
        if n not in fixed
    ]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ops.output_names(len(rows))]
    node = helper.make_node(
        ops.op_type(tag, len(rows)), names, ops.output_names(len(rows)), domain=ops.DOMAIN, **ops.attributes(k, rows, activation)
    )
    graph = helper.make_graph([node], "one", fed, outs, [numpy_helper.from_array(dims[n], n) for n in sorted(fixed)])
    opsets = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, 1), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        graph, functions=[ops.function_proto(tag, len(rows))], opset_imports=opsets, ir_version=ops.IR_VERSION
    )


def run_body(tag, k, rows, inputs):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(node_model(tag, k, rows, inputs).SerializeToString(), options, ["CPUExecutionProvider"])
    feeds = dict(zip(ops.input_names(len(rows)), inputs, strict=True))
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})


def worst(tag, activation, rows, inputs, outputs):
    """Largest |y - reference| / (tolerance * magnitude); NaN counts as infinite."""
    wanted = ops.reference(tag, activation, rows, inputs)
    sizes = ops.magnitude(tag, rows, inputs)
    limit = ops.tolerance(tag, activation, inputs[0].shape[-1])
    ratios = [np.abs(y - w) / (limit * s + 1e-30) for y, w, s in zip(outputs, wanted, sizes, strict=True)]
    assert [y.shape for y in outputs] == [w.shape for w in wanted]
    return max(float(np.nan_to_num(r, nan=np.inf).max(initial=0)) for r in ratios)


CASES = [
    dict(leading=(1,), rows=(48,), rank=4),
    dict(leading=(2, 5), rows=(40,), rank=3),  # N is no multiple of 16
    dict(leading=(3, 4), rows=(32, 16, 48), rank=(4, 0, 7), dtype=np.float32),
    dict(leading=(2, 3), rows=(16, 32), rank=5, gate="rank", scales="some"),
    dict(leading=(2, 3), rows=(16, 32), rank=5, gate="token", scales="some", dtype=np.float32),
    dict(leading=(7,), rows=(33,), rank=0),
    dict(leading=(0,), rows=(16,), rank=2),
]


@pytest.mark.parametrize("tag", FORMAT_TAGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_body_equals_reference(tag, case):
    k = 384
    inputs = make_inputs(tag, k=k, **case)
    assert worst(tag, "float", case["rows"], inputs, run_body(tag, k, case["rows"], inputs)) <= 1
