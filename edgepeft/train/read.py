"""Rows out of a file: CSV, TSV, JSON, JSON Lines, Parquet and saved Hugging Face data sets, each with its place.

A reader turns one source into columns and a list of (place, values): the place is the line of a text file or the row of
a binary one, so that whatever is wrong with a row can be named where the person finds it. A file that is cut off,
damaged or not UTF-8 is refused; nothing is skipped or guessed.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepeft.errors import DataError

LONGEST_FIELD_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Table:
    """What a source holds: its column names and, per row, where it stands ("line 7") and its values."""

    source: Path
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, Mapping[str, Any]]]


def _text(path: Path) -> str:
    """Read UTF-8, with or without a byte-order mark; name the line that is neither."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: expected UTF-8, found byte 0x{raw[error.start]:02x}. Save the file as UTF-8."
        ) from None


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line where the row begins, fields)."""
    csv.field_size_limit(LONGEST_FIELD_BYTES)
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    line = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {line}: not valid CSV: {error}. Close the quoted text that begins there, or copy the "
                "file again if it was cut off."
            ) from None
        if fields:
            yield line, fields
        line = reader.line_num + 1


def _read_csv(path: Path, delimiter: str = ",") -> Table:
    rows = _csv_rows(path, delimiter)
    _, columns = next(rows, (1, []))
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"{path}, line 1: the header names {', '.join(map(repr, twice))} more than once. Rename one.")
    values = []
    for line, fields in rows:
        if len(fields) != len(columns):
            raise DataError(
                f"{path}, line {line}: expected {len(columns)} fields ({', '.join(columns)}), found {len(fields)}. "
                f'Put text that holds "{delimiter}" in double quotes.'
            )
        values.append((f"line {line}", dict(zip(columns, fields, strict=True))))
    return Table(path, tuple(columns), values)


def _read_json(path: Path) -> Table:
    """Read one JSON array of objects, or JSON Lines."""
    text = _text(path)
    if text.lstrip().startswith("["):
        found = [(f"record {i}", row) for i, row in enumerate(_parsed(path, text, 0), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        found = [(f"line {i}", _parsed(path, line, i - 1)) for i, line in lines if line.strip()]
    for place, row in found:
        if not isinstance(row, dict):
            raise DataError(f'{path}, {place}: expected an object such as {{"text": "…"}}, found {row!r:.60}.')
    return Table(path, tuple(dict.fromkeys(key for _, row in found for key in row)), found)


def _parsed(path: Path, text: str, lines_before: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        line = lines_before + getattr(error, "lineno", 1)
        raise DataError(f"{path}, line {line}: not valid JSON ({error}). If it was cut off, copy it again.") from None


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install pyarrow; or save the data as CSV.") from None
    try:
        table = pyarrow.parquet.read_table(path)
        found = [(f"row {i}", row) for i, row in enumerate(table.to_pylist(), 1)]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: truncated or not a Parquet file ({_short(error)}). Copy or make it again.") from None
    return Table(path, tuple(table.column_names), found)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def saved_tables(folder: Path) -> dict[str, Table]:
    """Read what `datasets` saved with save_to_disk: {split: table}; a data set without splits is {"": table}.

    Class labels are given by name. Raises DataError when the folder is damaged.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{folder}: reading a saved data set needs: pip install datasets; or save it as CSV.") from None
    try:
        loaded = datasets.load_from_disk(str(folder))
        parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
        return {name: _saved_table(folder / name, part) for name, part in parts.items()}
    except Exception as error:  # whatever pyarrow, json or the file system say about a damaged folder
        raise DataError(f"{folder}: damaged or no saved data set ({_short(error)}). Save it again.") from None


def _saved_table(source: Path, part: Any) -> Table:
    names = {name: feature.names for name, feature in part.features.items() if hasattr(feature, "names")}
    rows = []
    for i, row in enumerate(part, 1):
        for column, classes in names.items():
            if isinstance(row[column], int) and 0 <= row[column] < len(classes):
                row[column] = classes[row[column]]
        rows.append((f"row {i}", row))
    return Table(source, tuple(part.column_names), rows)


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def read_table(path: Path) -> Table:
    """Read one file by its ending. Raises DataError when it is missing, of an unknown kind, empty or damaged."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Check the path.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind {path.suffix!r}. Known: {', '.join(READERS)}; or a folder of splits.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes); expected rows with text and label.")
    return reader(path)
