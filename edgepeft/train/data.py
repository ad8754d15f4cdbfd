"""Labelled texts: from whatever was named to three checked splits. (`chats` holds what has no labels.)

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
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from edgepeft.artifact import digests, file_digest, key_of
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
Part = TypeVar("Part")


@dataclasses.dataclass(frozen=True)
class Split:
    """M examples: texts and label ids, in file order."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def encode(self, tokenizer: Any, limit: int, name: str | None = None) -> list[dict[str, Any]]:
        """Turn the texts into rows of token ids, cut at `limit`; tell how many were cut when the split has a name."""
        encoded = tokenizer(list(self.texts), truncation=False, verbose=False)
        cut = sum(len(ids) > limit for ids in encoded["input_ids"])
        if cut:
            encoded = tokenizer(list(self.texts), truncation=True, max_length=limit)
        if name and cut:
            say(f"  {name}: {cut} of {len(self)} texts are longer than {limit} tokens and were cut (--max-length)")
        fields = [field for field in ("input_ids", "token_type_ids", "attention_mask") if field in encoded]
        return [{**{f: encoded[f][i] for f in fields}, "labels": label} for i, label in enumerate(self.labels)]


@dataclasses.dataclass(frozen=True)
class Splits(Generic[Part]):
    """The three splits and the label names; label id i is labels[i]. Tasks without labels have none."""

    train: Part
    validation: Part
    test: Part
    labels: tuple[str, ...]


def load_splits(config: Config) -> Splits[Any]:
    """Read, check and split the data of a configuration in the way of its task.

    Raises DataError that lists all problems: where, what was expected, what was found, what to do.
    """
    from edgepeft.train.tasks import TASKS

    return TASKS[config.task].read(config)


def labelled_splits(config: Config) -> Splits[Split]:
    """Return the splits of a source of texts and labels.

    Raises DataError that lists all problems: where, what was expected, what was found, what to do.
    """
    tables = read_tables(config)
    problems: list[str] = []
    rows = {name: _checked(name, table, config, problems) for name, table in tables.items()}
    raise_all(problems)
    rows = _with_missing(rows, config)
    labels = _labels(rows["train"])
    raise_all(_label_problems(rows, labels, tables))
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
        return file_digest(source)
    if _is_saved(source):
        return key_of({name: value for name, value in digests(source).items() if "cache-" not in name})
    return key_of({name: file_digest(path) for name, path in _split_files(source).items()})


# --- finding -----------------------------------------------------------------------------------------------------


def _source(config: Config) -> Path:
    """Return the file or folder that is meant."""
    if config.data == SHIPPED:
        from edgepeft.data import home_assistant

        return Path(home_assistant())
    source = Path(config.data).expanduser()
    if not (source.is_file() or source.is_dir()):
        raise DataError(
            f"{source}: no such file or folder. Give a labelled file (no pipe), a folder of splits or {SHIPPED!r}."
        )
    return source


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED_MARKERS)


def _split_files(folder: Path) -> dict[str, Path]:
    """Return {split: file} of a folder. Raises DataError when train is missing or a split is there twice."""
    found = _by_split(folder, [path.name for path in folder.iterdir() if path.is_file()], READERS)
    if "train" not in found:
        kinds, there = ", ".join(READERS), ", ".join(sorted(path.name for path in folder.iterdir())[:6])
        raise DataError(
            f"{folder}: expected train, validation and test files ({kinds}) or a data set saved by save_to_disk; "
            f"found {there or 'nothing'}."
        )
    return {split: folder / name for split, name in found.items()}


def _by_split(source: Path, there: Collection[str], endings: Iterable[str] = ("",)) -> dict[str, str]:
    """Return {split: its name among those that are there}. Raises DataError when a split is there twice."""
    found = {}
    for split, stems in SPLITS.items():
        names = [name for stem in stems for ending in endings if (name := f"{stem}{ending}") in there]
        if len(names) > 1:
            raise DataError(f"{source}: {split} is there {len(names)} times ({', '.join(names)}). Keep one.")
        if names:
            found[split] = names[0]
    return found


