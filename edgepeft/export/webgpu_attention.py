"""Attention by products of heads, where no operator of WebGPU's provider computes what is asked.

    padded   an encoder's:  y = softmax(q k / sqrt(D) + bias) v
    capped   a decoder's:   y = softmax(cap tanh(scale q k / cap) + bias) v

MultiHeadAttention would take fewer shaders than `padded`, but the provider's is wrong from 32 tokens on where a GPU's
subgroups are smaller than 16. Its GroupQueryAttention does not cap scores as it should, so in `capped` it only turns
the keys and stores them and the values; what it attends is dropped. Queries are turned by RotaryEmbedding. The bias,
which the device runtime feeds, hides what a token does not see: all that is there is multiplied, seen or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto

from edgepeft.runtime.webgpu import POSITIONS, seen_bias

if TYPE_CHECKING:
    from edgepeft.export.webgpu import Pass

MICROSOFT = "com.microsoft"


def padded(made: Pass, node: onnx.NodeProto, heads: int, bias: str) -> None:
    """Add PaddedAttention; bias: the input that takes the place of its mask."""
    norm = next(node for node in made.graph.node if node.op_type.startswith("SkipLayerNorm"))
    width, name = made.value(norm.input[2]).size, node.output[0]
    apart = made.constant("gpu_heads", np.array([0, 0, heads, width // heads], np.int64))
    parts = {"q": (0, 2, 1, 3), "k": (0, 2, 3, 1), "v": (0, 2, 1, 3)}
    split = [made.add("Reshape", [x, apart], [f"{name}:{p}_rows"]) for p, x in zip(parts, node.input, strict=False)]
    q, k, v = (
        made.add("Transpose", [x], [f"{name}:{part}"], perm=order)
        for x, (part, order) in zip(split, parts.items(), strict=True)
    )
    scale = made.constant("gpu_scale", np.array(1 / np.sqrt(width // heads), np.float32))
    scores = made.add("MatMul", [made.add("Mul", [q, scale], [f"{name}:scaled"]), k], [f"{name}:scores"])
    biased = made.add("Add", [scores, bias], [f"{name}:biased"])
    mixed = made.add("MatMul", [made.add("Softmax", [biased], [f"{name}:shares"]), v], [f"{name}:mixed"])
    rows = made.add("Transpose", [mixed], [f"{name}:rows"], perm=(0, 2, 1, 3))
    made.add("Reshape", [rows, made.constant("gpu_together", np.array([0, 0, width], np.int64))], [name])


def capped(made: Pass, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> None:
    """Add GroupQueryAttention whose scores are capped, of one row: q [1, S, heads * D], keys [1, kv_heads, C, D]."""
    (name, key, value), cap, kv_heads = node.output, attrs["softcap"], attrs["kv_num_heads"]
    groups, size = attrs["num_heads"] // kv_heads, _head_size(made, node.input[3])
    width = groups * kv_heads * size
    stores = {attr: found for attr, found in attrs.items() if attr != "softcap"}
    made.add("GroupQueryAttention", list(node.input), [f"{name}:uncapped", key, value], MICROSOFT, **stores)

    def shaped(x: str, out: str, *shape: int) -> str:
        sizes = made.constant(f"gpu_shape_{shape}", np.array(shape, np.int64))
        return made.add("Reshape", [x, sizes], [f"{name}:{out}"])

    q = node.input[0]
    if not node.input[1]:  # queries, keys and values in one
        sizes = made.constant(f"{name}:gpu_sizes", np.array([width, kv_heads * size, kv_heads * size], np.int64))
        q = made.add("Split", [q, sizes], [f"{name}:{part}_alone" for part in "qkv"], axis=-1)
    made.takes(POSITIONS, TensorProto.INT64, ("batch", "sequence"))
    turned = [q, POSITIONS, *node.input[7:9]]
    q = made.add("RotaryEmbedding", turned, [f"{name}:turned"], MICROSOFT, num_heads=width // size, interleaved=0)
    scale = made.constant(f"gpu_scale_{cap}", np.array((attrs["scale"] or size**-0.5) / cap, np.float32))
    q = shaped(made.add("Mul", [q, scale], [f"{name}:scaled"]), "q_heads", -1, kv_heads, groups, size)
    columns = made.add("Transpose", [q], [f"{name}:q_columns"], perm=(1, 3, 2, 0))  # [kv_heads, D, groups, S]
    scores = made.add("MatMul", [key, shaped(columns, "q", 1, kv_heads, size, -1)], [f"{name}:scores"])
    rows = made.add("Tanh", [made.add("Transpose", [scores], [f"{name}:rows"], perm=(0, 1, 3, 2))], [f"{name}:tanh"])
    most = made.constant(f"gpu_cap_{cap}", np.array(cap, np.float32))
    apart = shaped(made.add("Mul", [rows, most], [f"{name}:capped"]), "apart", kv_heads, groups, -1, 0)
    bias = made.takes(seen_bias(attrs["local_window_size"]), TensorProto.FLOAT, ("batch", 1, "sequence", "columns"))
    shares = made.add("Softmax", [made.add("Add", [apart, bias], [f"{name}:biased"])], [f"{name}:shares"])
    mixed = made.add("MatMul", [shaped(shares, "together", 1, kv_heads, -1, 0), value], [f"{name}:mixed"])
    tokens = made.add(
        "Transpose", [shaped(mixed, "heads", kv_heads, groups, -1, size)], [f"{name}:tokens"], perm=(2, 0, 1, 3)
    )
    made.add("Reshape", [tokens, made.constant(f"gpu_row_{width}", np.array([1, -1, width], np.int64))], [name])


def _head_size(made: Pass, past: str) -> int:
    found = next(value for value in made.graph.input if value.name == past)
    return int(found.type.tensor_type.shape.dim[3].dim_value)
