"""Every kind of source gives the same examples, and every way a source can be wrong is named with its place."""

import json
import os
from pathlib import Path

import pytest
from builders import LABELS, sentences, tiny_data, write_rows

from edgepeft.config import Config
from edgepeft.errors import DataError
from edgepeft.train.data import Splits, data_digest, load_splits

KINDS = ("csv", "jsonl", "parquet", "folder", "dataset", "dataset-dict")


def config(path: Path, **changes: object) -> Config:
    return Config(data=str(path), **changes)  # type: ignore[arg-type]  # of many types


def labelled(values: list[object]) -> list[dict[str, object]]:
    """Return 15 rows with three values as labels."""
    return [{"text": row["text"], "label": values[LABELS.index(row["label"])]} for row in sentences(5)]


def saved(folder: Path, **splits: list[int | None]) -> Path:
    """Save a data set whose splits have these classes of LABELS."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS))})
    columns = {name: {"text": [f"{name} {i}" for i in range(len(ids))], "label": ids} for name, ids in splits.items()}
    parts = {name: Dataset.from_dict(part, features) for name, part in columns.items()}
    DatasetDict(parts).save_to_disk(str(folder))
    return folder


def flip(path: Path, text: bytes) -> None:
    """Turn a bit where some text stands last."""
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(text)] ^= 0x80
    path.write_bytes(raw)


def pairs(splits: Splits) -> set[tuple[str, str]]:
    parts = (splits.train, splits.validation, splits.test)
    return {(text, splits.labels[label]) for part in parts for text, label in zip(part.texts, part.labels, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_examples(tmp_path: Path, kind: str) -> None:
    splits = load_splits(config(tiny_data(tmp_path, kind)))
    assert splits.labels == LABELS
    assert pairs(splits) == {(row["text"], row["label"]) for row in sentences()}
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (72, 9, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_digest_follows_the_bytes(tmp_path: Path, kind: str) -> None:
    path = tiny_data(tmp_path / "a", kind)
    assert data_digest(config(path)) == data_digest(config(path))
    assert data_digest(config(path)) != data_digest(config(tiny_data(tmp_path / "b", kind, seed=1)))


def test_cut_splits_are_stratified_and_hold_for_any_order(tmp_path: Path) -> None:
    rows = sentences(40)
    first = load_splits(config(write_rows(tmp_path / "a.csv", rows)))
    other = load_splits(config(write_rows(tmp_path / "b.csv", rows[::-1])))
    moved = load_splits(config(tmp_path / "a.csv", seed=1))
    assert sorted(first.test.labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert set(first.test.texts) == set(other.test.texts) != set(moved.test.texts)


def test_duplicates_stay_in_one_split(tmp_path: Path) -> None:
    splits = load_splits(config(write_rows(tmp_path / "a.csv", sentences() * 3)))
    assert not set(splits.train.texts) & set(splits.test.texts)
    assert len(splits.test) == 27


def test_missing_splits_are_cut_from_train(tmp_path: Path) -> None:
    path = tiny_data(tmp_path, "folder")
    (path / "validation.csv").unlink()
    splits = load_splits(config(path))
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (72, 9)
    assert 6 <= len(splits.validation) <= 9
    assert set(splits.train.labels) == set(splits.validation.labels)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_integer_labels_sort_as_numbers(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"text {i}", "label": i % 11} for i in range(110)]
    assert load_splits(config(write_rows(tmp_path / f"a.{kind}", rows))).labels == tuple(map(str, range(11)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([name.encode() for name in LABELS], LABELS),
        ([1.0, 2.0, 3.0], ("1", "2", "3")),
        ([-1, 0, 1], ("-1", "0", "1")),
        ([False, True, True], ("False", "True")),
    ],
)
def test_labels_of_any_type_are_given_as_text(tmp_path: Path, values: list[object], expected: tuple[str, ...]) -> None:
    rows = [{**row, "text": str(row["text"]).encode()} for row in labelled(values)]
    splits = load_splits(config(write_rows(tmp_path / "a.parquet", rows)))
    assert splits.labels == expected
    assert {text for text, _ in pairs(splits)} == {row["text"] for row in sentences(5)}


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_a_saved_format_changes_nothing(tmp_path: Path, form: str) -> None:
    from datasets import Dataset

    rows = Dataset.from_list(labelled([1, 2, 3]))
    rows.with_format(form, columns=["label"]).save_to_disk(str(tmp_path / "saved"))
    assert load_splits(config(tmp_path / "saved")).labels == ("1", "2", "3")


def test_class_labels_are_given_by_name(tmp_path: Path) -> None:
    import datasets

    saved = datasets.Dataset.from_list(sentences()).class_encode_column("label")
    saved.save_to_disk(str(tmp_path / "saved"))
    assert load_splits(config(tmp_path / "saved")).labels == LABELS


def test_leaks_and_contradictions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sentences()
    write_rows(tmp_path / "train.csv", [*rows, {"text": rows[0]["text"], "label": "music"}])
    write_rows(tmp_path / "validation.csv", rows[:5])
    write_rows(tmp_path / "test.csv", [{"text": "a new song", "label": "music"}])
    load_splits(config(tmp_path))
    told = capsys.readouterr().err
    assert "5 of 5 validation texts" in told
    assert "different labels" in told


GOOD = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in sentences(5))
LINES = "".join(json.dumps(row) + "\n" for row in sentences(5))
FAULTS = {
    "missing": ("a.csv", None, ["a.csv", "no such file"]),
    "unknown kind": ("a.xlsx", "x", ["unknown kind '.xlsx'", ".csv", ".parquet"]),
    "empty": ("a.csv", "", ["no rows", "'text' and 'label'"]),
    "only a header": ("a.csv", "text,label\n", ["no rows"]),
    "wrong columns": (
        "a.csv",
        "txt,lable\na,b\n",
        ["no column 'text'", "no column 'label'", "Did you mean 'txt'?", "--text-"],
    ),
    "columns with other names": ("a.csv", "body,topic\na,b\n", ["found 'body', 'topic'. Name yours"]),
    "unclosed quote": ("a.csv", GOOD + '"turn off,light_off\n', ["line 17", "not valid CSV"]),
    "too many fields": ("a.csv", GOOD + "please, do,light_on\n", ["line 17", "expected 2 fields", "found 3"]),
    "cut off": ("a.csv", GOOD + "turn", ["line 17", "found 1"]),
    "not UTF-8": ("a.csv", GOOD.encode() + "f\xfcr,music\n".encode("latin-1"), ["line 17", "0xfc", "UTF-8"]),
    "empty texts": ("a.csv", GOOD + ",music\n  ,music\n", ["2 rows (line 17, line 18)", "text is empty"]),
    "half an emoji": ("a.jsonl", '{"text": "play \\ud83d", "label": "a"}\n' * 3, ["not valid Unicode", "line 1"]),
    "a column twice": ("a.csv", "text,label,label\na,x,y\n", ["line 1", "'label' more than once"]),
    "missing labels": ("a.csv", GOOD + "turn on,\n", ["1 row (line 17)", "label is missing"]),
    "one label": ("a.csv", "text,label\na,x\nb,x\n", ["at least 2 labels", "'x'"]),
    "rare label": ("a.csv", GOOD + "odd,odd\n", ["1 labels", "fewer than 2", "'odd'"]),
    "too few to cut": ("a.csv", "text,label\na,x\nb,x\nc,y\nd,y\n", ["too few examples to cut validation"]),
    "json cut off": ("a.jsonl", LINES + '{"text": "tu', ["line 16", "not valid JSON"]),
    "json of nothing": ("a.jsonl", "\n \n", ["no rows"]),
    "json of an empty array": ("a.json", "[]", ["no rows"]),
    "json of empty objects": ("a.jsonl", "{}\n{}\n", ["no columns; expected 'text'"]),
    "json too deep": ("a.jsonl", LINES + "[" * 100_000, ["line 16", "not valid JSON", "recursion"]),
    "json array too deep": ("a.json", "[" * 100_000, ["a.json: not valid JSON", "recursion"]),
    "json key twice": (
        "a.jsonl",
        LINES + '{"text": "a", "label": "b", "label": "music"}',
        ["line 16", "'label' more than once"],
    ),
    "json key twice in an array": (
        "a.json",
        '[\n{"text": "a", "text": "b"}]',
        ["a.json: not", "'text' more than once"],
    ),
    "json in lines of arrays": ("a.jsonl", '["text"]\n["label"]\n', ["line 2", "one object per line"]),
    "json label of another type": (
        "a.jsonl",
        LINES + '{"text": "a", "label": ["b"]}',
        ["line 16", "number in 'label', found list"],
    ),
    "half an emoji as label": ("a.jsonl", '{"text": "play", "label": "\\ud83d"}\n' * 3, ["label is not valid Unicode"]),
    "json of no objects": ("a.jsonl", LINES + "[1]\n", ["line 16", "expected an object"]),
    "json text of another type": ("a.jsonl", LINES + '{"text": 3, "label": "music"}\n', ["line 16", "expected text"]),
    "parquet cut off": ("a.parquet", b"PAR1" + bytes(64), ["truncated or not a Parquet file"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_named_with_its_place(tmp_path: Path, fault: str) -> None:
    name, content, expected = FAULTS[fault]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load_splits(config(tmp_path / name))
    assert [part for part in expected if part not in str(caught.value)] == []
    assert name in str(caught.value)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv", [*sentences(5), {"text": "", "label": "music"}])
    write_rows(tmp_path / "test.csv", [{"text": "a", "label": ""}])
    with pytest.raises(DataError) as caught:
        load_splits(config(tmp_path))
    assert "train.csv" in str(caught.value)
    assert "test.csv" in str(caught.value)


def test_a_label_unseen_in_train_is_refused(tmp_path: Path) -> None:
    path = tiny_data(tmp_path, "folder")
    write_rows(path / "validation.csv", [{"text": "open it", "label": "door"}])
    with pytest.raises(DataError, match=r"validation.csv: 1 row \(line 2\): label 'door' of validation never occurs"):
        load_splits(config(path))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: (p / "notes.txt").write_text("x"), "found notes.txt"),
        (
            lambda p: (tiny_data(p, "folder") / "val.csv").write_text("x"),
            r"is there 2 times \(validation.csv, val.csv\)",
        ),
        (lambda p: (p / "dataset_info.json").write_text("{"), "damaged or no saved data set"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path: Path, make: object, expected: str) -> None:
    make(tmp_path)  # type: ignore[operator]  # a lambda
    with pytest.raises(DataError, match=expected):
        load_splits(config(tmp_path))


def test_a_damaged_saved_data_set_is_refused(tmp_path: Path) -> None:
    path = tiny_data(tmp_path, "dataset")
    arrow = next(path.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(DataError, match="Save it again"):
        load_splits(config(path))


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(("ending", "content"), [("csv", ""), ("csv", "text,label\n"), ("jsonl", "\n"), ("json", "[]")])
def test_an_empty_split_is_named_with_what_to_do(tmp_path: Path, split: str, ending: str, content: str) -> None:
    path = tiny_data(tmp_path, "folder")
    (path / f"{split}.csv").unlink()
    (path / f"{split}.{ending}").write_text(content)
    with pytest.raises(DataError, match=rf"{split}.{ending}: no rows; expected .*leave {split} out: it is then cut"):
        load_splits(config(path))


TRAIN = [0, 1, 2] * 8
SAVED = {
    "no labels in test": (
        {"train": TRAIN, "test": [-1, -1]},
        r"test: 2 rows \(row 1, row 2\): .* missing .*leave test",
    ),
    "a row without label": ({"train": [*TRAIN, -1]}, r"train: 1 row \(row 25\): the label is missing .* these rows\.$"),
    "a null label": ({"train": [*TRAIN, None]}, r"train: 1 row \(row 25\): the label is missing"),
    "one split by two names": ({"train": TRAIN, "validation": TRAIN, "dev": TRAIN}, r"2 times \(validation, dev\)"),
    "empty test": ({"train": TRAIN, "test": []}, "saved.test: no rows; .*leave test out"),
    "empty validation": ({"train": TRAIN, "validation": []}, "saved.validation: no rows; .*leave validation out"),
    "empty train": ({"train": [], "test": TRAIN}, "saved.train: no rows; .*Add some.$"),
    "no train": ({"test": TRAIN}, "expected a split named train, found test"),
}


@pytest.mark.parametrize("fault", SAVED)
def test_a_wrong_saved_data_set_is_named_with_its_split(tmp_path: Path, fault: str) -> None:
    splits, expected = SAVED[fault]
    with pytest.raises(DataError, match=expected):
        load_splits(config(saved(tmp_path / "saved", **splits)))


def test_an_empty_split_of_no_use_is_ignored(tmp_path: Path) -> None:
    assert load_splits(config(saved(tmp_path / "saved", train=TRAIN, unsupervised=[]))).labels == LABELS


def test_a_class_without_a_name_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "saved", train=TRAIN)
    info = path / "train" / "dataset_info.json"
    content = json.loads(info.read_text())
    content["features"]["label"]["names"].pop()
    info.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"saved.train: .*row 3, 'label': expected a class from 0 to 1, found 2"):
        load_splits(config(path))


def test_two_data_sets_saved_in_one_folder_are_refused(tmp_path: Path) -> None:
    path = tiny_data(tmp_path, "dataset")
    with pytest.raises(DataError, match="two saved data sets"):
        load_splits(config(saved(path, train=TRAIN)))


@pytest.mark.parametrize("column", ["text", "label"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, column: str) -> None:
    good = [{name: text.encode() for name, text in row.items()} for row in sentences(5)]
    path = write_rows(tmp_path / "a.parquet", [*good, {**good[0], column: b"\xff"}])
    with pytest.raises(DataError, match=rf"1 row \(row 16\): .* in '{column}', found bytes that are not UTF-8"):
        load_splits(config(path))


@pytest.mark.parametrize("value", [["a"], {"a": "b"}, None])
def test_a_label_that_is_none_is_refused(tmp_path: Path, value: object) -> None:
    expected = "the label is missing" if value is None else f"in 'label', found {type(value).__name__}"
    path = write_rows(tmp_path / "a.parquet", labelled([value] * 3))
    with pytest.raises(DataError, match=rf"15 rows \(row 1, .*\): .*{expected}"):
        load_splits(config(path))


def test_a_flipped_bit_in_parquet_is_named_with_its_column(tmp_path: Path) -> None:
    import pyarrow.parquet

    path, table = tmp_path / "a.parquet", pyarrow.Table.from_pylist(sentences(5))
    pyarrow.parquet.write_table(table, path, compression="none", write_statistics=False)
    flip(path, b"music")
    with pytest.raises(DataError, match=r"a.parquet, column 'label': damaged"):
        load_splits(config(path))


def test_a_date_no_calendar_knows_is_named_with_its_column(tmp_path: Path) -> None:
    import pyarrow.parquet

    when = pyarrow.array([1 << 60] * 15, pyarrow.timestamp("ms"))
    table = pyarrow.Table.from_pylist(sentences(5)).append_column("when", when)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, column 'when': damaged"):
        load_splits(config(tmp_path / "a.parquet"))


def test_a_parquet_column_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(sentences(5))
    pyarrow.parquet.write_table(table.append_column("label", table["text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: the schema names 'label' more than once"):
        load_splits(config(tmp_path / "a.parquet"))


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(DataError, match="no pipe"):
        load_splits(config(tmp_path / "a.csv"))
