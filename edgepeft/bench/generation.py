"""What writing costs: tokens a second of reading a prompt and of writing, with the adapter on, off, and fed.

    prefill   a prompt of PREFILL tokens at once, without a cache; logits of its last token
    decode    token by token behind a prompt of PROMPT tokens, up to DECODE of them, STEPS a measurement

All candidates of a row take turns, as in `measure`. Tokens are scattered over the vocabulary and the same for all:
speed does not depend on what they say. A bundle whose context is shorter is measured on what it holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from edgepeft.bench.timing import Timing, disturbed, interleave
from edgepeft.console import table
from edgepeft.runtime.adapters import BASE, DEFAULT
from edgepeft.runtime.generate import Generator

PREFILL, PROMPT, DECODE, STEPS = 512, 128, 128, 16
FED = "(fed)"
STRIDE = 7919  # a prime: tokens that lie far apart in any vocabulary


def tokens(count: int, vocabulary: int) -> np.ndarray:
    """Return ids int64 [1, count]."""
    return (np.arange(1, count + 1, dtype=np.int64) * STRIDE % vocabulary)[None]


def lengths(context: int) -> tuple[int, int, int]:
    """Return how many tokens are read, and read and written for decoding, in a context."""
    prompt = min(PROMPT, context // 2)
    return min(PREFILL, context), prompt, min(DECODE, context - prompt) // STEPS * STEPS


def prefill(model: Generator, adapter: str, count: int) -> Callable[[], object]:
    """Return the call that reads a prompt of `count` tokens."""
    ids = tokens(count, model.vocabulary)

    def read() -> None:
        cache = model._cache(model._get(adapter), 1)
        for start in range(0, count, model.chunk):
            model._run(cache, 0, ids[:, start : start + model.chunk])

    return read


def decode(model: Generator, adapter: str, prompt: int, count: int) -> Callable[[], object]:
    """Return the call that writes STEPS tokens, behind `prompt` tokens and up to `count` before."""
    ids = tokens(prompt + count, model.vocabulary)
    cache = model._cache(model._get(adapter), 1)
    model._run(cache, 0, ids[:, :prompt])

    def write() -> None:
        if len(cache.tokens[0]) == prompt + count:
            cache.forget(0, prompt)
        start = len(cache.tokens[0])
        for place in range(start, start + STEPS):
            model._run(cache, 0, ids[:, place : place + 1])

    return write


def adapters(model: Generator) -> dict[str, str]:
    """Return {candidate: adapter}: the base, the adapter as the graph holds it, and one that is fed."""
    if not model.adapters:
        return {"default": DEFAULT}
    model.fed(DEFAULT, FED)
    return {"base": BASE, "default": DEFAULT, "fed": FED}


def speeds(model: Generator, threads: int, budget_s: float) -> dict[str, Any]:
    """Return one row: tokens a second of each candidate, what the adapter costs, and all timings."""
    read, prompt, written = lengths(model.context)
    names = adapters(model)
    reading = interleave({k: prefill(model, name, read) for k, name in names.items()}, budget_s)
    writing = interleave({k: decode(model, name, prompt, written) for k, name in names.items()}, budget_s)
    row: dict[str, Any] = {"threads": threads}
    for what, timings, count in (("prefill", reading, read), ("decode", writing, STEPS)):
        row |= {f"{what}_{name}_tok_s": 1000 * count / timing.p50_ms for name, timing in timings.items()}
        row |= {f"{what}_{name}_pct": _cost(timings, name) for name in timings if name != "base" and "base" in timings}
        row[f"{what}_timings"] = {name: dataclasses.asdict(timing) for name, timing in timings.items()}
    row["disturbed"] = disturbed(reading["default"]) or disturbed(writing["default"])
    return row


def _cost(timings: Mapping[str, Timing], name: str) -> float:
    """Return by how many percent a candidate is slower than the base."""
    return 100 * (timings[name].p50_ms / timings["base"].p50_ms - 1)


def speeds_text(rows: list[Mapping[str, Any]]) -> str:
    """Return the table of tokens a second; a star marks a row that others disturbed."""
    return table([dict(_line(row)) for row in rows])


def _line(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "threads", f"{row['threads']}{'*' if row['disturbed'] else ''}"
    for what in ("prefill", "decode"):
        for name in ("base", "default", "fed"):
            if f"{what}_{name}_tok_s" in row:
                yield f"{what} {name} tok/s", round(row[f"{what}_{name}_tok_s"], 1)
        for name in ("default", "fed"):
            if f"{what}_{name}_pct" in row:
                yield f"{what} {name} %", round(row[f"{what}_{name}_pct"], 1)
