"""The one fused op: its schema, its ONNX body and its numpy reference.

    y_g = s_out_g * ( W_g (s_in * x) + C_g sums + B_g (gate_g * (A_g x)) ) + bias_g      g < G, G linears that share x

A is [R, K], and B lies turned, [R, N]: a kernel adds ranks up, a vector of outputs at a time, and adapters stack along
the first axis of both. Files of adapters hold B as Hugging Face PEFT does, [N, R]. A gate is for all rows of x, for
each of them, or [texts, 1, R] for the tokens of each text.

C is there in `AdapterMatMul_<format>_g<G>_offset` alone: one more constant, w_offset [J, N], adds a number to all
weights of a row in each of J blocks of K; sums are those of s_in * x over the blocks, in float under either activation.
An op of its own, since no body can tell whether an input is there, and so that a node without offsets costs nothing.

`AdapterMatMul_<format>_g<G>` (domain `edgepeft`) takes the packed W of G linears as one constant, stacked along N, and
the adapters as ordinary inputs, so that they swap per run. Where our library is loaded ONNX Runtime gives it the node
whole; everywhere else ONNX Runtime inlines the function body below, which any model that holds the node carries too.

The body unpacks W from the tile layout (16 rows x 32 columns, see `edgepeft.quant.formats`) by reshapes and bit
arithmetic on constants, so ONNX Runtime folds all of it at load:

- 4-bit integers end as `com.microsoft.MatMulNBits`' [N, B, block/2], low nibble first: 4 bits per weight in memory;
- i8c and nf4b64 end as a float32 [K, N] for MatMul, since the oldest supported ONNX Runtime has no 8-bit MatMulNBits
  and its MatMulBnb4 is many times slower than float: fast, but 4 bytes per weight in memory.

The body always multiplies float activations by exactly dequantized weights; `activation = "int8"` is a property of our
kernels. `reference` computes either rule in float64 from the same list of inputs that the node takes, and is what the
body, the plain C++ loops and every SIMD kernel are held to: |y - reference| <= tolerance * magnitude, where magnitude
is the same expression over absolute values. Left out: more than three linears per node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgepeft import OP_ABI
from edgepeft.export.body import INT32, Body
from edgepeft.quant.formats import FORMATS, TILE_COLUMNS, TILE_ROWS

if TYPE_CHECKING:
    import numpy as np
    import onnx

DOMAIN = "edgepeft"
VERSION = OP_ABI  # of the domain
MAX_GROUPS = 3
MINIMUM_ONNXRUNTIME = "1.20.1"  # a release that is safe on a Cortex-A72; it reads no newer opset or IR than these
OPSET = 21
IR_VERSION = 10

NAME = "AdapterMatMul"
SHARED_INPUTS = ("x", "w", "w_scale", "s_in")
GROUP_INPUTS = ("a", "b", "gate", "s_out", "bias")
OFFSET = "offset"


def op_type(format: str, groups: int, offset: bool = False) -> str:
    """Return the op's name for a weight format and a number of linears; `offset`: whose weights have offsets."""
    return f"{NAME}_{format}_g{groups}" + (f"_{OFFSET}" if offset else "")


def input_names(groups: int, offset: bool = False) -> list[str]:
    """Return the op's inputs in order; every one is required."""
    names = [*SHARED_INPUTS, *(f"{name}_{g}" for g in range(groups) for name in GROUP_INPUTS)]
    return [*names, f"w_{OFFSET}"] if offset else names


def output_names(groups: int) -> list[str]:
    """Return the op's outputs in order: y_g [..., N_g]."""
    return [f"y_{g}" for g in range(groups)]


