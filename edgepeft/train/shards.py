"""A backbone that outgrows one machine: each process keeps its share of the packed bits (`--shard`).

    torchrun --nproc_per_node 2 -m edgepeft train --shard ...

What FSDP does with parameters, for bits that are buffers and have no gradient: a layer's tiles are cut into equal
runs, one a process, and gathered when the layer multiplies, in forward and again in backward; then the whole is
forgotten. Bits are gathered as they are, so every figure is that of training without `--shard`. The adapter stands in
every process whole (DDP): it is small.

Since every process must take part when a layer is gathered, all of them evaluate what otherwise the leader alone does.

Left out: embeddings, and heads tied to them, which stay whole; gathering the next layer while this one computes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as distributed

from edgepeft import ranks
from edgepeft.quant.linear import QuantLinear


def shard(model: torch.nn.Module) -> None:
    """Leave each packed linear of a model with this process's share of its tiles; alone, with all of them."""
    if ranks.world() == 1:
        return
    ranks.wait()
    group = distributed.new_group()  # of its own: gradients travel at the same time
    for layer in model.modules():
        if type(layer) is QuantLinear:
            layer.gather = functools.partial(_gathered, len(layer.qweight), group)
            layer.qweight, layer.qscale = _share(layer.qweight), _share(layer.qscale)


def _share(tiles: torch.Tensor) -> torch.Tensor:
    """Return this process's run of tiles [T, ...], padded to the length of all runs, in memory of its own."""
    length = -(-len(tiles) // ranks.world())
    own = tiles[ranks.rank() * length : (ranks.rank() + 1) * length]
    return torch.cat([own, own.new_zeros(length - len(own), *tiles.shape[1:])])


def _gathered(count: int, group: Any, share: torch.Tensor) -> torch.Tensor:
    """Return the whole: `count` tiles, out of all shares."""
    whole = share.new_empty(ranks.world() * len(share), *share.shape[1:])
    distributed.all_gather_into_tensor(whole.view(torch.uint8), share.view(torch.uint8), group=group)
    return whole[:count]
