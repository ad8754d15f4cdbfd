"""Shader dispatches of one run on a GPU, by program: on WebGPU each costs tens of microseconds whatever it computes.

    python -m edgepeft.bench.dispatches edgepeft-out/bundle

Counts the lines "Starting program" that ONNX Runtime's WebGPU provider logs, for one token of a language model or one
text of a classifier. A software GPU (`edgepeft.deploy.softgpu`) does as well as another: the graph decides the number.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.console import table
from edgepeft.errors import EdgePeftError, VerifyError

MARK = "edgepeft: the run that counts"
PROGRAM = re.compile(r'Starting program "([A-Za-z]+)')


def count(bundle: Path) -> Counter[str]:
    """Return {program: dispatches} of one run, which a process of its own logs.

    Raises VerifyError with the end of what it said where that fails.
    """
    argv = [sys.executable, "-m", "edgepeft.bench.dispatches", str(bundle), "--log"]
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False)
    log = done.stdout + done.stderr
    if done.returncode or MARK not in log:
        tail = "\n".join(line for line in log.splitlines() if not line.startswith("\x1b"))[-500:]
        raise VerifyError(f"{bundle}: no run on a GPU to count in:\n{tail}")
    return Counter(PROGRAM.findall(log.rpartition(MARK)[2]))


def _logged(bundle: Path) -> None:
    """Run once to warm up and once more after the mark, with everything logged to one stream."""
    from edgepeft.deploy import softgpu
    from edgepeft.runtime import load, webgpu

    if names := softgpu.available():
        softgpu.use(names[-1])
    os.dup2(1, 2)  # the provider logs to standard output
    webgpu.SEVERITY = 0
    model = load(bundle, device="webgpu", check="quick")
    for mark in ("", MARK):
        os.write(1, f"{mark}\n".encode())
        if model.manifest["task"] == "text-generation":
            model.logits([3])
        else:
            model.logits(["one text"])


def moved(model: Any, context: int) -> int:
    """Return the bytes that a language model's next token copies to a GPU and back, behind `context` tokens.

    What is bound in the CPU's memory is copied, what is bound in the GPU's is not.
    """
    cache = model._cache(model._get(None), 1)
    for start in range(0, context, model.chunk):
        model._run(cache, 0, np.full((1, min(model.chunk, context - start)), 3, np.int64))
    cache.reserve(context + 1)
    binding, _ = model._bound(cache, 0, 1)
    watched = _Watched(binding)
    cache.bindings = {key: (watched, kept) for key, (_, kept) in cache.bindings.items()}
    logits = model._run(cache, 0, np.full((1, 1), 3, np.int64))
    return watched.bytes + logits.nbytes


class _Watched:
    """A binding that counts the bytes of what it is given in the CPU's memory."""

    def __init__(self, binding: Any) -> None:
        self._binding = binding
        self.bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)

    def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
        self.bytes += array.nbytes
        self._binding.bind_cpu_input(name, array)


def main(arguments: list[str] | None = None) -> int:
    """Command line: prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m edgepeft.bench.dispatches", description="Dispatches of one run on a GPU."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--log", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.log:
        _logged(args.bundle)
        return 0
    try:
        found = count(args.bundle)
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rows = [{"program": name, "dispatches": number} for name, number in found.most_common()]
    print(table([*rows, {"program": "all", "dispatches": found.total()}]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
