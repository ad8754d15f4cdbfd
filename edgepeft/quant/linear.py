"""Linear and embedding layers that hold packed bits only; a float weight exists for one layer at a time.

    y = x Ŵᵀ + bias        dx = dy Ŵ        Ŵ[n, k] = value(code[n, k]) * scale[n, k // block] + offset[n, k J // K]

`QuantLinear` is a `torch.nn.Linear` whose `weight` has a shape and no numbers (NaN), so PEFT injects adapters on it as
on any other linear, and a method reaches the weight by `get_weight` / `set_weight` alone (PEFT: by `dequantize`).
How it multiplies, PIECE weights at a time and without a gradient for W, is `multiply`'s. `qweight` and `qscale` are
buffers in the layout of the format's table row, so `state_dict` holds what the export reads. Casting a model
(`.half()`, `.to(dtype)`) never rounds scales: the bits trained against are the bits shipped. `qoffset` [16T, J],
float32, is there where a merge wrote one: a number more for all weights of a row in each of J blocks, which no grid
rounds.

`activation` says how forward multiplies: "float", or "int8" as the op that ships does, by its kernel (`multiply_int8`).
Backward is the same for both: what rounds x counts as the identity (straight through).

An embedding that is the head of its model too lies in tiles, as the product wants it: `QuantEmbedding` picks rows out
of them, and the head, a `TiedLinear`, holds no tensors but reads those of the embedding, wherever they move.

Dequantization on the CPU is the host library's where it is at hand (`native`), else torch; both are one exact product
per element. On CUDA, NF4 layers multiply through bitsandbytes, on a copy of the bits in its order.

Left out: gradients of second order, training W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from edgepeft.quant import native
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS, TILE_COLUMNS, TILE_ROWS, Packed, WeightFormat
from edgepeft.quant.multiply import PackedMatmul, cut, room

PIECE = 1 << 23  # the most weights that exist as floats at a time
CACHED = 1 << 18  # as many as stay in the cache until they are rounded to a narrower type


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


def _tile_rows(fmt: WeightFormat, w: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return codes uint8 [rows, K] of some rows of tiles [T, K/32, 64 * bits]."""
    k = w.shape[1] * TILE_COLUMNS
    w = w.view(*w.shape[:2], fmt.bits, TILE_ROWS, 4)[rows // TILE_ROWS, :, :, rows % TILE_ROWS]
    codes = w if fmt.bits == 8 else torch.stack([w & 15, w >> 4], dim=2)
    return codes.reshape(len(rows), k)


def dequantize(
    fmt: WeightFormat, w: torch.Tensor, scale: torch.Tensor, n: int, k: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the float32 [N, K] weight of packed tiles, on their device.

    Where the host library is at hand it lies in `out`, which may be bfloat16: then it is rounded to that.
    """
    if w.device.type == "cpu" and native.available():
        out = torch.empty(n, k) if out is None else out
        numbers = out.view(torch.uint16) if out.dtype == torch.bfloat16 else out
        native.dequantize_into(fmt.tag, w.numpy(), scale.numpy(), n, k, numbers.numpy(), torch.get_num_threads())
        return out
    values = _values(fmt, _codes(fmt, w)).view(-1, fmt.blocks(k), k // fmt.blocks(k))
    values *= scale.float().permute(0, 2, 1).reshape(-1, fmt.blocks(k), 1)
    return values.view(-1, k)[:n]


class _PackedModule(torch.nn.Module):
    """What both layers share: two packed buffers whose bits survive every cast."""

    qweight: torch.Tensor
    qscale: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """What PEFT asks for shape, type and device: NaN everywhere, one number in memory."""
        return torch.full((1, 1), torch.nan, device=self.qweight.device).expand(self._sizes())

    def _sizes(self) -> tuple[int, int]:
        """Return the shape of the weight."""
        raise NotImplementedError

    def _register(self, fmt: WeightFormat, n: int, k: int, device: Any) -> None:
        w_shape, scale_shape = fmt.packed_shapes(n, k)
        self.register_buffer("qweight", torch.zeros(w_shape, dtype=torch.uint8, device=device))
        self.register_buffer("qscale", torch.zeros(scale_shape, dtype=getattr(torch, fmt.scale_dtype), device=device))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move scales and offsets as bytes, so that a change of dtype cannot round them."""
        exact: dict[str, torch.Tensor | None] = {
            n: self._buffers.pop(n) for n in ("qscale", "qoffset") if n in self._buffers
        }
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(exact)
        for name, value in exact.items():
            self._buffers[name] = None if value is None else fn(value.view(torch.uint8)).view(value.dtype)
        return self

    def _set(self, packed: Packed) -> None:
        """Take over the tensors of a packed weight."""
        self.qweight = torch.from_numpy(packed.w).to(self.qweight.device)
        self.qscale = torch.from_numpy(packed.scale).to(self.qscale.device)


class QuantLinear(_PackedModule, torch.nn.Linear):  # type: ignore[override]  # weight is a parameter there
    """A frozen linear layer of packed bits: x [..., K] to y [..., N]. Buffers: qweight, qscale, qoffset, bias."""

    qoffset: torch.Tensor | None
    activation = "float"
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None  # makes the whole of a process's share of tiles

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str = "i4b32",
        device: Any = None,
        offset_blocks: int = 0,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self._register(FORMATS[format], out_features, in_features, device)
        offset = torch.zeros(len(self.qweight) * TILE_ROWS, offset_blocks, device=device) if offset_blocks else None
        self.register_buffer("qoffset", offset)
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

    def tiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the packed codes and scales, whole."""
        if self.gather is None:
            return self.qweight, self.qscale
        return self.gather(self.qweight), self.gather(self.qscale)

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802 - by this name PEFT knows that it has to call `dequantize`
        """The packed codes."""
        return self.qweight

    def dequantize(self) -> torch.Tensor:
        """Return the weight, as PEFT asks for it (DoRA)."""
        return self.get_weight()

    def get_weight(self) -> torch.Tensor:
        """Return the weight as it multiplies: float32 [N, K], new memory."""
        w_nk = dequantize(FORMATS[self.format], *self.tiles(), self.out_features, self.in_features)
        return self._shifted(w_nk, slice(0, self.out_features))

    def _shifted(self, w_nk: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return some rows of the weight with their offsets."""
        if self.qoffset is not None:
            w_nk.view(len(w_nk), self.qoffset.shape[1], -1).add_(self.qoffset[rows, :, None])
        return w_nk

    def offset_product(self, x: torch.Tensor) -> torch.Tensor | float:
        """Return what the offsets add to y [..., N]: in float, whatever x is rounded to elsewhere."""
        if self.qoffset is None:
            return 0.0
        sums = x.float().unflatten(-1, (self.qoffset.shape[1], -1)).sum(-1)
        return sums @ self.qoffset[: self.out_features].T

    def pieces(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (rows, weight of these rows) of the whole weight, PIECE elements or less at a time, like sizes.

        A piece on the CPU lies where the one before it lay: what is to be kept must be copied.
        """
        k, packed, on_cpu = self.in_features, self.tiles(), self.qweight.device.type == "cpu"
        at_once = dtype == torch.float32 or (dtype == torch.bfloat16 and self.qoffset is None and native.available())
        for rows in cut(slice(0, self.out_features), k, PIECE):
            if at_once or not on_cpu:
                yield rows, self._decoded(packed, rows, dtype if on_cpu else torch.float32).to(dtype)
                continue
            w_nk = room(rows.stop - rows.start, k, dtype)
            for part in cut(rows, k, CACHED):
                w_nk[part.start - rows.start : part.stop - rows.start] = self._decoded(packed, part)
            yield rows, w_nk

    def _decoded(
        self, packed: tuple[torch.Tensor, torch.Tensor], rows: slice, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return some rows, whole tiles, of the weight; on the CPU where `room` has room."""
        n, k, on_cpu = rows.stop - rows.start, self.in_features, self.qweight.device.type == "cpu"
        w, scale = (tensor[rows.start // TILE_ROWS : -(-rows.stop // TILE_ROWS)] for tensor in packed)
        out = room(n, k, dtype) if on_cpu else None
        return self._shifted(dequantize(FORMATS[self.format], w, scale, n, k, out), rows)

    def int8_product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Ŵᵀ + bias in the dtype of x, on the CPU, x rounded to 8 bits by row and block as the format says."""
        x_mk = x.detach().reshape(-1, self.in_features).float().contiguous()
        y_mn = torch.empty(len(x_mk), self.out_features)
        w, scale = (tensor.numpy() for tensor in self.tiles())
        threads = torch.get_num_threads()
        native.matmul_into(self.format, w, scale, self.out_features, x_mk.numpy(), y_mn.numpy(), threads)
        y_mn += self.offset_product(x_mk)
        if self.bias is not None:
            y_mn += self.bias
        return y_mn.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def set_weight(self, w_nk: torch.Tensor) -> None:
        """Quantize a float [N, K] weight into this layer; `set_weight(get_weight())` changes no bit.

        Raises ModelError for NaN or infinite values.
        """
        known_nb = FORMATS[self.format].unpack(self.packed())[1]
        self.set_packed(FORMATS[self.format].quantize(w_nk.detach().cpu().float().numpy(), known_nb=known_nb))

    def packed(self) -> Packed:
        """Return the packed weight, sharing this layer's memory when it is on the CPU."""
        w, scale = (tensor.cpu().numpy() for tensor in self.tiles())
        return Packed(self.format, self.out_features, self.in_features, w, scale)

    def set_packed(self, packed: Packed) -> None:
        """Take over a packed weight, which has no offsets."""
        self._set(packed)
        self.qoffset = None
        self._bitsandbytes = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Ŵᵀ + bias in the dtype of x."""
        plain = self.gather is None and self.qoffset is None
        if x.is_cuda and FORMATS[self.format].codec == "nf4_block" and plain:
            return _bitsandbytes_matmul(self, x)
        return PackedMatmul.apply(x, self, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._bitsandbytes = None
        return super()._apply(fn, recurse)

    def _sizes(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def extra_repr(self) -> str:
        """Say the sizes and the format."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format}"


class QuantEmbedding(_PackedModule, torch.nn.Embedding):  # type: ignore[override]  # weight is a parameter there
    """A frozen embedding of packed rows: ids [...] to [..., K]. Only the rows asked for are dequantized.

    Rows come in `dtype`, which follows the casts of the model.  layout: "rows" for a format of EMBEDDING_FORMATS,
    "tiles" for one of FORMATS.  embed_scale: what rows, but not the weight, are multiplied by, as Gemma does.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        format: str = "i4b32",
        device: Any = None,
        layout: str = "rows",
        embed_scale: float = 1.0,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.format, self.layout, self.embed_scale, self.dtype = format, layout, embed_scale, torch.float32
        self._register(self._format, num_embeddings, embedding_dim, device)

    @classmethod
    def like(
        cls, embedding: torch.nn.Embedding, format: str, layout: str = "rows", device: Any = None
    ) -> QuantEmbedding:
        """Return an empty layer of a float embedding's sizes, padding and, where its class multiplies rows, scale."""
        scale = float(getattr(embedding, "embed_scale", 1.0))
        sizes = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        return cls(*sizes, format, device, layout, scale)

    @classmethod
    def from_float(cls, embedding: torch.nn.Embedding, format: str, layout: str = "rows") -> QuantEmbedding:
        """Quantize a float embedding."""
        layer = cls.like(embedding, format, layout)
        layer.set_weight(embedding.weight.detach())
        return layer

    @property
    def _format(self) -> WeightFormat:
        return (FORMATS if self.layout == "tiles" else EMBEDDING_FORMATS)[self.format]

    def get_weight(self) -> torch.Tensor:
        """Return all rows, float32 [V, K]."""
        return self._rows(torch.arange(self.num_embeddings, device=self.qweight.device))

    def set_weight(self, w_vk: torch.Tensor) -> None:
        """Quantize a float [V, K] table into this layer. Raises ModelError for NaN or infinite values."""
        self._set(self._format.quantize(w_vk.detach().cpu().float().numpy()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of the ids, times embed_scale."""
        rows = self._rows(ids).to(self.dtype)
        return rows if self.embed_scale == 1.0 else rows * torch.tensor(self.embed_scale, dtype=self.dtype)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        fmt, flat, k = self._format, ids.reshape(-1), self.embedding_dim
        if self.layout == "tiles":
            codes, scale = _tile_rows(fmt, self.qweight, flat), self.qscale[flat // TILE_ROWS, :, flat % TILE_ROWS]
        else:
            w, scale = self.qweight[flat], self.qscale[flat]
            codes = w if fmt.bits == 8 else torch.stack([w & 15, w >> 4], dim=-1)
        values = _values(fmt, codes).view(len(flat), fmt.blocks(k), k // fmt.blocks(k))
        return (values * scale.float()[..., None]).view(*ids.shape, k)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def _sizes(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def extra_repr(self) -> str:
        """Say the sizes and the format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}, layout={self.layout}"


class TiedLinear(QuantLinear):
    """A head that is its model's word embedding: the same packed tensors, which the embedding alone holds."""

    def __init__(self, embedding: QuantEmbedding) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.format, self._bitsandbytes = embedding.format, None
        self._embedding = (embedding,)  # in a tuple it is no part of this layer
        self.register_buffer("qoffset", None)
        self.register_buffer("bias", None)

    @property
    def qweight(self) -> torch.Tensor:  # type: ignore[override]  # a buffer there
        """The embedding's codes."""
        return self._embedding[0].qweight

    @property
    def qscale(self) -> torch.Tensor:  # type: ignore[override]  # a buffer there
        """The embedding's scales."""
        return self._embedding[0].qscale

    def _set(self, packed: Packed) -> None:
        self._embedding[0]._set(packed)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TiedLinear:
        self._bitsandbytes = None
        return self


def multiply_int8(model: torch.nn.Module) -> None:
    """Let every packed linear of a model multiply as the shipped op does, where the host library is at hand."""
    if not native.available():
        return
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.activation = "int8"


def _bitsandbytes_matmul(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """Multiply on the GPU by bitsandbytes' kernels, or as on the CPU where it is missing."""
    try:
        import bitsandbytes
    except ImportError:
        return PackedMatmul.apply(x, layer, layer.bias)
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
