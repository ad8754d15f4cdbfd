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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def _twice(names: Iterable[str]) -> str:
    """Return the names that occur more than once, for a sentence; of two equal columns readers keep either one."""
    return ", ".join(repr(name) for name, count in Counter(names).items() if count > 1)


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
    if twice := _twice(columns):
        raise DataError(f"{path}, line 1: the header names {twice} more than once. Rename one.")
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
        found = [(f"record {i}", row) for i, row in enumerate(_parsed(path, text), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        found = [(f"line {i}", _parsed(path, line, i)) for i, line in lines if line.strip()]
    for place, row in found:
        if not isinstance(row, dict):
            raise DataError(f'{path}, {place}: expected an object such as {{"text": "…"}}, found {row!r:.60}.')
    return Table(path, tuple(dict.fromkeys(key for _, row in found for key in row)), found)


def _parsed(path: Path, text: str, line: int = 0) -> Any:
    """Parse one line, or a whole file where no line is given."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        line = line or getattr(error, "lineno", 0)
        raise DataError(
            f"{path}{f', line {line}' if line else ''}: not valid JSON ({_short(error)}). Expected one object per line "
            "or one array of objects; if the file was cut off, copy it again."
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := _twice(key for key, _ in pairs):
        raise ValueError(f"{twice} more than once in {pairs[:2]!r:.60}")
    return dict(pairs)


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install pyarrow; or save the data as CSV.") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
        names = table.column_names
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: truncated or not a Parquet file ({_short(error)}). Copy or make it again.") from None
    if twice := _twice(names):
        raise DataError(f"{path}: the schema names {twice} more than once. Rename one.")
    columns = [_parquet_values(path, name, column) for name, column in zip(names, table.columns, strict=True)]
    rows = enumerate(zip(*columns, strict=True), 1)
    return Table(path, tuple(names), [(f"row {i}", dict(zip(names, values, strict=True))) for i, values in rows])


def _parquet_values(path: Path, name: str, column: Any) -> list[Any]:
    """Return a column as Python values; a flipped bit shows only here, as text that is not UTF-8 or a date too far."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError) as error:
        raise DataError(f"{path}, column {name!r}: damaged ({_short(error)}). Copy or make the file again.") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def saved_tables(folder: Path) -> dict[str, Table]:
    """Read what `datasets` saved with save_to_disk: {split: table}; a data set without splits is {"": table}.

    Class labels are given by name, -1 as None. Raises DataError when the folder is damaged.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{folder}: reading a saved data set needs: pip install datasets; or save it as CSV.") from None
    index = folder / "dataset_dict.json"
    if index.is_file() and (folder / "state.json").is_file():
        raise DataError(
            f"{folder}: two saved data sets, one with splits and one without. Save yours in a folder alone."
        )
    where, found = folder, {}
    try:
        for name in json.loads(index.read_bytes())["splits"] if index.is_file() else [""]:
            where = folder / name
            found[name] = _saved_table(where, datasets.load_from_disk)
    except Exception as error:  # whatever pyarrow, json or the file system say about a damaged folder
        raise DataError(f"{where}: damaged or no saved data set ({_short(error)}). Save it again.") from None
    return found


def _saved_table(source: Path, load: Callable[[str], Any]) -> Table:
    """Read one split as plain Python values, whatever format (torch, numpy) it was set to when it was saved.

    A split without rows has no file that could be loaded.
    """
    if not json.loads((source / "state.json").read_bytes())["_data_files"]:
        return Table(source, (), [])
    part = load(str(source)).with_format(None)
    classes = {name: feature.names for name, feature in part.features.items() if getattr(feature, "names", None)}
    rows = []
    for i, row in enumerate(part, 1):
        named = {column: _class_name(names, row[column], f"row {i}, {column!r}") for column, names in classes.items()}
        rows.append((f"row {i}", {**row, **named}))
    return Table(source, tuple(part.column_names), rows)


def _class_name(names: Sequence[str], value: int | None, where: str) -> str | None:
    """Return the name of a class; -1 is how Hugging Face marks a row without one, as in test splits kept secret."""
    if value is None or value == -1:
        return None
    if not 0 <= value < len(names):
        raise ValueError(f"{where}: expected a class from 0 to {len(names) - 1}, found {value}")
    return names[value]


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def read_table(path: Path) -> Table:
    """Read one file by its ending. Raises DataError when it is missing, of an unknown kind or damaged."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Check the path.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind {path.suffix!r}. Known: {', '.join(READERS)}; or a folder of splits.")
    return reader(path)
