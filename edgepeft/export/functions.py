"""The small functions of a model: schema, ONNX body and numpy reference of each, one row of FUNCTIONS.

    RMSNorm                 y = x * rsqrt(mean(x^2) + epsilon) * weight                    over the last axis
    SkipRMSNorm             sum = x + skip,  y = RMSNorm(sum, weight)
    SkipLayerNorm           y = LayerNorm(x + skip) * weight + bias                        over the last axis
    ErfGelu                 y = x * erfc(-x / sqrt(2)) / 2
    GatedActivation_<act>   y = act(gate) * up                                             act: silu, gelu_tanh
    PackedEmbedding_<tag>   y[..., :] = value(code[ids, :]) * scale[ids, block]            of a weight in tiles
    RowEmbedding_<tag>      the same of a table in rows                                    tag: of EMBEDDING_FORMATS
    PaddedAttention         y = softmax(q k / sqrt(D) - 10000 * (mask is 0)) v             num_heads heads of D columns
    PaddedAttention_one     the same for a single query for each text
    GroupQueryAttention     com.microsoft's: rotation, a cache of keys and values, causal, a window, capped scores

Like the fused op of `ops`, a node of domain `edgepeft` is taken whole by our library where that is loaded, and inlined
by ONNX Runtime everywhere else, which fuses the norms into its own SimplifiedLayerNormalization. A packed embedding
gathers the tile of each id (16 rows) as it lies in the file and picks its row, so the table is neither unpacked nor
copied, and the head it may be tied to reads the same bytes; a row is one exact product per element.

In PaddedAttention padding is ONNX Runtime's key_padding_mask. With fewer queries than keys it is an attention bias:
ONNX Runtime 1.20 misreads the mask there, and a bias that is not spelt out for each head.

GroupQueryAttention is that of ONNX Runtime at hand, to the number of keys that its window has; only rotation of halves,
do_rotary = 1 and rotary_interleaved = 0, has kernels of ours. k and v may be left out where q holds all three. What is
bound to the memory of past_key and past_value, of any capacity, is written in place.

Norms and attention are computed in float32, their references in float64. Left out: weights of another type.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgepeft.export.body import INT32, INT64, Body
from edgepeft.export.ops import DOMAIN, OPSET
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS, TILE_COLUMNS, TILE_ROWS

if TYPE_CHECKING:
    import numpy as np
    import onnx

MICROSOFT = "com.microsoft"
HIDDEN = -10000.0  # added to a score: as ONNX Runtime does for a mask


@dataclasses.dataclass(frozen=True)
class Function:
    """One function. `body` adds nodes that end in the outputs' names; `reference` takes the inputs, then attributes."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: Callable[[Body], None]
    reference: Callable[..., list[np.ndarray]]
    attributes: tuple[str, ...] = ()

    def proto(self) -> onnx.FunctionProto:
        """Return the function as a model carries it: standard operators alone."""
        from onnx import helper

        body = Body()
        self.body(body)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in body.nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        return helper.make_function(
            DOMAIN, self.name, list(self.inputs), list(self.outputs), body.nodes, opsets, list(self.attributes)
        )


# --- norms and activations ---------------------------------------------------------------------------------------


def _norm_body(body: Body, x: str = "x") -> None:
    import numpy as np

    mean = body("ReduceMean", body("Pow", x, body.scalar(np.array(2, np.float32))), body.ints(-1), keepdims=1)
    root = body("Sqrt", body("Add", mean, body("Constant", refs="value_float=epsilon")))
    body("Mul", body("Div", x, root), "weight", out="y")


def _skip_norm_body(body: Body) -> None:
    _norm_body(body, body("Sum", "x", "skip", out="sum"))  # an Add may be fused into a slower kernel: see `encoder`


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> list[np.ndarray]:
    """Return [x over its root mean square, times the weight] in float64."""
    import numpy as np

    x = x.astype(np.float64)
    return [x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(epsilon)) * weight]


def skip_rms_norm(x: np.ndarray, skip: np.ndarray, weight: np.ndarray, epsilon: float) -> list[np.ndarray]:
    """Return [RMSNorm(x + skip), x + skip]."""
    return [rms_norm(x + skip, weight, epsilon)[0], x + skip]


