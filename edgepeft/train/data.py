"""Labelled texts: from whatever was named to three checked splits.

    source ─► tables (`read`) ─► (text, label) with every row checked ─► train / validation / test ─► label ids

A source is 'home-assistant' (shipped), one file, a folder that holds train, validation and test files, or a data set
saved by `datasets`. Splits that are missing are cut from train: per label, by a hash of seed and text, with equal texts
on one side, so the same rows give the same splits in any order and on any machine. Labels are sorted: as numbers when
all are, else as text; the ids are positions in that order.

All problems of a source are reported together, with the first lines where each occurs.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.artifact import digests, key_of, sha256_file
from edgepeft.console import say
from edgepeft.errors import DataError
from edgepeft.runtime.tokens import is_unicode
from edgepeft.train.read import READERS, Table, read_table, saved_tables

if TYPE_CHECKING:
    from edgepeft.config import Config

SHIPPED = "home-assistant"
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SHARE = {"validation": 0.1, "test": 0.1}
SAVED_MARKERS = ("dataset_dict.json", "dataset_info.json")
Row = tuple[str, str, str]  # place, text, label


@dataclasses.dataclass(frozen=True)
class Split:
    """M examples: texts and label ids, in file order."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass(frozen=True)
class Splits:
    """The three splits and the label names; label id i is labels[i]."""

    train: Split
    validation: Split
    test: Split
    labels: tuple[str, ...]


def load_splits(config: Config) -> Splits:
    """Read, check and split the data of a configuration.

    Raises DataError that lists all problems: where, what was expected, what was found, what to do.
    """
    tables = _tables(config)
    problems: list[str] = []
    rows = {name: _checked(table, config, problems) for name, table in tables.items()}
    _raise(problems)
    rows = _with_missing(rows, config)
    labels = _labels(rows["train"])
    _raise(_label_problems(rows, labels, tables))
    _warn(rows)
    ids = {label: i for i, label in enumerate(labels)}
    parts = {
        name: Split(tuple(text for _, text, _ in part), tuple(ids[label] for *_, label in part))
        for name, part in rows.items()
    }
    return Splits(parts["train"], parts["validation"], parts["test"], labels)


def data_digest(config: Config) -> str:
    """Return a digest of the bytes that `load_splits` reads. Raises DataError when they are missing."""
    source = _source(config)
    if source.is_file():
        return sha256_file(source)
    if _is_saved(source):
        return key_of({name: value for name, value in digests(source).items() if "cache-" not in name})
    return key_of({name: sha256_file(path) for name, path in _split_files(source).items()})


# --- finding -----------------------------------------------------------------------------------------------------


def _source(config: Config) -> Path:
    """Return the file or folder that is meant."""
    if config.data == SHIPPED:
        from edgepeft.data import home_assistant

        return Path(home_assistant())
    source = Path(config.data).expanduser()
    if not source.exists():
        raise DataError(f"{source}: no such file or folder. Give a labelled file, a folder of splits or {SHIPPED!r}.")
    return source


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED_MARKERS)


def _split_files(folder: Path) -> dict[str, Path]:
    """Return {split: file} of a folder. Raises DataError when train is missing or a split is there twice."""
    found: dict[str, list[Path]] = {}
    for split, stems in SPLITS.items():
        files = [folder / f"{stem}{ending}" for stem in stems for ending in READERS]
        found[split] = [path for path in files if path.is_file()]
    for split, paths in found.items():
        if len(paths) > 1:
            raise DataError(f"{folder}: {split} is there {len(paths)} times ({_names(paths)}). Keep one.")
    if not found["train"]:
        kinds = ", ".join(READERS)
        raise DataError(
            f"{folder}: expected train, validation and test files ({kinds}) or a data set saved by save_to_disk; "
            f"found {_names(sorted(folder.iterdir())[:6]) or 'nothing'}."
        )
    return {split: paths[0] for split, paths in found.items() if paths}


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _tables(config: Config) -> dict[str, Table]:
    """Read every split that the source holds; a source without splits counts as train."""
    source = _source(config)
    if source.is_file():
        return {"train": read_table(source)}
    if not _is_saved(source):
        return {split: read_table(path) for split, path in _split_files(source).items()}
    saved = saved_tables(source)
    if "" in saved:
        return {"train": saved[""]}
    found = {split: saved[name] for split, stems in SPLITS.items() for name in stems if name in saved}
    if "train" not in found:
        raise DataError(f"{source}: expected a split named train, found {', '.join(saved) or 'none'}. Rename one.")
    return found


# --- checking ----------------------------------------------------------------------------------------------------


def _raise(problems: list[str]) -> None:
    if problems:
        raise DataError("\n".join(problems))


def _checked(table: Table, config: Config, problems: list[str]) -> list[Row]:
    """Return (place, text, label) of every row; add what is wrong to `problems`."""
    wrong = [_column_problem(table, name) for name in (config.text_column, config.label_column)]
    if any(wrong):
        problems += [f"{table.source}: {problem}" for problem in wrong if problem]
        return []
    if not table.rows:
        problems.append(f"{table.source}: no rows below the columns {', '.join(table.columns)}; expected examples.")
    bad: dict[str, list[str]] = {}
    rows = []
    for place, values in table.rows:
        text, label = values.get(config.text_column), _label(values.get(config.label_column))
        for problem in _row_problems(text, label, config):
            bad.setdefault(problem, []).append(place)
        rows.append((place, text if isinstance(text, str) else "", label or ""))
    problems += [f"{table.source}: {_places(places)}: {problem}" for problem, places in bad.items()]
    return rows


