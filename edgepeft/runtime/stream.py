"""From tokens to text while they come: nothing is shown that a later token could change or take back.

    token ──► Decoding ──► text whose characters are whole ──► Stops ──► text that begins no stop string ──► shown

A character may be spread over tokens, and decoders look at neighbours (a leading space is dropped from a first token
only). So a window is decoded, the tokens shown last and those since, and what it has more than the former is new:

    new = decode(shown_last + since)[len(decode(shown_last)):]         held back while it ends in U+FFFD

Left out: decoders that change text more than one piece back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8  # tokens of the prompt that a continuation is decoded after


class Decoding:
    """The text of one answer's tokens. `before` are tokens that it continues, whose own text is not given."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(before[-CONTEXT:])
        self._shown = len(self._window)

    def _new(self) -> str:
        """Return the text of the window that was not given yet."""
        return self._decode(self._window)[len(self._decode(self._window[: self._shown])) :]

    def push(self, token: int) -> str:
        """Take a token and return the text that is certain now, often none."""
        self._window.append(token)
        new = self._new()
        if not new or new.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return new

    def flush(self) -> str:
        """Return what was held back, at the end: bytes that no token completed are U+FFFD."""
        new = self._new()
        self._shown = len(self._window)
        return new


class Stops:
    """Stop strings: text before the first is shown, what may be the beginning of one is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Take text and return what may be shown; after a stop string `hit` is set and nothing follows."""
        held = self._held + text
        found = [(place + len(s), place) for s in self._strings if (place := held.find(s)) >= 0]
        self.hit = bool(found)
        shown = min(found)[1] if found else len(held) - self._begun(held)
        self._held = "" if self.hit else held[shown:]
        return held[:shown]

    def _begun(self, text: str) -> int:
        """Return how many of the last characters are the beginning of a stop string."""
        longest = max((len(string) - 1 for string in self._strings), default=0)
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(s.startswith(text[-size:]) for s in self._strings)), 0)

    def flush(self) -> str:
        """Return what was held back, at the end."""
        held, self._held = self._held, ""
        return held
