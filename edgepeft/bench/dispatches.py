"""Shader dispatches of one run on a GPU, by program: on WebGPU each costs tens of microseconds whatever it computes.

    python -m edgepeft.bench.dispatches edgepeft-out/bundle

| graph | what |
|---|---|
| ours | model.webgpu.onnx |
| base | the same model without an adapter, a product for each linear, as ONNX Runtime itself fuses that |
| naive | the base, and for each linear (x A) B by two products and a sum |

Counts the lines "Starting program" that ONNX Runtime's WebGPU provider logs, for one token of a language model behind
others, whose keys and values are the GPU's, or for one text of a classifier. A software GPU (`edgepeft.deploy.softgpu`)
does as well as another, but for how many buffers a shader may have: the provider fuses less where these are few.
For language models it also tells what a token copies between CPU and GPU, behind a short and a long text.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.console import table
from edgepeft.errors import EdgePeftError, VerifyError
from edgepeft.runtime import webgpu

MARK, END = "edgepeft: the run that counts", "edgepeft: its end"
PROGRAM = re.compile(r'Starting program "([A-Za-z0-9]+)')
TEXT, CAPACITY = 4, 64  # tokens before the one that counts, and what there is memory for
DATA = "model.onnx.data"
ATTENTION = "FlashAttentionDecodeVxReduce"  # ends a layer's attention
GRAPHS = ("base", "naive", "ours")


# --- counting ------------------------------------------------------------------------------------------------------


def programs(*folders: Path) -> list[list[str]]:
    """Return the programs that one run of each folder's graph for GPUs dispatches, as a process of its own logs them.

    Raises VerifyError with the end of what it said where that fails.
    """
    argv = [sys.executable, "-m", "edgepeft.bench.dispatches", str(folders[0]), "--log", *map(str, folders[1:])]
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False)
    log = done.stdout + done.stderr
    _, *runs = log.split(MARK)
    if done.returncode or len(runs) != len(folders):
        tail = "\n".join(line for line in log.splitlines() if not line.startswith("\x1b"))[-500:]
        raise VerifyError(f"{', '.join(map(str, folders))}: no run on a GPU to count in:\n{tail}")
    return [PROGRAM.findall(run.partition(END)[0]) for run in runs]


def per_layer(found: Sequence[str]) -> int:
    """Return the dispatches of a decoder layer: from the end of one's attention to the next one's; 0 for no decoder."""
    ends = [place for place, name in enumerate(found) if name == ATTENTION]
    return min((end - start for start, end in itertools.pairwise(ends)), default=0)


@contextlib.contextmanager
def graphs(bundle: Path) -> Iterator[dict[str, Path]]:
    """Give {name: folder} of GRAPHS, of a bundle or an exported folder."""
    from edgepeft.bench.gpu_graphs import naive

    with tempfile.TemporaryDirectory(prefix="edgepeft-", dir=bundle.resolve().parent) as place:
        made = {name: Path(place) / name for name in GRAPHS[:2]}
        for name, folder in made.items():
            folder.mkdir()
            os.link(bundle / DATA, folder / DATA)
            naive(bundle, folder, adapter=name == "naive")
        yield {**made, GRAPHS[2]: bundle}


def _logged(folder: Path) -> None:
    """Run once to warm up and once more between the marks."""
    session = webgpu.open_session(folder)
    binding = session.io_binding()
    for name, array in _feeds(session).items():
        if name.startswith("past_key_values"):
            value = webgpu.on_device(array)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        else:
            binding.bind_cpu_input(name, array)
    binding.bind_output("logits")
    for before, after in (("", ""), (MARK, END)):
        os.write(1, f"{before}\n".encode())
        session.run_with_iobinding(binding)
        binding.get_outputs()[-1].numpy()
        os.write(1, f"{after}\n".encode())


def _feeds(session: Any) -> dict[str, np.ndarray]:
    """Return the inputs of one token, or of one text, of zeros."""
    asked = {item.name: item.shape for item in session.get_inputs()}
    past = {name: np.zeros((1, s[1], CAPACITY, s[3]), np.float32) for name, s in asked.items() if name[:4] == "past"}
    if past:
        one = np.zeros((1, 1), np.int64)
        given = webgpu.decoder_inputs(session, np.ones((1, TEXT + 1), np.int64), 1, 1, CAPACITY)
        return {**past, **given, "input_ids": one}
    text = {name: np.ones((1, 2 * TEXT), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    return {name: array for name, array in webgpu.classifier_inputs(session, text).items() if name in asked}


def _use_software() -> None:
    from edgepeft.deploy import softgpu

    if names := softgpu.available():
        softgpu.use(names[-1])


# --- bytes ---------------------------------------------------------------------------------------------------------


def moved(model: Any, context: int) -> int:
    """Return the bytes that a language model's next token copies to a GPU and back, behind `context` tokens.

    What is bound in the CPU's memory is copied, what is bound in the GPU's is not.
    """
    cache = model._cache(model._get(None), 1)
    for start in range(0, context, model.chunk):
        model._run(cache, 0, np.full((1, min(model.chunk, context - start)), 3, np.int64))
    cache.reserve(context + 1)
    watched = _Watched(model._bound(cache, 0, 1).binding)
    cache.bindings = {key: bound._replace(binding=watched) for key, bound in cache.bindings.items()}
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
        """Bind, and count."""
        self.bytes += array.nbytes
        self._binding.bind_cpu_input(name, array)


# --- the command ---------------------------------------------------------------------------------------------------


def by_program(found: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Return a row for each program, with how often each graph runs it, one for all and one for a decoder layer."""
    counts = {graph: Counter(one) for graph, one in found.items()}
    names = sorted(set().union(*counts.values()), key=lambda name: -sum(one[name] for one in counts.values()))
    rows = [{"program": name, **{graph: one[name] for graph, one in counts.items()}} for name in names]
    rows.append({"program": "all", **{graph: len(one) for graph, one in found.items()}})
    return [*rows, {"program": "a decoder layer", **{graph: per_layer(one) for graph, one in found.items()}}]


def _copied(bundle: Path) -> None:
    """Print what a token of a language model copies."""
    from edgepeft.runtime import load

    _use_software()
    model = load(bundle, device="webgpu", check="quick")
    if model.manifest["task"] == "text-generation":
        lengths = (TEXT, model.context - 1)
        print(table([{"behind tokens": one, "bytes that a token copies": moved(model, one)} for one in lengths]))


def main(arguments: list[str] | None = None) -> int:
    """Command line: prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m edgepeft.bench.dispatches", description="Dispatches of one run on a GPU."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--log", type=Path, nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.log is not None:
        _use_software()
        os.dup2(1, 2)  # the provider logs to standard output
        webgpu.SEVERITY = 0
        for folder in (args.bundle, *args.log):
            _logged(folder)
        return 0
    try:
        with graphs(args.bundle) as made:
            found = dict(zip(made, programs(*made.values()), strict=True))
        print(table(by_program(found)))
        _copied(args.bundle)
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
