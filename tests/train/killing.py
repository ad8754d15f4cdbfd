"""A training that kills its own process with SIGKILL at a chosen moment; run in children of a fork server."""

import contextlib
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgepeft.artifact import Run
from edgepeft.config import Config

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [  # what a training imports, once for all children
        "torch", "transformers.trainer", "transformers.models.bert.modeling_bert", "datasets", "peft", "accelerate",
        "matplotlib.pyplot", "edgepeft.train.loop", "edgepeft.train.starts", "edgepeft.train.teacher",
        "edgepeft.train.watch", "edgepeft.backbone.load", "edgepeft.quant.linear", "edgepeft.adapt.fused",
    ]
)  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, count: int, last_act: Callable[..., Any] | None = None, after: bool = False) -> None:
    """Make the `count`-th call of owner.name the last thing the process does."""
    real, calls = getattr(owner, name), iter(range(1, 1 << 30))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == count
        if last and last_act is not None:
            last_act(*args, **kwargs)
        if last and not after:
            die()
        result = real(*args, **kwargs)
        if last:
            die()
        return result

    setattr(owner, name, wrapped)


def half_file(value: Any, path: Any, *_: Any, **__: Any) -> None:
    """Save as torch does, then cut the file."""
    import torch

    buffer = io.BytesIO()
    torch.serialization.save(value, buffer)
    Path(path).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def arm(moment: str) -> None:
    """Set the trap."""
    import torch

    from edgepeft.adapt import peft_files
    from edgepeft.train import checkpoints, loop, watch

    traps: dict[str, Callable[[], None]] = {
        "in the first epoch": lambda: at_call(watch.GuardedLoss, "__call__", 3),
        "in the middle of an epoch": lambda: at_call(watch.GuardedLoss, "__call__", 9),
        "while a checkpoint is written": lambda: at_call(torch, "save", 1, half_file),
        "while the second checkpoint is written": lambda: at_call(torch, "save", 5, half_file),
        "before the seal": lambda: at_call(checkpoints, "seal", 1),
        "between seal and removal": lambda: at_call(checkpoints.shutil, "rmtree", 2),
        "after training": lambda: at_call(loop, "_load_adapter", 1),
        "while the adapter is written": lambda: at_call(peft_files, "write_tensors", 1),
        "never": lambda: None,
    }
    if moment.startswith("after ms "):
        threading.Timer(int(moment.split()[-1]) / 1e3, die).start()
    else:
        traps[moment]()


def child(config: Config, folder: str, moment: str) -> None:
    from edgepeft.train import loop

    arm(moment)
    run = Run(Path(folder))
    run.key = "a key"
    with contextlib.redirect_stderr(io.StringIO()):
        run.make("adapter", "a key", lambda out: loop.train(config, run, out))


def train_in_child(config: Config, folder: Path, moment: str) -> int | None:
    """Train in a process of its own; return its exit code: 0 when it came to the end, -9 when it was killed."""
    process = CONTEXT.Process(target=child, args=(config, str(folder), moment))
    process.start()
    process.join()
    return process.exitcode
