"""What a person sees on the terminal: plain lines, tables and progress bars, all on standard error.

Standard output is kept for results, so that `edgepeft run --json` can be piped. Of several processes that train
together one speaks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from edgepeft.ranks import leads

Item = TypeVar("Item")


def say(text: str = "") -> None:
    """Print a line for the person who waits."""
    if leads():
        print(text, file=sys.stderr, flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out rows of equal keys as a Markdown table, numbers to the right."""
    if not rows:
        return ""
    heads = list(rows[0])
    cells = [[_cell(row.get(head)) for head in heads] for row in rows]
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]
    right = [all(isinstance(row.get(head), (int, float, type(None))) for row in rows) for head in heads]

    def line(values: Sequence[str]) -> str:
        parts = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "| " + " | ".join(parts) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(heads), rule, *(line(values) for values in cells)])


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items with a progress bar; it shows only on a terminal."""
    from tqdm import tqdm

    yield from tqdm(items, desc=label, total=total, file=sys.stderr, disable=None, leave=False)
