"""Routers and bottlenecks against their numpy references, on ONNX Runtime."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from edgepeft.export.body import FLOAT32
from edgepeft.export.branches import BRANCHES
from edgepeft.export.ops import DOMAIN, IR_VERSION, OPSET, VERSION

TIGHT = 4e-6
K, N = 48, 40
ROUTERS = [(1, 0), (1, 4), (3, 12), (4, 4)]  # experts, ranks of all of them


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def model(name, inputs):
    """A model of one node, every input fed, and what to feed."""
    function = BRANCHES[name]
    arrays = dict(zip(function.inputs, inputs, strict=True))
    fed = [
        helper.make_tensor_value_info(
            part, helper.np_dtype_to_tensor_dtype(a.dtype), [f"{part}.{i}" for i in range(a.ndim)]
        )
        for part, a in arrays.items()
    ]
    node = helper.make_node(name, list(function.inputs), list(function.outputs), domain=DOMAIN)
    out = helper.make_tensor_value_info(function.outputs[0], FLOAT32, None)
    graph = helper.make_graph([node], "one", fed, [out])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    made = helper.make_model(graph, functions=[function.proto()], opset_imports=opsets, ir_version=IR_VERSION)
    return made.SerializeToString(), arrays


def run(name, inputs):
    """The output of one node, every input fed."""
    made, arrays = model(name, inputs)
    return ort.InferenceSession(made, providers=["CPUExecutionProvider"]).run(None, arrays)[0]


def check(name, inputs):
    got, (want,) = run(name, inputs), BRANCHES[name].reference(*inputs)
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= TIGHT * np.abs(want).max(initial=0)
    return got


@pytest.mark.parametrize("leading", [(3,), (2, 5), (1, 1), (2, 0)], ids=str)
@pytest.mark.parametrize(("experts", "ranks"), ROUTERS)
def test_a_router_shares_out_to_each_rank(experts, ranks, leading):
    a = normal(ranks, K).astype(np.float16)
    gate = check("RouterGate", [normal(*leading, K), normal(experts, K, seed=1), a])
    if ranks:
        assert np.allclose(gate.sum(-1), ranks / experts, rtol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (2, 0)])
def test_rows_come_before_each_row_of_a_batch(rows, batch, length):
    x, prompt = normal(batch, length, K), normal(rows, K, seed=1)
    found = check("Before", [x, prompt])
    assert found.shape == (batch, rows + length, K)
    assert all(np.array_equal(row, np.concatenate([prompt, own])) for row, own in zip(found, x, strict=True))


def test_a_router_over_one_expert_is_neutral():
    gate = run("RouterGate", [normal(5, K), np.zeros((1, K), np.float32), normal(7, K)])
    assert np.array_equal(gate, np.ones((5, 7), np.float32))


@pytest.mark.parametrize("leading", [(3,), (2, 5), (1, 1), (2, 0)], ids=str)
@pytest.mark.parametrize("width", [1, 16])
def test_a_bottleneck_adds_its_branch(width, leading):
    y, h = normal(*leading, N), normal(*leading, K, seed=1)
    parts = [normal(width, K, seed=2), normal(width, seed=3), normal(N, width, seed=4), normal(N, seed=5)]
    check("Bottleneck", [y, h, *parts])


def test_a_bottleneck_of_no_width_is_neutral():
    y, h = normal(5, N), normal(5, K)
    empty = [np.zeros(shape, np.float32) for shape in ((0, K), (0,), (N, 0), (N,))]
    assert np.array_equal(run("Bottleneck", [y, h, *empty]), y)
