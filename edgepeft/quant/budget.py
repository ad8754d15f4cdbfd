"""What a size leaves to choose from: the formats of each kind of tensor, and the least and most that they take.

Known of a model's shapes alone, so a size that no choice can meet is refused before anything is measured.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgepeft.config import bytes_of
from edgepeft.errors import ConfigError

if TYPE_CHECKING:
    from edgepeft.backbone.families import Family
    from edgepeft.backbone.load import ModelSource
    from edgepeft.config import Config

LINEARS = ("i8c", "i4b32", "i4b128")
EMBEDDINGS = ("i8b32", "i4b32")
CHOICES = {"linear": LINEARS, "head": LINEARS, "embedding": EMBEDDINGS}
FLOAT_BYTES = 4
HEADER_BYTES = 160  # of a tensor in a safetensors file, and some more


def check_size(config: Config, source: ModelSource, family: Family) -> None:
    """Raise ConfigError where config.size is less than the smallest formats take."""
    from edgepeft.backbone.checkpoint import backbone_shapes
    from edgepeft.quant.stage import format_for

    kinds, tied = family.tensors(source.settings), family.tied(source.settings)
    least = most = 0
    for name, shape in backbone_shapes(source, family).items():
        formats = [format_for(config, kinds[name], shape, tied, tag)[0] for tag in CHOICES.get(kinds[name], ())]
        packed = [2 * HEADER_BYTES + fmt.size_bytes(*shape) for fmt in formats if fmt]  # codes and scales
        sizes = packed or [HEADER_BYTES + FLOAT_BYTES * math.prod(shape)]
        least, most = least + min(sizes), most + max(sizes)
    refuse_below(config, least, most)


def refuse_below(config: Config, least: int, most: int) -> None:
    """Raise ConfigError where config.size is less than `least` bytes."""
    if least > (bytes_of(config.size) or 0):
        raise ConfigError(
            f"--size {config.size}: expected at least {math.ceil(least / 1e4) / 100:.2f}MB for this model, found less. "
            f"Its weights take {least / 1e6:.2f} to {most / 1e6:.2f} MB in the formats {', '.join(LINEARS)}."
        )
