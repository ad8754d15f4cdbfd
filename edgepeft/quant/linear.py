"""Linear and embedding layers that hold packed bits only; a float weight exists for one layer at a time.

    y = x Ŵᵀ + bias        dx = dy Ŵ        Ŵ[n, k] = value(code[n, k]) * scale[n, k // block]

`QuantLinear` is a `torch.nn.Linear` whose `weight` is None, so PEFT injects adapters on it as on any other linear, and
a method reaches the weight by `get_weight` / `set_weight` alone. Forward dequantizes, multiplies and forgets; backward
dequantizes again; W itself gets no gradient. `qweight` and `qscale` are buffers in the layout of the format's table
row, so `state_dict` holds what the export reads. Casting a model (`.half()`, `.to(dtype)`) never rounds scales: the
bits trained against are the bits shipped.

Dequantization on the CPU is the host library's where it is at hand (`native`), else torch; both are one exact product
per element. On CUDA, NF4 layers multiply through bitsandbytes, on a copy of the bits in its order.

Left out: gradients of second order, training W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from edgepeft.quant import native
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS, TILE_COLUMNS, TILE_ROWS, Packed, WeightFormat


def _values(fmt: WeightFormat, codes: torch.Tensor) -> torch.Tensor:
    """Return value(code) of every code, float32."""
    if fmt.codec == "nf4_block":
        table = torch.from_numpy(fmt.values()).to(codes.device)
        return table.index_select(0, codes.flatten().int()).view(codes.shape)
    return codes.to(torch.float32).sub_(fmt.zero)


def _codes(fmt: WeightFormat, w: torch.Tensor) -> torch.Tensor:
    """Return codes uint8 [16 T, K] of tiles [T, K/32, 64 * bits]."""
    tiles, units, _ = w.shape
    w = w.view(tiles, units, fmt.bits, TILE_ROWS, 4)
    halves = (w,) if fmt.bits == 8 else (w & 15, w >> 4)
    codes = torch.stack([half.permute(0, 3, 1, 2, 4) for half in halves], dim=3)
    return codes.reshape(tiles * TILE_ROWS, units * TILE_COLUMNS)


def dequantize(fmt: WeightFormat, w: torch.Tensor, scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return the float32 [N, K] weight of packed tiles, on their device."""
    if w.device.type == "cpu" and native.available():
        out = torch.empty(n, k)
        native.dequantize_into(fmt.tag, w.numpy(), scale.numpy(), n, k, out.numpy())
        return out
    values = _values(fmt, _codes(fmt, w)).view(-1, fmt.blocks(k), k // fmt.blocks(k))
    values *= scale.float().permute(0, 2, 1).reshape(-1, fmt.blocks(k), 1)
    return values.view(-1, k)[:n]


class _PackedMatmul(torch.autograd.Function):
    """y = x Ŵᵀ that keeps the packed tensors for backward, not Ŵ."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantLinear) -> torch.Tensor:
        ctx.layer, ctx.x_dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return torch.nn.functional.linear(x, layer.get_weight().to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return (dy @ ctx.layer.get_weight().to(dy.dtype)).to(ctx.x_dtype), None


class _PackedModule(torch.nn.Module):
    """What both layers share: two packed buffers whose bits survive every cast."""

    qweight: torch.Tensor
    qscale: torch.Tensor

    def _register(self, fmt: WeightFormat, n: int, k: int, device: Any) -> None:
        w_shape, scale_shape = fmt.packed_shapes(n, k)
        self.register_buffer("qweight", torch.zeros(w_shape, dtype=torch.uint8, device=device))
        self.register_buffer("qscale", torch.zeros(scale_shape, dtype=getattr(torch, fmt.scale_dtype), device=device))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move the scales as bytes, so that a change of dtype cannot round them."""
        scale = self._buffers.pop("qscale")
        assert scale is not None
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["qscale"] = scale
        self._buffers["qscale"] = fn(scale.view(torch.uint8)).view(scale.dtype)
        return self

    def _set(self, packed: Packed) -> None:
        """Take over the tensors of a packed weight."""
        self.qweight = torch.from_numpy(packed.w).to(self.qweight.device)
        self.qscale = torch.from_numpy(packed.scale).to(self.qscale.device)


class QuantLinear(_PackedModule, torch.nn.Linear):
    """A frozen linear layer of packed bits: x [..., K] to y [..., N]. Buffers: qweight, qscale, bias."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, format: str = "i4b32", device: Any = None
    ) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.register_parameter("weight", None)
        self._register(FORMATS[format], out_features, in_features, device)
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)
        self._bitsandbytes: Any = None

    @classmethod
    def from_float(cls, linear: torch.nn.Linear, format: str) -> QuantLinear:
        """Quantize a float linear layer."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, format)
        layer.set_weight(linear.weight.detach())
        if linear.bias is not None:
            layer.register_buffer("bias", linear.bias.detach().float())
        return layer

    def get_weight(self) -> torch.Tensor:
        """Return the weight as it multiplies: float32 [N, K], new memory."""
        return dequantize(FORMATS[self.format], self.qweight, self.qscale, self.out_features, self.in_features)

    def set_weight(self, w_nk: torch.Tensor) -> None:
        """Quantize a float [N, K] weight into this layer; `set_weight(get_weight())` changes no bit.

        Raises ModelError for NaN or infinite values.
        """
        known_nb = FORMATS[self.format].unpack(self.packed())[1]
        self.set_packed(FORMATS[self.format].quantize(w_nk.detach().cpu().float().numpy(), known_nb=known_nb))

    def packed(self) -> Packed:
        """Return the packed weight, sharing this layer's memory when it is on the CPU."""
        w, scale = self.qweight.cpu().numpy(), self.qscale.cpu().numpy()
        return Packed(self.format, self.out_features, self.in_features, w, scale)

    def set_packed(self, packed: Packed) -> None:
        """Take over a packed weight."""
        self._set(packed)
        self._bitsandbytes = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Ŵᵀ + bias in the dtype of x."""
        if x.is_cuda and FORMATS[self.format].codec == "nf4_block":
            return _bitsandbytes_matmul(self, x)
        return _PackedMatmul.apply(x, self)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._bitsandbytes = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Say the sizes and the format."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format}"


class QuantEmbedding(_PackedModule, torch.nn.Embedding):
    """A frozen embedding of packed rows: ids [...] to [..., K]. Only the rows asked for are dequantized.

    Rows come in `dtype`, which follows the casts of the model.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        format: str = "i4b32",
        device: Any = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.format, self.dtype = format, torch.float32
        self.register_parameter("weight", None)
        self._register(EMBEDDING_FORMATS[format], num_embeddings, embedding_dim, device)

    @classmethod
    def from_float(cls, embedding: torch.nn.Embedding, format: str) -> QuantEmbedding:
        """Quantize a float embedding."""
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, format)
        layer.set_weight(embedding.weight.detach())
        return layer

    def get_weight(self) -> torch.Tensor:
        """Return all rows, float32 [V, K]."""
        return self._rows(torch.arange(self.num_embeddings, device=self.qweight.device))

    def set_weight(self, w_vk: torch.Tensor) -> None:
        """Quantize a float [V, K] table into this layer. Raises ModelError for NaN or infinite values."""
        self._set(EMBEDDING_FORMATS[self.format].quantize(w_vk.detach().cpu().float().numpy()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of the ids."""
        return self._rows(ids).to(self.dtype)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        fmt = EMBEDDING_FORMATS[self.format]
        w, scale = self.qweight[ids], self.qscale[ids].float()
        codes = w if fmt.bits == 8 else torch.stack([w & 15, w >> 4], dim=-1)
        values = (codes.to(torch.float32) - fmt.zero).view(*ids.shape, -1, fmt.block)
        return (values * scale[..., None]).view(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Say the sizes and the format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}"


def _bitsandbytes_matmul(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """Multiply on the GPU by bitsandbytes' kernels, or as on the CPU where it is missing."""
    try:
        import bitsandbytes
    except ImportError:
        return _PackedMatmul.apply(x, layer)
    if layer._bitsandbytes is None:
        layer._bitsandbytes = bitsandbytes_state(layer)
    w, state = layer._bitsandbytes
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return bitsandbytes.matmul_4bit(x, w.t(), quant_state=state, bias=bias)


def bitsandbytes_state(layer: QuantLinear) -> tuple[torch.Tensor, Any]:
    """Return an NF4 layer's bits in bitsandbytes' order: (uint8 [N*K/2, 1], even columns in the high nibble; state)."""
    from bitsandbytes.functional import QuantState, get_4bit_type

    fmt = FORMATS[layer.format]
    n, k, device = layer.out_features, layer.in_features, layer.qweight.device
    codes = _codes(fmt, layer.qweight)[:n].reshape(-1, 2)
    absmax = layer.qscale.permute(0, 2, 1).reshape(-1, fmt.blocks(k))[:n].reshape(-1).contiguous()
    state = QuantState(
        absmax=absmax,
        shape=torch.Size((n, k)),
        code=get_4bit_type("nf4", device=device),
        blocksize=fmt.block,
        quant_type="nf4",
        dtype=torch.float32,
    )
    return (codes[:, 0] << 4 | codes[:, 1])[:, None], state
