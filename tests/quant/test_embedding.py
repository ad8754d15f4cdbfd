"""Embedding rows are read by stock ONNX Runtime's GatherBlockQuantized, with the values we dequantize to."""

import numpy as np
import onnxruntime as ort
import pytest

from edgepeft.quant.formats import EMBEDDING_FORMATS


@pytest.mark.parametrize("fmt", EMBEDDING_FORMATS.values(), ids=EMBEDDING_FORMATS)
def test_onnxruntime_gathers_the_same_rows(fmt):
    from onnx import TensorProto, helper

    rows, k = 37, 96
    w_vk = np.random.default_rng(0).standard_normal((rows, k)).astype(np.float32)
    packed = fmt.quantize(w_vk)
    constants = [
        helper.make_tensor("codes", TensorProto.UINT8, packed.w.shape, packed.w.tobytes(), raw=True),
        helper.make_tensor(
            "scales", TensorProto.FLOAT, packed.scale.shape, packed.scale.astype("f4").tobytes(), raw=True
        ),
    ]
    node = helper.make_node(
        "GatherBlockQuantized", ["codes", "ids", "scales"], ["rows"], domain="com.microsoft",
        gather_axis=0, quantize_axis=1, block_size=fmt.block, bits=fmt.bits,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "embedding", [helper.make_tensor_value_info("ids", TensorProto.INT64, [2, 3])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [2, 3, k])], constants,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.array([[0, 36, 5], [5, 1, 2]])
    (found,) = session.run(None, {"ids": ids})
    np.testing.assert_array_equal(found, fmt.dequantize(packed)[ids])