def attributes(k: int, rows: Sequence[int], activation: str) -> dict[str, Any]:
    """Return the node's attributes; `rows` are the real output counts of the groups (multiples of 16 when several)."""
    padded = -(-sum(rows) // TILE_ROWS) * TILE_ROWS
    sizes = {f"n{g}": rows[g] if g < len(rows) else 0 for g in range(MAX_GROUPS)}
    return {"K": k, "N": padded, **sizes, "activation": activation}


# --- the body ----------------------------------------------------------------------------------------------------


def int4_rows(body: Body, block: int, out: str = "") -> str:
    """MatMulNBits' [N, B, block/2]: re-pair the nibbles from columns (c, c + 16) to columns (2i, 2i + 1)."""
    tiles = body("Reshape", "w", body.ints(0, 0, 4, TILE_ROWS, 2, 2))  # [T, U, j, n, i/2, i%2]
    rows = body("Transpose", tiles, perm=[0, 3, 1, 2, 4, 5])  # [T, n, U, j, i/2, i%2]
    even, odd = body.split(rows, 2, axis=5)
    low = body("BitwiseOr", body.masked(even, 0x0F), body.shifted(odd, "LEFT"))  # columns 0..15 of each unit
    high = body("BitwiseOr", body.shifted(even, "RIGHT"), body.masked(odd, 0xF0))  # columns 16..31
    packed = body.rows_then(body("Concat", low, high, axis=3), -1, block // 2)
    return body("Identity", packed, out=out) if out else packed


def _int4_base(body: Body, x: str, block: int) -> str:
    """W x by MatMulNBits."""
    packed = int4_rows(body, block)
    nbits: dict[str, Any] = {"domain": "com.microsoft", "refs": "K N", "bits": 4, "block_size": block}
    scales = body.rows_then(body("Transpose", body.float32("w_scale"), perm=[0, 2, 1]), -1)  # [N, B]
    return body("MatMulNBits", x, packed, scales, **nbits)


def _int8_base(body: Body, x: str) -> str:
    """W x by MatMul: x times (code - 128), then the scale of each row."""
    import numpy as np

    tiles = body("Reshape", "w", body.ints(0, 0, 8, TILE_ROWS, 4))  # [T, U, j, n, i]
    codes_kn = body.then_rows(body("Transpose", tiles, perm=[1, 2, 4, 0, 3]), -1)
    centred = body("Sub", body.float32(codes_kn), body.scalar(np.array(128, np.float32)))
    return body("Mul", body("MatMul", x, centred), body.then_rows("w_scale"))


def _nf4_base(body: Body, x: str, block: int) -> str:
    """W x by MatMul: NF4[code] times the block's absmax."""
    tiles = body("Reshape", "w", body.ints(0, 0, 4, TILE_ROWS, 4))  # [T, U, j, n, i]
    columns = body("Transpose", tiles, perm=[1, 2, 4, 0, 3])  # [U, j, i, T, n]
    codes = body("Concat", body.masked(columns, 0x0F), body.shifted(columns, "RIGHT"), axis=1)
    codes_bkn = body("Cast", body.then_rows(codes, -1, block), to=INT32)
    values = body("Gather", body.scalar(FORMATS["nf4b64"].values()), codes_bkn)
    scales = body.then_rows(body("Transpose", body.float32("w_scale"), perm=[1, 0, 2]), -1, 1)  # [B, 1, N]
    return body("MatMul", x, body.then_rows(body("Mul", values, scales), -1))


def _base(body: Body, format: str, x: str) -> str:
    """W x for all groups together, [..., N]."""
    spec = FORMATS[format]
    if format.startswith("nf4"):
        return _nf4_base(body, x, spec.block)
    return _int4_base(body, x, spec.block) if spec.bits == 4 else _int8_base(body, x)


def _offsets(body: Body, x: str) -> str:
    """C sums for all groups together, [..., N]."""
    leading, blocks = body("Shape", x, end=-1), body("Shape", "w_offset", end=1)
    shape = body("Concat", leading, blocks, body("Div", body.attribute("K"), blocks), axis=0)
    sums = body("ReduceSum", body("Reshape", x, shape, allowzero=1), body.ints(-1), keepdims=0)
    return body("MatMul", sums, body.float32("w_offset"))


def _group(body: Body, g: int, base: str, start: str, end: str) -> None:
    """y_g from its slice of W x, its adapter, scale and bias."""
    a_kr, b_rn = body.transposed(body.float32(f"a_{g}")), body.float32(f"b_{g}")
    gated = body("Mul", body("MatMul", "x", a_kr), f"gate_{g}")
    y = body("Add", body("Slice", base, start, end, body.ints(-1)), body("MatMul", gated, b_rn))
    body("Add", body("Mul", y, f"s_out_{g}"), f"bias_{g}", out=f"y_{g}")


def function_proto(format: str, groups: int, offset: bool = False) -> onnx.FunctionProto:
    """Return the body of the op: standard and com.microsoft operators of opset 21, any leading dims, any rank."""
    from onnx import helper

    body = Body()
    x = body("Mul", "x", "s_in")
    base = _base(body, format, x)
    if offset:
        base = body("Add", base, _offsets(body, x))
    end = body.ints(0)
    for g in range(groups):
        start, end = end, body("Add", end, body.attribute(f"n{g}"))
        _group(body, g, base, start, end)
    return helper.make_function(
        DOMAIN, op_type(format, groups, offset), input_names(groups, offset), output_names(groups), body.nodes,
        [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        list(attributes(TILE_COLUMNS, [TILE_ROWS], "float")),
    )  # fmt: skip


# --- the reference -----------------------------------------------------------------------------------------------


def quantize_activations(x_mk: np.ndarray, act_block: int) -> tuple[np.ndarray, np.ndarray]:
    """Round float32 x [M, K] to int8 per row and block: (q [M, K/act_block, act_block], scale [M, K/act_block]).

    scale = max|x| / 127, q = round half to even of x * (127 / max|x|), all in float32; a block below 1e-30 becomes 0
    and one that holds NaN or infinity gets the scale NaN, so that the output can never be silently finite.
    """
    import numpy as np

    m, k = x_mk.shape
    x_mbk = x_mk.astype(np.float32).reshape(m, k // act_block, act_block)
    top = np.abs(x_mbk).max(axis=2)
    usable = np.isfinite(top) & (top >= np.float32(1e-30))
    inverse = np.where(usable, np.float32(127) / np.where(usable, top, np.float32(1)), np.float32(0))
    q = np.rint(np.where(usable[:, :, None], x_mbk, np.float32(0)) * inverse[:, :, None])
    scale = np.where(usable, top / np.float32(127), np.where(np.isfinite(top), np.float32(0), np.float32("nan")))
    return q, scale


def codes_and_scales(format: str, w: np.ndarray, scale: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """Return value(code) [N, K] and scales [N, B] in float64; nf4 under int8 has values rounded to /127."""
    import numpy as np

    from edgepeft.quant.formats import Packed

    spec = FORMATS[format]
    codes_nk, scale_nb = spec.unpack(Packed(format, len(w) * TILE_ROWS, w.shape[1] * TILE_COLUMNS, w, scale))
    values, scale_nb = spec.values().astype(np.float64), scale_nb.astype(np.float64)
    if format.startswith("nf4") and activation == "int8":
        values, scale_nb = np.rint(values * 127), scale_nb / 127
    return values[codes_nk], scale_nb


def _reference_base(format: str, activation: str, x_mk: np.ndarray, w: np.ndarray, w_scale: np.ndarray) -> np.ndarray:
    """W x in float64, [M, N]."""
    import numpy as np

    values_nk, scale_nb = codes_and_scales(format, w, w_scale, activation)
    n, k = values_nk.shape
    if activation == "float":
        return x_mk.astype(np.float64) @ (values_nk * np.repeat(scale_nb, k // scale_nb.shape[1], axis=1)).T
    block = FORMATS[format].act_block
    q_mbk, x_scale_mb = quantize_activations(x_mk, block)
    values_nbk = values_nk.reshape(n, -1, block)
    w_scale_nb = np.broadcast_to(scale_nb, values_nbk.shape[:2]) if scale_nb.shape[1] == 1 else scale_nb
    dots = np.einsum("mbk,nbk->mnb", q_mbk.astype(np.float64), values_nbk, optimize=True)
    return np.einsum("mnb,mb,nb->mn", dots, x_scale_mb.astype(np.float64), w_scale_nb, optimize=True)


def _reference_offsets(x: np.ndarray, groups: int, inputs: Sequence[np.ndarray]) -> np.ndarray | float:
    """C times the sums of x [..., K] in float64, [..., N]; 0 where the node has no offsets."""
    if len(inputs) == len(input_names(groups)):
        return 0.0
    offset_jn = inputs[-1].astype("float64")
    blocks = len(offset_jn)
    return x.astype("float64").reshape(*x.shape[:-1], blocks, x.shape[-1] // blocks).sum(-1) @ offset_jn


def reference(format: str, activation: str, rows: Sequence[int], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compute the op in float64 from the node's inputs in order; returns the y_g as float64 [..., N_g].

    `rows` are the real output counts N_g of the groups.
    """
    import numpy as np

    x, w, w_scale, s_in = inputs[: len(SHARED_INPUTS)]
    leading, k = x.shape[:-1], x.shape[-1]
    scaled = (x.astype(np.float32) * s_in.astype(np.float32)).reshape(int(np.prod(leading)), k)
    base = _reference_base(format, activation, scaled, w, w_scale).reshape(*leading, len(w) * TILE_ROWS)
    base = base + _reference_offsets(scaled.reshape(x.shape), len(rows), inputs)
    outputs, start = [], 0
    for g, n in enumerate(rows):
        at = len(SHARED_INPUTS) + len(GROUP_INPUTS) * g
        a_rk, b_rn, gate, s_out, bias = (v.astype(np.float64) for v in inputs[at : at + len(GROUP_INPUTS)])
        adapter = (gate * (x.astype(np.float64) @ a_rk.T)) @ b_rn
        outputs.append(s_out * (base[..., start : start + n] + adapter) + bias)
        start += n
    return outputs


def magnitude(format: str, rows: Sequence[int], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the op's value over absolute values, the size that rounding errors are relative to: [..., N_g]."""
    import numpy as np

    x, w, w_scale, s_in = inputs[: len(SHARED_INPUTS)]
    values_nk, scale_nb = codes_and_scales(format, w, w_scale, "float")
    w_nk = np.abs(values_nk * np.repeat(scale_nb, values_nk.shape[1] // scale_nb.shape[1], axis=1))
    scaled = np.abs(x * s_in)
    base = scaled.astype(np.float64) @ w_nk.T + _reference_offsets(
        scaled, len(rows), [*inputs[:-1], np.abs(inputs[-1])]
    )
    outputs, start = [], 0
    for g, n in enumerate(rows):
        at = len(SHARED_INPUTS) + len(GROUP_INPUTS) * g
        a_rk, b_rn, gate, s_out, bias = (np.abs(v.astype(np.float64)) for v in inputs[at : at + len(GROUP_INPUTS)])
        adapter = (gate * (np.abs(x) @ a_rk.T)) @ b_rn
        outputs.append(s_out * (base[..., start : start + n] + adapter) + bias)
        start += n
    return outputs


def tolerance(format: str, activation: str, k: int) -> float:
    """Return the largest error of a correct implementation, relative to `magnitude`.

    Float32 sums of n terms err by about sqrt(n) units of 2^-24 of the sum of magnitudes, and never by more than n.
    Under float activations n is K. Under int8 ones the integer sums are exact and n is the number of blocks; the
    adapter's branch stays float; 8 units cover the handful of scalings and the spread over many outputs.
    """
    terms = k if activation == "float" else k // FORMATS[format].act_block
    return 2.0**-24 * (8 + max(terms, 64) ** 0.5)
