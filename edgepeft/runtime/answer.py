"""One answer while it is written: what it may still take, what it has, and what is known about it at the end.

An answer ends with the first that happens: "eos" (the model ended it), "stop" (a stop string came; it is cut off),
"length" (max_new_tokens, or the context is full), "cancelled" (the caller had enough).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from edgepeft.runtime.sampling import Sampler
from edgepeft.runtime.stream import Decoding, Stops


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer and how it came about. `tokens` include the one that ended it; `text` does not.

    reused_tokens: how many of the prompt's were known from before. note: what the caller asked for and cannot have.
    prefill_s: until the first token; decode_s: all after it, shared with the other rows of a batch.
    """

    text: str
    tokens: list[int]
    finish: str
    prompt_tokens: int
    reused_tokens: int
    prefill_s: float
    decode_s: float
    note: str | None = None

    @property
    def prefill_tok_s(self) -> float:
        """Return how many new tokens of the prompt were read a second."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Return how many tokens after the first were written a second."""
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values, speeds among them and the tokens as their number."""
        values = {**dataclasses.asdict(self), "tokens": len(self.tokens)}
        times = {name: round(getattr(self, name), 6) for name in ("prefill_s", "decode_s")}
        speeds = {name: round(getattr(self, name), 2) for name in ("prefill_tok_s", "decode_tok_s")}
        return {**values, **times, **speeds}


class Row:
    """An answer that is being written."""

    def __init__(
        self, prompt: list[int], limit: int, eos: Sequence[int], sampler: Sampler, decoding: Decoding, stops: Stops
    ) -> None:
        self.prompt, self.limit, self.eos = prompt, limit, frozenset(eos)
        self.tokens: list[int] = []
        self.finish = "" if limit else "length"
        self.note: str | None = None
        self.reused = 0
        self.prefill_s = self.decode_s = 0.0
        self._sampler, self._decoding, self._stops = sampler, decoding, stops
        self._text: list[str] = []

    def take(self, logits: np.ndarray) -> str:
        """Choose the next token by logits [vocabulary] and return the text that is certain now, often none.

        Raises VerifyError when the logits are not finite.
        """
        token = self._sampler.pick(logits)
        self.tokens.append(token)
        piece = "" if token in self.eos else self._stops.push(self._decoding.push(token))
        if token in self.eos or self._stops.hit or len(self.tokens) == self.limit:
            self.finish = "eos" if token in self.eos else "stop" if self._stops.hit else "length"
            piece += self._rest()
        self._text.append(piece)
        return piece

    def _rest(self) -> str:
        """Return the text that was held back, which may bring a stop string yet."""
        if self._stops.hit:
            return ""
        rest = self._stops.push(self._decoding.flush())
        if self._stops.hit:
            self.finish = "stop"
        return rest + self._stops.flush()

    def cancel(self) -> str:
        """End here, unless it has ended, and return the text that was held back."""
        if self.finish:
            return ""
        self.finish = "cancelled"
        rest = self._stops.push(self._decoding.flush()) + self._stops.flush()
        self._text.append(rest)
        return rest

    def answer(self) -> Answer:
        """Return what there is; an answer that has not ended yet counts as cancelled."""
        return Answer(
            "".join(self._text), list(self.tokens), self.finish or "cancelled", len(self.prompt), self.reused,
            self.prefill_s, self.decode_s, self.note,
        )  # fmt: skip


class Stream:
    """The pieces of an answer's text as they come. `answer` is what there is so far; `close` ends it early."""

    def __init__(self, row: Row, pieces: Generator[tuple[Row, str], None, None]) -> None:
        self._row, self._pieces = row, pieces

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not (piece := next(self._pieces)[1]):
            pass
        return piece

    def close(self) -> None:
        """End the answer here: its finish is "cancelled" unless it had ended."""
        self._row.cancel()
        self._pieces.close()

    @property
    def answer(self) -> Answer:
        """Return the answer; before the last piece came, what there is of it."""
        return self._row.answer()


class Clock:
    """Adds the time of a block to the same attribute of some rows."""

    def __init__(self, rows: Sequence[Row], attribute: str) -> None:
        self._rows, self._attribute = rows, attribute

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        spent = time.perf_counter() - self._started
        for row in self._rows:
            setattr(row, self._attribute, getattr(row, self._attribute) + spent)
