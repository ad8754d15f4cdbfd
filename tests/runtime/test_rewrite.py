from __future__ import annotations

import pytest

from edgepeft.errors import ArtifactError
from edgepeft.runtime.rewrite import with_activation, with_older_windows


def model(domain: str):
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", 300])
    ours = helper.make_node("Op", ["x"], ["h"], domain=domain, K=300, activation="int8", scale=1.5, sizes=[1, 2])
    other = helper.make_node("Op", ["h"], ["y"], domain="elsewhere", activation="int8")
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 300])
    weights = helper.make_tensor("w", TensorProto.UINT8, [70000], bytes(70000), raw=True)
    return helper.make_model(helper.make_graph([ours, other], "g", [value], [out], [weights]))


@pytest.mark.parametrize("activation", ["float", "int8", "x" * 200])
def test_only_our_nodes_change_and_nothing_else(activation: str) -> None:
    import onnx

    before = model("edgepeft")
    after = onnx.load_from_string(with_activation(before.SerializeToString(), activation))
    found = [a.s.decode() for n in after.graph.node for a in n.attribute if a.name == "activation"]
    assert found == [activation, "int8"]
    after.graph.node[0].attribute[1].s = b"int8"
    names = [a.name for a in before.graph.node[0].attribute]
    assert names[1] == "activation"
    assert after == before


def test_a_model_without_our_nodes_is_refused() -> None:
    with pytest.raises(ArtifactError, match="no edgepeft node"):
        with_activation(model("elsewhere").SerializeToString(), "float")


def test_older_windows_are_one_less_and_none_stays_none() -> None:
    import onnx
    from onnx import helper

    def attention(window: int):
        return helper.make_node(
            "GroupQueryAttention",
            ["x"],
            ["y"],
            domain="com.microsoft",
            num_heads=4,
            local_window_size=window,
            scale=0.25,
        )

    graph = helper.make_graph([attention(window) for window in (-1, 8, 4096)], "g", [], [])
    before = helper.make_model(graph)
    after = onnx.load_from_string(with_older_windows(before.SerializeToString()))
    found = [a.i for node in after.graph.node for a in node.attribute if a.name == "local_window_size"]
    assert found == [-1, 7, 4095]
    for node, window in zip(after.graph.node, (-1, 8, 4096), strict=True):
        next(a for a in node.attribute if a.name == "local_window_size").i = window
    assert after == before
