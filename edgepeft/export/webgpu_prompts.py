"""Rows before an encoder's text, in the graph for GPUs: embeddings, or keys and values of every layer.

| in model.onnx | in model.webgpu.onnx |
|---|---|
| Before | Expand to the texts that `prompt_batch` says, Concat |
| Pad of types, mask and queries; Slice of what these mixed | nothing: types are fed as wide, queries may be few |
| the first token, 0 | `prompt_first` where rows are embeddings, which are read as tokens are |

GPUs take no empty rows. An adapter without any has some that attention_bias hides, hence the first token is looked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto

from edgepeft.runtime.webgpu import PROMPT_BATCH, PROMPT_FIRST

if TYPE_CHECKING:
    from edgepeft.export.webgpu import Pass

TYPES, FIRST = "token_type_ids", "first"


class Prompts:
    """What a graph has before its texts. rows: of its own adapter, None for none. read: whether as tokens are."""

    def __init__(self, made: Pass) -> None:
        nodes = [node for node in made.graph.node if node.op_type == "Before"]
        self.rows = len(made.value(nodes[0].input[1])) if nodes else None
        self.read = any(node.op_type == "Pad" and node.input[0] == TYPES for node in made.graph.node)
        self.sizes = {"queries": "prompted" if self.read else "sequence", "keys": "prompted" if nodes else "sequence"}
        for value in made.graph.input:
            if value.name == TYPES and self.read:
                value.type.tensor_type.shape.dim[1].dim_param = "prompted"

    def node(self, made: Pass, node: onnx.NodeProto) -> bool:
        """Add what stands for a node, if it is one of these."""
        if self.rows is None:
            return False
        if node.op_type == "Before":
            x, rows, count = (
                node.input[0],
                made.widened(node.input[1]),
                made.takes(PROMPT_BATCH, TensorProto.INT64, (3,)),
            )
            each = made.add("Expand", [rows, count], [f"{node.output[0]}:gpu_rows"])
            made.add("Concat", [each, x], list(node.output), axis=1)
        elif node.op_type in ("Pad", "Slice"):
            made.names[node.output[0]] = node.input[0]
        elif self.read and node.op_type == "Gather" and node.input[1] == FIRST:
            node.input[1] = made.takes(PROMPT_FIRST, TensorProto.INT64, (1,))
            made.nodes.append(node)
        else:
            return False
        return True