def _layer_norm_body(body: Body) -> None:
    total = body("Sum", "x", "skip")  # as in _skip_norm_body
    body("LayerNormalization", total, "weight", "bias", axis=-1, refs="epsilon", out="y")


def skip_layer_norm(
    x: np.ndarray, skip: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float
) -> list[np.ndarray]:
    """Return [LayerNorm(x + skip)] in float64."""
    import numpy as np

    total = (x + skip).astype(np.float64)
    return [rms_norm(total - total.mean(axis=-1, keepdims=True), weight, epsilon)[0] + bias]


def _gelu_body(body: Body) -> None:
    body("Gelu", "x", approximate="none", out="y")


def erf_gelu(x: np.ndarray) -> list[np.ndarray]:
    """Return [x times the share of a normal distribution below x] in float64."""
    import numpy as np

    tail = np.array([math.erfc(-value / math.sqrt(2)) for value in x.astype(np.float64).reshape(-1)])
    return [x * tail.reshape(x.shape) / 2]


def _silu(body: Body) -> str:
    return body("Mul", "gate", body("Sigmoid", "gate"))


def _gelu_tanh(body: Body) -> str:
    return body("Gelu", "gate", approximate="tanh")


def _gated_body(act: Callable[[Body], str], body: Body) -> None:
    body("Mul", act(body), "up", out="y")


def gated(activation: str, gate: np.ndarray, up: np.ndarray) -> list[np.ndarray]:
    """Return [act(gate) * up] in float64."""
    import numpy as np

    gate = gate.astype(np.float64)
    if activation == "silu":
        return [gate / (1 + np.exp(-gate)) * up]
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return [0.5 * gate * (1 + np.tanh(inner)) * up]


# --- packed embeddings -------------------------------------------------------------------------------------------


def _embedding_body(format: str, body: Body) -> None:
    import numpy as np

    flat = body("Reshape", body("Cast", "ids", to=INT64), body.ints(-1))
    tile_rows = body.scalar(np.array(TILE_ROWS, np.int64))
    tile = body("Div", flat, tile_rows)
    row = body("Reshape", body("Mod", flat, tile_rows), body.ints(-1, 1))
    values = _row_values(format, body, body("Gather", "w", tile), row)
    scales = body("Transpose", body("Gather", "scale", tile), perm=[0, 2, 1])  # [M, n, B]
    scales = body("GatherND", scales, row, batch_dims=1)
    blocks = body("Unsqueeze", body.float32(scales), body.ints(2))
    k = body("Mul", body("Shape", "w", start=1, end=2), body.ints(TILE_COLUMNS))
    block = FORMATS[format].block
    per_block = body("Concat", body("Shape", scales), body.ints(block) if block else k, axis=0)
    shape = body("Concat", body("Shape", "ids"), k, axis=0)
    body("Reshape", body("Mul", body("Reshape", values, per_block), blocks), shape, out="y")


def _row_values(format: str, body: Body, tiles: str, row: str) -> str:
    """Return value(code) of one row of each tile, [M, U, 8, 4] float32."""
    import numpy as np

    spec = FORMATS[format]
    units = body("Reshape", tiles, body.ints(0, 0, spec.bits, TILE_ROWS, 4))  # [M, U, j, n, i]
    codes = body("GatherND", body("Transpose", units, perm=[0, 3, 1, 2, 4]), row, batch_dims=1)  # [M, U, j, i]
    if spec.bits == 4:
        codes = body("Concat", body.masked(codes, 0x0F), body.shifted(codes, "RIGHT"), axis=2)
    if format.startswith("nf4"):
        return body("Gather", body.scalar(spec.values()), body("Cast", codes, to=INT32))
    return body("Sub", body.float32(codes), body.scalar(np.array(spec.zero, np.float32)))


def embedding_rows(format: str, ids: np.ndarray, w: np.ndarray, scale: np.ndarray) -> list[np.ndarray]:
    """Return [the rows that the ids name], float32 [..., K]."""
    from edgepeft.quant.formats import Packed

    packed = Packed(format, len(w) * TILE_ROWS, w.shape[1] * TILE_COLUMNS, w, scale)
    return [FORMATS[format].dequantize(packed)[ids]]