def read_tables(config: Config) -> dict[str, Table]:
    """Read every split that the source holds; a source without splits counts as train."""
    source = _source(config)
    if source.is_file():
        return {"train": read_table(source)}
    if not _is_saved(source):
        return {split: read_table(path) for split, path in _split_files(source).items()}
    saved = saved_tables(source)
    if "" in saved:
        return {"train": saved[""]}
    found = _by_split(source, saved)
    if "train" not in found:
        raise DataError(f"{source}: expected a split named train, found {', '.join(saved) or 'none'}. Rename one.")
    return {split: saved[name] for split, name in found.items()}


# --- checking ----------------------------------------------------------------------------------------------------


def raise_all(problems: list[str]) -> None:
    """Raise them as one DataError, if there are any."""
    if problems:
        raise DataError("\n".join(problems))


def _checked(split: str, table: Table, config: Config, problems: list[str]) -> list[Row]:
    """Return (place, text, label) of every row; add what is wrong to `problems`."""
    or_cut = "" if split == "train" else f", or leave {split} out: it is then cut from train"
    if not table.rows:
        columns = f"{config.text_column!r} and {config.label_column!r}"
        problems.append(f"{table.source}: no rows; expected examples with {columns}. Add some{or_cut}.")
        return []
    wrong = [_column_problem(table, name) for name in (config.text_column, config.label_column)]
    if any(wrong):
        problems += [f"{table.source}: {problem}" for problem in wrong if problem]
        return []
    bad: dict[str, list[str]] = {}
    rows = []
    for place, values in table.rows:
        text, label = decoded(values.get(config.text_column)), decoded(values.get(config.label_column))
        for problem in _row_problems(text, label, config, or_cut):
            bad.setdefault(problem, []).append(place)
        rows.append((place, text if isinstance(text, str) else "", _label(label) or ""))
    problems += [f"{table.source}: {listed(places)}: {problem}" for problem, places in bad.items()]
    return rows


def _column_problem(table: Table, name: str) -> str | None:
    if name in table.columns:
        return None
    if not table.columns:
        return f"no columns; expected {name!r}."
    close = difflib.get_close_matches(name, table.columns, n=1)
    found, nearest = ", ".join(map(repr, table.columns)), f" Did you mean {close[0]!r}?" if close else ""
    return f"no column {name!r}; found {found}.{nearest} Name yours with --text-column and --label-column."


def decoded(value: Any) -> Any:
    """Return the text of a binary column; bytes that are not UTF-8 stay bytes."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _label(value: Any) -> str | None:
    """Return a label as text: 3 and 3.0 are '3', a missing one is None."""
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def kind_of(value: Any) -> str:
    """Return what a value is, for a sentence about what it should have been."""
    return "bytes that are not UTF-8" if isinstance(value, bytes) else type(value).__name__


def _row_problems(text: Any, label: Any, config: Config, or_cut: str) -> list[str]:
    problems = []
    if text is not None and not isinstance(text, str):
        problems.append(f"expected text in {config.text_column!r}, found {kind_of(text)}. Save it as text.")
    elif not (text or "").strip():
        problems.append("the text is empty. Fill in or remove these rows.")
    elif not is_unicode(text or ""):
        problems.append("the text is not valid Unicode (half of a surrogate pair). Mend or remove these rows.")
    if isinstance(label, (list, dict, bytes)):
        problems.append(
            f"expected a name or number in {config.label_column!r}, found {kind_of(label)}. Save it as text."
        )
    elif _label(label) is None:
        none = "blank, null, or -1 in a ClassLabel column"
        problems.append(f"the label is missing ({none}). Fill in or remove these rows{or_cut}.")
    elif not is_unicode(str(label)):
        problems.append("the label is not valid Unicode (half of a surrogate pair). Mend or remove these rows.")
    return problems


def listed(places: list[str], limit: int = 5) -> str:
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
            problems.append(f"{where}: {listed(places)}: label {label!r} of {split} never occurs in train.")
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
    where = assignment(rows["train"], {name: SHARE[name] for name in missing}, config.seed)
    for name in ("train", *missing):
        result[name] = [row for row in rows["train"] if where[row[1]] == name]
    sizes = ", ".join(f"{name} {len(result[name])}" for name in ("train", *missing))
    say(f"  no {' or '.join(missing)} split in {config.data}: cut by label with seed {config.seed} ({sizes})")
    return result


def assignment(rows: list[Row], shares: Mapping[str, float], seed: int) -> dict[str, str]:
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
