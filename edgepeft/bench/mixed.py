"""What it costs that the rows of a run have adapters of their own, beside as many rows under one adapter.

    classifier        ROWS texts of TOKENS tokens in one run
    language model    a token for each of ROWS texts, behind TOKENS tokens, STEPS a measurement

The adapters are the default one under ROWS names: stacked and picked row by row as any others would be, see
`edgepeft.runtime.mixing`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from edgepeft.bench import generation, memory
from edgepeft.bench.timing import interleave
from edgepeft.runtime.adapters import DEFAULT
from edgepeft.runtime.generate import Generator
from edgepeft.runtime.session import Bundle

ROWS, TOKENS, STEPS = 8, 32, 8


def _names(model: Bundle) -> list[str]:
    names = [f"(row {row})" for row in range(ROWS)]
    for name in names:
        model.fed(DEFAULT, name)
    return names


def _write(model: Generator, names: Sequence[str]) -> Callable[[], object]:
    """Return the call that writes STEPS tokens for each row."""
    prompt = min(TOKENS, model.context - STEPS)
    ids = generation.tokens(prompt + STEPS, model.vocabulary).repeat(len(names), axis=0)
    cache = model._empty([model._get(name) for name in names])
    for row in range(len(names)):
        model._run(cache, row, ids[:1, :prompt])

    def write() -> None:
        for row in range(len(names)):
            cache.forget(row, prompt)
        for place in range(prompt, prompt + STEPS):
            model._run(cache, 0, ids[:, place : place + 1])

    return write


def _call(model: Any, names: Sequence[str]) -> Callable[[], object]:
    if isinstance(model, Generator):
        return _write(model, names)
    rows = [model._get(name) for name in names]
    return functools.partial(model._run_rows, memory.rows(model, ROWS, TOKENS), rows)


def _by_bytes(model: Bundle, name: str) -> float | None:
    """Return the speed beside one adapter if bytes alone took time, of a language model, which reads all it has."""
    if not isinstance(model, Generator):
        return None
    adapter = sum(value.numpy().nbytes for value in model.feeds(name).values())
    files = (model.manifest.folder / name for name in ("model.onnx", "model.onnx.data"))
    weights = sum(file.stat().st_size for file in files if file.exists())  # small ones lie in the graph
    return (weights + adapter) / (weights + ROWS * adapter)


def mixed(model: Bundle, budget_s: float) -> dict[str, Any]:
    """Return milliseconds of a run (or of STEPS) of one adapter and of ROWS, and the speed of the second beside it.

    by_bytes: what that speed would be if nothing but reading weights and adapters took time; None for a classifier.
    """
    if not model.adapters:
        return {}
    names = _names(model)
    calls = {"one": _call(model, names[:1] * ROWS), "each": _call(model, names)}
    timings = interleave(calls, budget_s)
    one, each = timings["one"].p50_ms, timings["each"].p50_ms
    return {
        "rows": ROWS, "one_ms": one, "each_ms": each, "speed": one / each,
        "by_bytes": _by_bytes(model, names[0]),
        "timings": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
    }  # fmt: skip
