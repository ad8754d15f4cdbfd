"""From text to the arrays a graph takes: int64 [batch, sequence], padded on the right to the longest of the batch.

`tokenizers` reads the tokenizer.json that training used; its own padding and truncation are replaced by the bundle's
`max_length`, so that a text is cut on the device exactly where it was cut in training. Texts are encoded one by one:
that keeps the library's thread pool out of a process that may run beside others on four small cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.errors import ArtifactError, DataError

NAMES = ("input_ids", "attention_mask", "token_type_ids")


def is_unicode(text: str) -> bool:
    """Tell whether a string can be encoded: half of a surrogate pair cannot, and tokenizers refuse it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_texts(texts: Any) -> list[str]:
    """Return texts as a list. Raises DataError for anything but non-empty strings, with its place."""
    items = [texts] if isinstance(texts, str) else list(texts)
    for place, item in enumerate(items):
        if not isinstance(item, str):
            raise DataError(f"text {place}: expected a string, found {type(item).__name__} {item!r:.60}.")
        if not is_unicode(item):
            raise DataError(f"text {place}: not valid Unicode (half of a surrogate pair): {item!r:.60}.")
        if not item.strip():
            raise DataError(f"text {place}: empty. There is nothing to classify; leave it out.")
    return items


class Tokens:
    """A tokenizer and the longest sequence it may give; None cuts nothing."""

    def __init__(self, path: Path, max_length: int | None) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"{path}: not a tokenizer that this tokenizers package reads: {error}.") from None
        padding = self._tokenizer.padding or {}
        self.pad_id = int(padding.get("pad_id") or self._tokenizer.token_to_id("[PAD]") or 0)
        self.max_length = max_length
        self.vocabulary = int(self._tokenizer.get_vocab_size())
        self._tokenizer.no_padding()
        if max_length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(max_length)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Return one `tokenizers.Encoding` per text."""
        return [self._tokenizer.encode(text) for text in texts]

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text alone: those it spells, special ones among them, and none put around it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out; bytes that are no whole character become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def arrays(self, encodings: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return NAMES as int64 [len(encodings), longest]."""
        width = max(len(e.ids) for e in encodings)
        out = {name: np.zeros((len(encodings), width), np.int64) for name in NAMES}
        out["input_ids"][:] = self.pad_id
        for row, e in enumerate(encodings):
            length = len(e.ids)
            out["input_ids"][row, :length] = e.ids
            out["attention_mask"][row, :length] = 1
            out["token_type_ids"][row, :length] = e.type_ids
        return out

    def batches(self, texts: Sequence[str], size: int) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Yield (places in `texts`, arrays), texts of like length together so that little is padded."""
        encodings = self.encode(texts)
        order = sorted(range(len(texts)), key=lambda i: len(encodings[i].ids))
        for start in range(0, len(order), size):
            places = order[start : start + size]
            yield places, self.arrays([encodings[i] for i in places])