def _column_problem(table: Table, name: str) -> str | None:
    if name in table.columns:
        return None
    if not table.columns:
        return "no columns; expected a first line that names them, such as text,label."
    close = difflib.get_close_matches(name, table.columns, n=1, cutoff=0.0)[0]
    found = ", ".join(table.columns)
    return f"no column {name!r}; found {found}. Nearest: {close!r}; name yours with --text-column and --label-column."


def _label(value: Any) -> str | None:
    """Return a label as text: 3 and 3.0 are '3', a missing one is None."""
    if value is None or value != value or isinstance(value, (list, dict)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _row_problems(text: Any, label: str | None, config: Config) -> list[str]:
    problems = []
    if text is not None and not isinstance(text, str):
        problems.append(f"expected text in {config.text_column!r}, found {type(text).__name__}. Quote it.")
    elif not (text or "").strip():
        problems.append("the text is empty. Fill in or remove these rows.")
    elif not is_unicode(text or ""):
        problems.append("the text is not valid Unicode (half of a surrogate pair). Mend or remove these rows.")
    if label is None:
        problems.append("the label is missing. Fill in or remove these rows.")
    return problems


def _places(places: list[str], limit: int = 5) -> str:
    """Return "3 rows (line 4, line 9, line 12)"."""
    more = ", ..." if len(places) > limit else ""
    return f"{len(places)} row{'s' * (len(places) > 1)} ({', '.join(places[:limit])}{more})"


def _labels(rows: list[Row]) -> tuple[str, ...]:
    """Return the distinct labels, as numbers in order when all are integers."""
    names = {label for *_, label in rows}
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def _label_problems(rows: Mapping[str, list[Row]], labels: tuple[str, ...], tables: Mapping[str, Table]) -> list[str]:
    """Check the labels of all splits against those of train."""
    source = tables["train"].source
    if len(labels) < 2:
        return [f"{source}: expected at least 2 labels, found 1 ({labels[0]!r}). Check --label-column."]
    counts = Counter(label for *_, label in rows["train"])
    rare = [label for label in labels if counts[label] < 2]
    problems = []
    if rare:
        names = ", ".join(map(repr, rare[:5])) + (", ..." if len(rare) > 5 else "")
        problems.append(
            f"{source}: {len(rare)} labels have fewer than 2 training examples ({names}). Add examples or drop them."
            + (" Is this a column of numbers or free text?" if len(rare) > len(labels) / 2 else "")
        )
    for split in ("validation", "test"):
        strange: dict[str, list[str]] = {}
        for place, _, label in rows[split]:
            if label not in counts:
                strange.setdefault(label, []).append(place)
        where = tables[split].source if split in tables else source
        for label, places in sorted(strange.items()):
            problems.append(f"{where}: {_places(places)}: label {label!r} of {split} never occurs in train.")
        if not rows[split]:
            problems.append(f"{where}: too few examples to cut {split} from train. Add some or give a {split} file.")
    return problems


def _warn(rows: Mapping[str, list[Row]]) -> None:
    """Tell what does not stop training but bends its figures: leaks and contradictions."""
    train = {text for _, text, _ in rows["train"]}
    for split in ("validation", "test"):
        if leaked := sum(text in train for _, text, _ in rows[split]):
            say(f"  note: {leaked} of {len(rows[split])} {split} texts are in train as well; its figures look better.")
    known: dict[str, set[str]] = {}
    for _, text, label in rows["train"]:
        known.setdefault(text, set()).add(label)
    if doubtful := [text for text, names in known.items() if len(names) > 1]:
        say(f"  note: {len(doubtful)} texts carry different labels, such as {doubtful[0]!r:.60}.")


# --- splitting ---------------------------------------------------------------------------------------------------


def _with_missing(rows: Mapping[str, list[Row]], config: Config) -> dict[str, list[Row]]:
    """Cut the splits that are missing from train."""
    result = {"train": rows["train"], "validation": rows.get("validation", []), "test": rows.get("test", [])}
    missing = [name for name in SHARE if name not in rows]
    if not missing:
        return result
    where = _assignment(rows["train"], {name: SHARE[name] for name in missing}, config.seed)
    for name in ("train", *missing):
        result[name] = [row for row in rows["train"] if where[row[1]] == name]
    sizes = ", ".join(f"{name} {len(result[name])}" for name in ("train", *missing))
    say(f"  no {' or '.join(missing)} split in {config.data}: cut by label with seed {config.seed} ({sizes})")
    return result


def _assignment(rows: list[Row], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Return {text: split}: per label, distinct texts in the order of their hash; 5 of them put one in each split."""
    first: dict[str, str] = {}
    for _, text, label in rows:
        first[text] = min(label, first.get(text, label))
    by_label: dict[str, list[str]] = {}
    for text, label in first.items():
        by_label.setdefault(label, []).append(text)
    where: dict[str, str] = {}
    for texts in by_label.values():
        texts.sort(key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "surrogatepass")).digest())
        names = []
        for name, share in shares.items():
            names += [name] * max(int(len(texts) * share + 0.5), len(texts) >= 5)
        names = names if len(names) <= len(texts) - 2 else []
        where.update(zip(texts, names + ["train"] * (len(texts) - len(names)), strict=True))
    return where
