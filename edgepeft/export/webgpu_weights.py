"""Weights as the operators of WebGPU's provider read them: their layout, made when a graph is loaded, and embeddings.

tiles of `quant.formats` ──► MatMulNBits' codes [N, B, bytes], scales [N, B]; 8 bits in blocks of 32; nf4: MatMulBnb4's
a table                  ──► GatherBlockQuantized, which picks rows and multiplies in one
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgepeft.errors import ModelError
from edgepeft.export.body import Body
from edgepeft.export.ops import DOMAIN, OPSET, int4_rows
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS, TILE_COLUMNS, TILE_ROWS

if TYPE_CHECKING:
    from edgepeft.export.webgpu import Pass

MICROSOFT = "com.microsoft"
EIGHT_BIT_BLOCK = 32


def block_of(tag: str) -> int:
    """Return how many weights share a scale in MatMulNBits' layout."""
    return FORMATS[tag].block if FORMATS[tag].bits == 4 else EIGHT_BIT_BLOCK


def unpacked(tag: str, name: str) -> onnx.FunctionProto:
    """Return the function (w, w_scale) -> MatMulNBits' (codes [N, B, bytes], scales [N, B]); folded at load."""
    body, spec = Body(), FORMATS[tag]
    if spec.bits == 4:
        nf4 = tag.startswith("nf4")
        rows = int4_rows(body, spec.block, out="" if nf4 else "codes")
        if nf4:  # the first of two in a byte is the high one, and all is flat
            turned = body("BitwiseOr", body.shifted(rows, "LEFT"), body.shifted(rows, "RIGHT"))
            body("Reshape", turned, body.ints(-1), out="codes")
        scales = body.rows_then(body("Transpose", body.float32("w_scale"), perm=[0, 2, 1]), -1)
    else:
        tiles = body("Reshape", "w", body.ints(0, 0, 8, TILE_ROWS, 4))  # [T, U, j, n, i]
        codes = body.rows_then(body("Transpose", tiles, perm=[0, 3, 1, 2, 4]), -1, EIGHT_BIT_BLOCK)
        body("Identity", codes, out="codes")
        blocks = body("Div", body.attribute("K"), body.ints(EIGHT_BIT_BLOCK))
        scales = body(
            "Expand", body.rows_then(body.float32("w_scale"), 1), body("Concat", body.ints(1), blocks, axis=0)
        )
    body("Identity", scales, out="scales")
    return _function(name, body)


def _function(name: str, body: Body) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, ["w", "w_scale"], ["codes", "scales"], body.nodes, opsets, ["K", "N"])


def embedding(made: Pass, node: onnx.NodeProto) -> None:
    """Add rows of a table in tiles, by the operator that picks and multiplies in one."""
    ids, w, scale = node.input
    tag = node.op_type.removeprefix("PackedEmbedding_")
    if tag.startswith("nf4"):
        raise ModelError(f"{node.name}: {tag} has no embedding on GPUs. Take --embedding-format i4b32.")
    tiles, units = made.constants[w].dims[:2]
    n, k = tiles * TILE_ROWS, units * TILE_COLUMNS
    codes, scales = made.unpacked(tag, [w, scale], k, n)
    flat = made.constant(f"{w}:gpu_shape", np.array([n, k * FORMATS[tag].bits // 8], np.int64))
    if (rows := f"{w}:gpu_rows") not in made.laid_out:
        made.laid_out.add(rows)
        made.layout.append(helper.make_node("Reshape", [codes, flat], [rows], name=rows))
    _gather(made, node, FORMATS[tag].bits, block_of(tag), [ids, rows, scales])


def _gather(made: Pass, node: onnx.NodeProto, bits: int, block: int, table: list[str]) -> None:
    """Add rows of a table of codes and scales in rows: ids, codes, float32 scales."""
    ids, codes, scales = table
    attrs = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    made.add("GatherBlockQuantized", [codes, ids, scales], list(node.output), MICROSOFT, **attrs)


def row_embedding(made: Pass, node: onnx.NodeProto) -> None:
    """Add rows of a table that lies in rows."""
    ids, w, scale = node.input
    wide = f"{scale}:gpu_float32"
    if wide not in made.laid_out:
        made.laid_out.add(wide)
        made.layout.append(helper.make_node("Cast", [scale], [wide], name=wide, to=TensorProto.FLOAT))
    spec = EMBEDDING_FORMATS[node.op_type.removeprefix("RowEmbedding_")]
    _gather(made, node, spec.bits, spec.block, [ids, w, wide])
