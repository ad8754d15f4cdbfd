"""What a task makes of the logits, and the `edgepeft run` command around it.

Text classification: scores = softmax(logits) in float32 with the maximum taken off, the label is the greatest.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from edgepeft.console import say
from edgepeft.errors import DataError, VerifyError

if TYPE_CHECKING:
    from edgepeft.runtime.classify import Model

CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One text's answer: the best label, its probability, and {label: probability} with the best first."""

    label: str
    score: float
    scores: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return dataclasses.asdict(self)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities along the last axis, float32, of logits [rows, labels]."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def predictions(logits: np.ndarray, labels: Sequence[str], top_k: int | None = None) -> list[Prediction]:
    """Return one Prediction per row of logits [rows, labels], with the top_k scores or all of them.

    Raises VerifyError when the logits are not finite or are not one per label.
    """
    if logits.ndim != 2 or logits.shape[1] != len(labels):
        raise VerifyError(f"the model gave logits {list(logits.shape)} for {len(labels)} labels; export it again.")
    if not np.isfinite(logits).all():
        raise VerifyError("the model gave logits that are not finite (NaN or infinite); its answer cannot be used.")
    out = []
    for row in softmax(logits):
        order = np.argsort(-row, kind="stable")[:top_k]
        scores = {labels[i]: float(row[i]) for i in order}
        out.append(Prediction(labels[order[0]], float(row[order[0]]), scores))
    return out


# --- edgepeft run ------------------------------------------------------------------------------------------------


def _lines(stream: TextIO) -> Iterator[str]:
    """Yield the lines of a stream that hold text; say how many were blank."""
    blank = 0
    for line in stream:
        if line.strip():
            yield line.rstrip("\r\n")
        else:
            blank += 1
    if blank:
        say(f"skipped {blank} blank lines")


def _chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def inputs(texts: Sequence[str], file: Path | str | None) -> Iterator[list[str]]:
    """Yield the texts in chunks: arguments at once, a file by CHUNK lines, standard input ("-") line by line."""
    if texts and (file is not None or (len(texts) > 1 and "-" in texts)):
        raise DataError("texts come from one place: give them as arguments, or --file FILE, or -.")
    if file is not None and str(file) != "-":
        try:
            with open(file, encoding="utf-8-sig") as stream:
                yield from _chunks(_lines(stream), CHUNK)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}. Check the path.") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: expected UTF-8, found byte {error.object[error.start]:#x}. Save it so.") from None
    elif file is not None or list(texts) == ["-"]:
        yield from _chunks(_lines(sys.stdin), 1)
    elif texts:
        yield list(texts)
    else:
        raise DataError("no text given. Pass texts, --file FILE with one text a line, or - for standard input.")


def _print(text: str, answer: Prediction, as_json: bool) -> None:
    """Write one answer to standard output: a JSON line, or label, score and text by tabs, one line per score kept."""
    if as_json:
        print(json.dumps({"text": text, **answer.as_dict()}, ensure_ascii=False), flush=True)
        return
    for label, score in answer.scores.items():
        print(f"{label}\t{score:.4f}\t{text}", flush=True)


def run_cli(
    bundle: Path | str,
    texts: Sequence[str] = (),
    file: Path | str | None = None,
    as_json: bool = False,
    adapter: str | None = None,
    top_k: int | None = None,
    threads: int = 0,
    library: str = "auto",
    device: str = "cpu",
    precision: str = "float32",
) -> int:
    """Classify texts with a bundle and write the answers to standard output; return how many there were.

    Plain output keeps one label unless top_k asks for more; JSON keeps all scores unless top_k asks for fewer.
    """
    from edgepeft.runtime.session import load

    if top_k is not None and top_k < 1:
        raise DataError(f"--top-k: expected at least 1, found {top_k}.")
    model: Model = load(bundle, threads=threads, library=library, device=device, precision=precision)
    if adapter is not None:
        model.use(adapter)
    keep = top_k if top_k is not None or as_json else 1
    count = 0
    for chunk in inputs(texts, file):
        for text, answer in zip(chunk, model.classify(chunk, top_k=keep), strict=True):
            _print(text, answer, as_json)
            count += 1
    return count
