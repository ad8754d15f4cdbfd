"""The table of weight formats: what a tag means, in numbers, and where its arithmetic lives.

A format stores an N x K weight as integer codes and one scale per block of K:

    W[n, k] ~ value(code[n, k]) * scale[n, k // block]

| tag | codes | value(code) | scale | stored as |
|---|---|---|---|---|
| i8c | 8 bit, zero 128 | code - 128, in -127..127 | float32 per row | tiles |
| i4b32, i4b64, i4b128 | 4 bit, zero 8 | code - 8 | float16 per block | tiles |
| nf4b64 | 4 bit, zero 7 | NF4[code] | float32 per block (absmax) | tiles |
| i4b32, i8b32 of embeddings | 4 or 8 bit, zero 8 or 128 | code - zero | float16 per block | rows |

Linear layers are stored in tiles, the order in which the kernels read (`tiles`); embeddings in rows, the order in which
`com.microsoft.GatherBlockQuantized` gathers. An embedding that is the head of its model too is stored once, in tiles;
TIED_FORMATS says in which format. Geometry lives here, the codecs in `int8_channel`, `int4_block` and
`nf4_block`. This module loads neither numpy nor torch: the command line reads the tables.

Left out: zero points other than the fixed one, formats below 4 bits, mixed formats in one layer.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from edgepeft.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

TILE_ROWS = 16
TILE_COLUMNS = 32


class Packed(NamedTuple):
    """One quantized weight as stored: uint8 codes `w` and `scale`, laid out as the format says; N, K unpadded."""

    format: str
    n: int
    k: int
    w: np.ndarray
    scale: np.ndarray
    extra: Mapping[str, np.ndarray] = {}


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """One row of the table. `block` 0 means the whole row; `zero` is the code of the value 0, which pads tiles."""

    tag: str
    bits: int
    block: int
    act_block: int
    zero: int
    scale_dtype: str
    codec: str
    layout: str = "tiles"

    @property
    def k_multiple(self) -> int:
        """What K must be a multiple of."""
        return max(self.block, self.act_block, TILE_COLUMNS) if self.layout == "tiles" else self.block

    @property
    def group(self) -> int:
        """How many columns of K share an offset, where weights have offsets (`qoffset` of linears)."""
        return self.block or self.act_block

    def check_shape(self, n: int, k: int) -> str | None:
        """Return why an N x K weight cannot take this format, or nothing."""
        if n < 1 or k < 1:
            return f"it is empty ({n} x {k})"
        return None if k % self.k_multiple == 0 else f"K={k} is no multiple of {self.k_multiple}"

    def blocks(self, k: int) -> int:
        """Return B, the number of scales per row."""
        return k // self.block if self.block else 1

    def packed_shapes(self, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of `w` and `scale` for an N x K weight."""
        if self.layout == "rows":
            return (n, k * self.bits // 8), (n, self.blocks(k))
        tiles = -(-n // TILE_ROWS)
        unit_bytes = TILE_ROWS * TILE_COLUMNS * self.bits // 8
        return (tiles, k // TILE_COLUMNS, unit_bytes), (tiles, self.blocks(k), TILE_ROWS)

    def size_bytes(self, n: int, k: int) -> int:
        """Return what the codes and scales of an N x K weight take on disk."""
        w, scale = (math.prod(shape) for shape in self.packed_shapes(n, k))
        return w + scale * int(self.scale_dtype.removeprefix("float")) // 8

    def quantize(self, w_nk: np.ndarray, double_quant: bool = False, known_nb: np.ndarray | None = None) -> Packed:
        """Round a float32 [N, K] weight to the nearest. Raises ModelError for a shape or values that do not fit.

        double_quant: store the scales in 8 bits (nf4 alone).  known_nb: scales [N, B] the weight has already; blocks
        they serve best keep them.
        """
        import numpy as np

        w_nk = np.ascontiguousarray(w_nk, np.float32)
        n, k = w_nk.shape
        if reason := self.check_shape(n, k):
            raise ModelError(f"format {self.tag}: a {n} x {k} weight does not fit: {reason}.")
        if not np.isfinite(w_nk).all():
            raise ModelError(f"format {self.tag}: the weight holds NaN or infinite values.")
        codes_nk, scale_nb = self._codec().encode(w_nk, self.block or k, self.scale_dtype, known_nb)
        extra, scale_nb = self._codec().double_quantize(scale_nb) if double_quant else ({}, scale_nb)
        if not np.isfinite(scale_nb).all():
            raise ModelError(
                f"format {self.tag}: values up to {abs(w_nk).max():g} are too large for its {self.scale_dtype} scales."
            )
        return self.pack(codes_nk, scale_nb, extra)

    def pack(self, codes_nk: np.ndarray, scale_nb: np.ndarray, extra: Mapping[str, np.ndarray] | None = None) -> Packed:
        """Lay out codes [N, K] uint8 and scales [N, B] as stored."""
        from edgepeft.quant import tiles

        n, k = codes_nk.shape
        if self.layout == "rows":
            return Packed(self.tag, n, k, tiles.pack_rows(codes_nk, self.bits), scale_nb, extra or {})
        w = tiles.pack(codes_nk, self.bits, self.zero)
        return Packed(self.tag, n, k, w, tiles.pack_scales(scale_nb), extra or {})

    def unpack(self, packed: Packed) -> tuple[np.ndarray, np.ndarray]:
        """Return codes [N, K] uint8 and scales [N, B] of a stored weight."""
        from edgepeft.quant import tiles

        if self.layout == "rows":
            return tiles.unpack_rows(packed.w, self.bits), packed.scale
        return tiles.unpack(packed.w, self.bits)[: packed.n], tiles.unpack_scales(packed.scale)[: packed.n]

    def dequantize(self, packed: Packed) -> np.ndarray:
        """Return the float32 [N, K] weight that the stored one stands for: one exact product per element."""
        import numpy as np

        codes_nk, scale_nb = self.unpack(packed)
        values = self.values()[codes_nk].reshape(packed.n, self.blocks(packed.k), -1)
        return (values * scale_nb.astype(np.float32)[:, :, None]).reshape(packed.n, packed.k)

    def values(self) -> np.ndarray:
        """Return value(code) of every code, float32 [2 ** bits]."""
        import numpy as np

        table = getattr(self._codec(), "VALUES", None)
        return np.arange(1 << self.bits, dtype=np.float32) - np.float32(self.zero) if table is None else table

    def _codec(self) -> Any:
        return importlib.import_module(f"edgepeft.quant.{self.codec}")


def _table(*rows: WeightFormat) -> dict[str, WeightFormat]:
    return {row.tag: row for row in rows}


FORMATS = _table(
    WeightFormat("i8c", 8, 0, 64, 128, "float32", "int8_channel"),
    WeightFormat("i4b32", 4, 32, 32, 8, "float16", "int4_block"),
    WeightFormat("i4b64", 4, 64, 64, 8, "float16", "int4_block"),
    WeightFormat("i4b128", 4, 128, 128, 8, "float16", "int4_block"),
    WeightFormat("nf4b64", 4, 64, 64, 7, "float32", "nf4_block"),
)

EMBEDDING_FORMATS = _table(
    WeightFormat("i4b32", 4, 32, 0, 8, "float16", "int4_block", "rows"),
    WeightFormat("i8b32", 8, 32, 0, 128, "float16", "int8_channel", "rows"),
)

# What `embedding_format` means for an embedding that is the head too: a format of FORMATS.
TIED_FORMATS = {"i4b32": "i4b32", "i8b32": "i8c"}
