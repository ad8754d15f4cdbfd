"""One node of a small function as a model, inputs for it, and how near its reference it must come.

`TOLERANCE` is relative to the reference: 6 units of 2^-24. Beside it stands what float64 loses in the reference of
gelu_tanh, whose 1 + tanh cancels where the value is all but zero. Embeddings and sums are exact.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgepeft.export import ops
from edgepeft.export.functions import FUNCTIONS
from edgepeft.quant.formats import FORMATS

EPSILON = 1e-5
TOLERANCE = 6 * 2.0**-24
ROWS = 40  # of an embedding's weight
GATED = [name for name in FUNCTIONS if name.startswith("Gated")]
NORMS = [name for name in FUNCTIONS if name.endswith("RMSNorm")]


def inputs(name: str, leading: Sequence[int], columns: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return seeded inputs by name; ids reach the last row of the weight."""
    rng = np.random.default_rng(seed)
    if name.startswith("PackedEmbedding"):
        packed = FORMATS[name.partition("_")[2]].quantize(rng.standard_normal((ROWS, columns), np.float32))
        ids = rng.integers(0, ROWS, leading)
        if ids.size:
            ids.reshape(-1)[-1] = ROWS - 1
        return {"ids": ids, "w": packed.w, "scale": packed.scale}
    shapes = {key: (columns,) if key == "weight" else (*leading, columns) for key in FUNCTIONS[name].inputs}
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def model(name: str, values: Mapping[str, np.ndarray], fed: Sequence[str], body: bool, **attributes: Any) -> bytes:
    """Return a model of one node; inputs that are not fed are constants. body: it carries the function too."""
    function = FUNCTIONS[name]
    if not attributes and function.attributes:
        attributes = {"epsilon": EPSILON}
    node = helper.make_node(name, function.inputs, function.outputs, "node", domain=ops.DOMAIN, **attributes)
    kinds = {key: helper.np_dtype_to_tensor_dtype(value.dtype) for key, value in values.items()}
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info(key, kinds[key], [f"{key}{i}" for i in range(values[key].ndim)]) for key in fed],
        [helper.make_tensor_value_info(key, TensorProto.FLOAT, None) for key in function.outputs],
        [numpy_helper.from_array(value, key) for key, value in values.items() if key not in fed],
    )  # fmt: skip
    imports = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    functions = [function.proto()] if body else []
    made = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=ops.IR_VERSION)
    return made.SerializeToString()


def reference(name: str, values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return what the function is."""
    attributes = [EPSILON] if FUNCTIONS[name].attributes else []
    return FUNCTIONS[name].reference(*(values[key] for key in FUNCTIONS[name].inputs), *attributes)


def agree(name: str, values: Mapping[str, np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    """Fail unless every output is its reference."""
    exact = ["sum"] + ["y"] * name.startswith("PackedEmbedding")
    lost = 4e-16 * np.abs(values["gate"].astype(np.float64) * values["up"]) if name in GATED else 0.0
    for key, y, want in zip(FUNCTIONS[name].outputs, outputs, reference(name, values), strict=True):
        assert (y.shape, y.dtype) == (want.shape, np.float32), (name, key)
        limit = 0.0 if key in exact else TOLERANCE * np.abs(want) + lost
        assert np.all(np.abs(y - want) <= limit), (name, key)