def _row_embedding_body(tag: str, body: Body) -> None:
    import numpy as np

    spec, ids = EMBEDDING_FORMATS[tag], body("Cast", "ids", to=INT64)
    codes, shape = body("Gather", "w", ids), body("Shape", ids)
    if spec.bits == 4:
        pairs = [
            body("Unsqueeze", half, body.ints(-1)) for half in (body.masked(codes, 15), body.shifted(codes, "RIGHT"))
        ]
        codes = body("Concat", *pairs, axis=-1)
    values = body("Sub", body.float32(codes), body.scalar(np.array(spec.zero, np.float32)))
    blocks = body("Shape", "scale", start=1)
    values = body("Reshape", values, body("Concat", shape, blocks, body.ints(spec.block), axis=0))
    scales = body("Unsqueeze", body.float32(body("Gather", "scale", ids)), body.ints(-1))
    k = body("Mul", blocks, body.ints(spec.block))
    body("Reshape", body("Mul", values, scales), body("Concat", shape, k, axis=0), out="y")


def table_rows(tag: str, ids: np.ndarray, w: np.ndarray, scale: np.ndarray) -> list[np.ndarray]:
    """Return [the rows that the ids name], float32 [..., K]."""
    from edgepeft.quant.formats import Packed

    spec = EMBEDDING_FORMATS[tag]
    return [spec.dequantize(Packed(tag, len(w), scale.shape[1] * spec.block, w, scale))[ids]]


# --- attention ---------------------------------------------------------------------------------------------------


def _attend(body: Body, *hidden: str) -> None:
    body("MultiHeadAttention", "q", "k", "v", "", *hidden, domain=MICROSOFT, refs="num_heads", out="y")


def _attention_body(body: Body) -> None:
    _attend(body, body("Cast", "mask", to=INT32))


def _one_attention_body(body: Body) -> None:
    import numpy as np

    one, hidden = (body.scalar(np.array(value, np.float32)) for value in (1, HIDDEN))
    padding = body("Unsqueeze", body("Sub", one, body.float32("mask")), body.ints(1, 2))
    heads = body("Concat", body.ints(1), body.attribute("num_heads"), body.ints(1, 1), axis=0)
    _attend(body, "", body("Mul", padding, body("Expand", hidden, heads)))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, num_heads: int) -> list[np.ndarray]:
    """Return [attention over the keys whose mask is not 0] in float64; q [B, Q, H], k and v [B, S, H], mask [B, S]."""
    import numpy as np

    (texts, queries, width), per_head = q.shape, (num_heads, q.shape[-1] // num_heads)
    q, k, v = (x.astype(np.float64).reshape(*x.shape[:2], *per_head).swapaxes(1, 2) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]) + HIDDEN * (mask == 0)[:, None, None]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return [((weights / weights.sum(-1, keepdims=True)) @ v).swapaxes(1, 2).reshape(texts, queries, width)]


