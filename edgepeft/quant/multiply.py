"""The product of a packed linear, forward and backward, without a float weight that outlives it.

    y = x Ŵᵀ + bias        dx = dy Ŵ

Forward dequantizes a piece of Ŵ, multiplies it and forgets it; backward dequantizes again. W gets no gradient, a bias
that is a parameter does. Pieces lie in memory that is kept for the next ones (`room`): fresh pages would cost more than
dequantizing into them does. The product is made in the dtype of x, or in that of autocast.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from edgepeft.quant.formats import TILE_ROWS

if TYPE_CHECKING:
    from edgepeft.quant.linear import QuantLinear

_rooms = threading.local()


def room(n: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return [N, K] on the CPU whose memory the next call for this dtype in this thread returns again."""
    kept: dict[torch.dtype, torch.Tensor] = _rooms.__dict__.setdefault("kept", {})
    if dtype not in kept or kept[dtype].numel() < n * k:
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
            kept[dtype] = torch.empty(n * k, dtype=dtype)
    return kept[dtype][: n * k].view(n, k)


def cut(rows: slice, k: int, most: int) -> Iterator[slice]:
    """Yield rows of K columns, whole tiles from the first on, in parts of like sizes: `most` elements or one tile."""
    tiles, most_tiles = -(-(rows.stop - rows.start) // TILE_ROWS), max(most // (TILE_ROWS * k), 1)
    step = -(-tiles // -(-tiles // most_tiles)) * TILE_ROWS
    return (slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step))


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which x is multiplied here: autocast's where that is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x in a dtype; what several layers in turn ask of one x, as q, k and v do, is made once while it lives."""
    if x.dtype == dtype or x.is_inference():
        return x.to(dtype)
    source, version, made = _rooms.__dict__.get("cast", (None, 0, None))
    found = made() if source is not None and source() is x and version == x._version else None
    if found is None or found.dtype != dtype:
        found = x.to(dtype)
        _rooms.cast = weakref.ref(x), x._version, weakref.ref(found)
    return found


def forward(x: torch.Tensor, layer: QuantLinear, bias_n: torch.Tensor | None) -> torch.Tensor:
    """Return y [..., N] of x [..., K]; without a gradient."""
    dtype = product_dtype(x)
    if layer.activation == "int8" and x.device.type == "cpu" and x.numel():
        return layer.int8_product(x).to(dtype)
    x_mk = cast(x, dtype).reshape(-1, layer.in_features)
    y = x_mk.new_empty(*x.shape[:-1], layer.out_features)
    y_mn = y.view(-1, layer.out_features)
    for rows, w_nk in layer.pieces(dtype):
        if bias_n is None:
            torch.mm(x_mk, w_nk.T, out=y_mn[:, rows])
        else:
            torch.addmm(bias_n[rows].to(dtype), x_mk, w_nk.T, out=y_mn[:, rows])
    return y


def backward(dy_mn: torch.Tensor, layer: QuantLinear) -> torch.Tensor:
    """Return dx [M, K] in the dtype of dy [M, N]."""
    dx_mk = dy_mn.new_empty(len(dy_mn), layer.in_features)
    for rows, w_nk in layer.pieces(dy_mn.dtype):
        torch.addmm(dx_mk, dy_mn[:, rows], w_nk, beta=int(rows.start > 0), out=dx_mk)
    return dx_mk


def bias_gradient(dy_mn: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a bias, float32 [N]."""
    return dy_mn.sum(0, dtype=torch.float32)


class PackedMatmul(torch.autograd.Function):
    """y = x Ŵᵀ + bias that keeps the packed tensors for backward, not Ŵ."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantLinear, bias_n: torch.Tensor | None) -> torch.Tensor:
        """Return y [..., N] of x [..., K]."""
        ctx.layer, ctx.x_dtype = layer, x.dtype
        return forward(x, layer, bias_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        """Return the gradients of x and of the bias."""
        dy_mn = dy.reshape(-1, ctx.layer.out_features)
        dbias = bias_gradient(dy_mn) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, None, dbias
        return backward(dy_mn, ctx.layer).view(*dy.shape[:-1], -1).to(ctx.x_dtype), None, dbias
