"""Several processes that train one adapter: torchrun starts them, PyTorch joins them, the first one leads.

    torchrun --nproc_per_node 2 -m edgepeft train ...

The leader holds the run folder's lock, writes and speaks; the others compute their share of each batch and follow. The
model stands in every process whole (DDP), so two processes on two machines or sockets halve the time of a step; with
`--shard` each keeps its share of the packed bits alone (`train.shards`), and the memory is halved too.

Who leads is read from torchrun's environment, so that a process which does not train needs no torch to know it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def world() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return which of them this is."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def leads() -> bool:
    """Tell whether this process is the one that writes and speaks."""
    return rank() == 0


def led(make: Callable[[], Value]) -> Value:
    """Return in every process what the leader makes."""
    if world() == 1:
        return make()
    _join()
    import torch.distributed as distributed

    value = [make() if leads() else None]
    distributed.broadcast_object_list(value)
    return value[0]  # type: ignore[return-value]  # the leader's


def wait() -> None:
    """Wait until every process has come here."""
    if world() > 1:
        _join()
        import torch.distributed as distributed

        distributed.barrier()


def _join() -> None:
    """Let the processes find each other, by gloo where there is no GPU."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
