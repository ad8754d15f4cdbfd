"""How a measured process talks with `edgepeft.bench.turns`: JSON lines, one for each question and one for each answer.

    argument  {"folder", "threads", "context", ...}   what to load
    ready     {"version", "load_s", "anonymous_bytes"}
    question  {"what": "prefill", "adapter": true, "tokens": 512}                read a text of that length
              {"what": "decode", "adapter": true, "prompt": 128, "tokens": 16}   write behind it, up to ROOM tokens
    answer    {"seconds", "cpu_s"}                    of the wall and of this process's processors

anonymous_bytes is what loading and one short answer added to the imported packages and no file backs. Tokens are
scattered over the vocabulary and the same for all. Standard library alone: other interpreters run this file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

STRIDE = 7919  # a prime: tokens that lie far apart in any vocabulary
ROOM = 128
SHORT = 16


class Text(Protocol):
    """A text that a model has read."""

    @property
    def length(self) -> int:
        """Return how many tokens were read."""

    def read(self, ids: list[int]) -> None:
        """Read more tokens and compute the logits of the last."""

    def back(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


class Engine(Protocol):
    """A loaded model."""

    version: str
    vocabulary: int

    def open(self, adapter: bool) -> Text:
        """Return an empty text with the adapter on or off."""


def anonymous_bytes() -> int:
    """Return this process's memory that no file backs."""
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) << 10 for line in stream if line.startswith("RssAnon"))


def tokens(start: int, count: int, vocabulary: int) -> list[int]:
    """Return the ids of a text from `start` on."""
    return [(place + 1) * STRIDE % vocabulary for place in range(start, start + count)]


def read(engine: Engine, text: Text, count: int) -> None:
    """Read `count` tokens at once."""
    text.read(tokens(text.length, count, engine.vocabulary))


def write(engine: Engine, text: Text, count: int) -> None:
    """Read `count` tokens one by one, as writing does."""
    for _ in range(count):
        read(engine, text, 1)


def timed(engine: Engine, text: Text, asked: dict[str, Any]) -> dict[str, float]:
    """Return what a question took. The prompt of a decode is read before the clock starts."""
    prompt, count = asked.get("prompt", 0), asked["tokens"]
    if asked["what"] == "prefill" or not prompt <= text.length <= prompt + ROOM - count:
        text.back(min(prompt, text.length))
    if text.length < prompt:
        read(engine, text, prompt - text.length)
    act = read if asked["what"] == "prefill" else write
    cpu, wall = time.process_time(), time.perf_counter()
    act(engine, text, count)
    return {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def say(answer: dict[str, Any]) -> None:
    """Print one line."""
    print(json.dumps(answer), flush=True)


def serve(load: Callable[[], Engine]) -> None:
    """Load, say so, then answer until the questions end."""
    before, started = anonymous_bytes(), time.perf_counter()
    engine = load()
    load_s = time.perf_counter() - started
    texts = {True: engine.open(True)}
    read(engine, texts[True], SHORT)
    write(engine, texts[True], 1)
    say({"version": engine.version, "load_s": load_s, "anonymous_bytes": anonymous_bytes() - before})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["adapter"] not in texts:
            texts[asked["adapter"]] = engine.open(asked["adapter"])
        say(timed(engine, texts[asked["adapter"]], asked))