_CACHED = (  # inputs, outputs
    ("q", "k", "v", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"),
    ("y", "present_key", "present_value"),
)
_CACHED_ATTRIBUTES = (
    "num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "rotary_interleaved",
)  # fmt: skip


def _cached_attention_body(body: Body) -> None:
    inputs, outputs = _CACHED
    refs = " ".join(_CACHED_ATTRIBUTES)
    body("GroupQueryAttention", *inputs, domain=MICROSOFT, refs=refs, out=" ".join(outputs))


def _rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn the halves of x [S, heads, D] by the angles [S, rotated / 2]."""
    import numpy as np

    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _one_text(
    q: np.ndarray, key: np.ndarray, value: np.ndarray, before: int, scale: float, softcap: float, window: int
) -> np.ndarray:
    """Return what tokens q [S, heads, D] behind `before` others make of key and value [kv_heads, P, D]."""
    import numpy as np

    tokens, heads, width = q.shape
    key, value = (np.repeat(x[:, : before + tokens], heads // len(x), axis=0) for x in (key, value))
    scores = np.einsum("shd,hjd->hsj", q, key) * (scale or 1 / np.sqrt(width))
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    ahead = np.arange(before + tokens) - np.arange(before, before + tokens)[:, None]  # of the token
    weights = np.exp(np.where((ahead > 0) | ((window > 0) & (ahead <= -window)), -np.inf, scores))
    return np.einsum("hsj,hjd->shd", weights / weights.sum(-1, keepdims=True), value).reshape(tokens, heads * width)


def cached_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, past_key: np.ndarray, past_value: np.ndarray, seqlens_k: np.ndarray,
    total_sequence_length: np.ndarray, cos_cache: np.ndarray, sin_cache: np.ndarray, num_heads: int, kv_num_heads: int,
    scale: float, softcap: float, local_window_size: int, do_rotary: int, rotary_interleaved: int,
) -> list[np.ndarray]:  # fmt: skip
    """Return [y, present_key, present_value] in float64; of the presents what lies behind a text's tokens is 0.

    q [B, S, heads * D], k and v [B, S, kv_heads * D], pasts [B, kv_heads, P, D]. A window has as many keys as its size,
    as since ONNX Runtime 1.24.
    """
    import numpy as np

    (texts, tokens, _), (_, _, capacity, width) = q.shape, past_key.shape
    total = int(total_sequence_length)
    q, k, v = (x.astype(np.float64).reshape(texts, tokens, x.shape[2] // width, width) for x in (q, k, v))
    presents = np.zeros((2, texts, kv_num_heads, max(capacity, total), width))
    y = np.zeros((texts, tokens, num_heads * width))
    for text, last in enumerate(seqlens_k):
        before = 0 if tokens == total else last + 1 - tokens
        new = slice(before, before + tokens)
        angles = cos_cache[new], sin_cache[new]
        for present, past, mine in zip(
            presents, (past_key, past_value), (_rotated(k[text], *angles), v[text]), strict=True
        ):
            present[text, :, :before] = past[text, :, :before]
            present[text, :, new] = mine.swapaxes(0, 1)
        key, value = presents[:, text]
        y[text] = _one_text(_rotated(q[text], *angles), key, value, before, scale, softcap, local_window_size)
    return [y, *presents]


# --- the table ---------------------------------------------------------------------------------------------------


def _table(*rows: Function) -> dict[str, Function]:
    return {row.name: row for row in rows}


def _gated_row(name: str, act: Callable[[Body], str]) -> Function:
    body: Any = functools.partial(_gated_body, act)
    return Function(f"GatedActivation_{name}", ("gate", "up"), ("y",), body, functools.partial(gated, name))


def _embedding_row(tag: str) -> Function:
    body, rows = functools.partial(_embedding_body, tag), functools.partial(embedding_rows, tag)
    return Function(f"PackedEmbedding_{tag}", ("ids", "w", "scale"), ("y",), body, rows)


def _row_embedding_row(tag: str) -> Function:
    body, rows = functools.partial(_row_embedding_body, tag), functools.partial(table_rows, tag)
    return Function(f"RowEmbedding_{tag}", ("ids", "w", "scale"), ("y",), body, rows)


def _attention_row(name: str, body: Callable[[Body], None]) -> Function:
    return Function(name, ("q", "k", "v", "mask"), ("y",), body, attention, ("num_heads",))


FUNCTIONS = _table(
    Function("RMSNorm", ("x", "weight"), ("y",), _norm_body, rms_norm, ("epsilon",)),
    Function("SkipRMSNorm", ("x", "skip", "weight"), ("y", "sum"), _skip_norm_body, skip_rms_norm, ("epsilon",)),
    Function("SkipLayerNorm", ("x", "skip", "weight", "bias"), ("y",), _layer_norm_body, skip_layer_norm, ("epsilon",)),
    Function("ErfGelu", ("x",), ("y",), _gelu_body, erf_gelu),
    _gated_row("silu", _silu),
    _gated_row("gelu_tanh", _gelu_tanh),
    *(_embedding_row(tag) for tag in FORMATS),
    *(_row_embedding_row(tag) for tag in EMBEDDING_FORMATS),
    _attention_row("PaddedAttention", _attention_body),
    _attention_row("PaddedAttention_one", _one_attention_body),
    Function("GroupQueryAttention", *_CACHED, _cached_attention_body, cached_attention, _CACHED_ATTRIBUTES),
)
