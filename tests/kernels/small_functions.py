"""One node of a small function as a model, inputs for it, and how near its reference it must come.

`TOLERANCE` is relative to the reference, in units of 2^-24; to the largest value where weights average values. Beside
it stands what float64 loses in the reference of gelu_tanh, whose 1 + tanh cancels where the value is all but zero, and
what a bias may cancel. Embeddings and sums are exact.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgepeft.export import ops
from edgepeft.export.functions import FUNCTIONS
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS

EPSILON, HEADS = 1e-5, 3
VALUES = {  # of attributes
    "epsilon": EPSILON, "num_heads": HEADS, "kv_num_heads": 1, "scale": 0.125, "softcap": 0.0, "local_window_size": -1,
    "do_rotary": 1, "rotary_interleaved": 0,
}  # fmt: skip
TOLERANCE = 6 * 2.0**-24
TOLERANCES = {"ErfGelu": 8 * 2.0**-24}
TOLERANCES.update(dict.fromkeys(("PaddedAttention", "PaddedAttention_one", "GroupQueryAttention"), 64 * 2.0**-24))
ROWS = 40  # of an embedding's weight
MORE_KEYS = 3  # than queries
CACHED = "GroupQueryAttention"
EMBEDDINGS = [name for name in FUNCTIONS if "Embedding_" in name]
ATTENTION = [name for name in FUNCTIONS if name.startswith("PaddedAttention")]
GATED = [name for name in FUNCTIONS if name.startswith("Gated")]
NORMS = [name for name in FUNCTIONS if name.endswith("RMSNorm")]


def inputs(name: str, leading: Sequence[int], columns: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return seeded inputs by name; ids reach the last row of the weight."""
    rng = np.random.default_rng(seed)
    if name in ATTENTION:
        return attention(rng, leading[0], leading[1] if len(leading) > 1 and name == ATTENTION[0] else 1, columns)
    if name == CACHED:
        texts, tokens = leading[0], leading[1] if len(leading) > 1 else 1
        before = MORE_KEYS if texts == 1 or tokens == 1 else 0  # ONNX Runtime's own has no other of several texts
        return cached(rng, HEADS, 1, tokens, [before] * texts, 16 * min(max(columns // HEADS // 16, 1), 16))
    if name in EMBEDDINGS:
        formats = FORMATS if name.startswith("Packed") else EMBEDDING_FORMATS
        packed = formats[name.partition("_")[2]].quantize(rng.standard_normal((ROWS, columns), np.float32))
        ids = rng.integers(0, ROWS, leading)
        if ids.size:
            ids.reshape(-1)[-1] = ROWS - 1
        return {"ids": ids, "w": packed.w, "scale": packed.scale}
    shapes = {key: (columns,) if key in ("weight", "bias") else (*leading, columns) for key in FUNCTIONS[name].inputs}
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def attention(rng: np.random.Generator, texts: int, queries: int, columns: int) -> dict[str, np.ndarray]:
    """Return q, k, v of heads of as many columns as fit, and a mask under which the first key is real."""
    width, keys = HEADS * min(max(columns // HEADS, 1), 256), queries + MORE_KEYS
    sizes = {"q": queries, "k": keys, "v": keys}
    values = {key: rng.standard_normal((texts, size, width)).astype(np.float32) for key, size in sizes.items()}
    mask = rng.integers(0, 2, (texts, keys))
    mask[:, :1] = 1
    return {**values, "mask": mask}


def cached(
    rng: np.random.Generator, heads: int, kv_heads: int, tokens: int, before: Sequence[int], width: int, spare: int = 0
) -> dict[str, np.ndarray]:
    """Return the inputs of attention on a cache: tokens behind `before` others of each text, and room for `spare`."""
    total = max([*before, 0]) + tokens
    past = (len(before), kv_heads, total - tokens * (not spare) + spare, width)
    shapes = [(len(before), tokens, count * width) for count in (heads, kv_heads, kv_heads)]
    q, k, v, key, value = (rng.standard_normal(shape).astype(np.float32) for shape in (*shapes, past, past))
    angles = rng.uniform(0, 6, (total + 2, width // 2)).astype(np.float32)
    return {
        "q": q, "k": k, "v": v, "past_key": key, "past_value": value,
        "seqlens_k": np.array([one + tokens - 1 for one in before], np.int32),
        "total_sequence_length": np.array(total, np.int32), "cos_cache": np.cos(angles), "sin_cache": np.sin(angles),
    }  # fmt: skip


def model(name: str, values: Mapping[str, np.ndarray], fed: Sequence[str], body: bool, **attributes: Any) -> bytes:
    """Return a model of one node; inputs that are not fed are constants. body: it carries the function too."""
    function = FUNCTIONS[name]
    attributes = attributes or {key: VALUES[key] for key in function.attributes}
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
    attributes = (VALUES[key] for key in FUNCTIONS[name].attributes)
    return FUNCTIONS[name].reference(*(values[key] for key in FUNCTIONS[name].inputs), *attributes)


def size(name: str, values: Mapping[str, np.ndarray], want: np.ndarray) -> np.ndarray | float:
    """Return what an error is relative to."""
    if name in ATTENTION:
        return np.abs(values["v"]).max(initial=0)
    if name == CACHED:
        return max(np.abs(values[key]).max(initial=0) for key in ("k", "v", "past_value"))
    return np.abs(want) + 2 * np.abs(values.get("bias", np.float32(0)))


def agree(name: str, values: Mapping[str, np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    """Fail unless every output is its reference."""
    exact = ["sum"] + ["y"] * (name in EMBEDDINGS)
    lost = 4e-16 * np.abs(values["gate"].astype(np.float64) * values["up"]) if name in GATED else 0.0
    for key, y, want in zip(FUNCTIONS[name].outputs, outputs, reference(name, values), strict=True):
        assert (y.shape, y.dtype) == (want.shape, np.float32), (name, key)
        limit = 0.0 if key in exact else TOLERANCES.get(name, TOLERANCE) * size(name, values, want) + lost
        assert np.all(np.abs(y - want) <= limit), (name, key)
