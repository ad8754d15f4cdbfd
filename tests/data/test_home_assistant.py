"""Checks on the shipped home-assistant data: counts, labels, duplicates, encoding."""

import collections
import csv
import functools
import io
import re
import unicodedata

import numpy as np
import pytest

from edgepeft.data import home_assistant

SPLITS = ("train", "validation", "test")
LABELS = {
    "alarm_cancel",
    "alarm_set",
    "cover_close",
    "cover_open",
    "door_lock",
    "door_unlock",
    "light_adjust",
    "light_off",
    "light_on",
    "music_play",
    "music_stop",
    "out_of_scope",
    "reminder_set",
    "shopping_list_add",
    "temperature_query",
    "thermostat_set",
    "timer_set",
    "volume_change",
    "weather_query",
}
TRIGRAM_LIMIT = 0.6
TOKEN_LIMIT = 0.75


@functools.cache
def rows(split):
    text = (home_assistant() / f"{split}.csv").read_bytes().decode("utf-8")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    assert next(reader) == ["text", "label"]
    return [tuple(row) for row in reader]


def normalise(text):
    """Lower case; apostrophes removed; other punctuation and white space -> one space."""
    text = re.sub("['\u2019]", "", text.casefold())
    return " ".join(re.sub(r"[\W_]+", " ", text).split())


def trigrams(text):
    padded = f" {text} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


def tokens(text):
    return set(text.split())


def jaccard_matrix(left, right):
    """All-pairs Jaccard similarity of two lists of sets (float32 matrix)."""
    vocab = {}
    for s in (*left, *right):
        for item in s:
            vocab.setdefault(item, len(vocab))

    def multi_hot(sets):
        out = np.zeros((len(sets), len(vocab)), dtype=np.float32)
        for i, s in enumerate(sets):
            out[i, [vocab[item] for item in s]] = 1.0
        return out

    a, b = multi_hot(left), multi_hot(right)
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1)[None, :] - both)


def test_jaccard_matrix_on_known_sets():
    got = jaccard_matrix([{"a", "b"}, {"c"}], [{"a", "b"}, {"b", "c"}])
    np.testing.assert_allclose(got, [[1.0, 1 / 3], [0.0, 0.5]], rtol=1e-6)
    assert normalise("  Don't -- STOP,\tnow! ") == "dont stop now"


@pytest.mark.parametrize("split", SPLITS)
def test_file_format(split):
    raw = (home_assistant() / f"{split}.csv").read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in raw
    assert raw.endswith(b"\n")
    raw.decode("utf-8", errors="strict")
    for row in rows(split):
        assert len(row) == 2, row
        text, label = row
        assert normalise(text), row
        assert text == text.strip(), row
        assert label == label.strip(), row
        assert all(unicodedata.category(c)[0] != "C" for c in text), row
        assert "  " not in text, row
        assert "\ufffd" not in text, row


def test_labels_equal_in_every_split():
    for split in SPLITS:
        assert {label for _, label in rows(split)} == LABELS, split


def test_counts_and_stratification():
    counts = {s: collections.Counter(label for _, label in rows(s)) for s in SPLITS}
    total = sum(counts.values(), collections.Counter())
    assert sum(total.values()) >= 1800
    assert total["out_of_scope"] >= 250
    for label in LABELS:
        assert total[label] >= 90, label
        assert abs(counts["train"][label] / total[label] - 0.70) < 0.03, label
        for split in ("validation", "test"):
            assert abs(counts[split][label] / total[label] - 0.15) < 0.03, (split, label)


def test_counts_match_the_data_card():
    card = (home_assistant() / "README.md").read_text(encoding="utf-8")
    counts = {s: collections.Counter(label for _, label in rows(s)) for s in SPLITS}
    for label in LABELS:
        n = [counts[s][label] for s in SPLITS]
        assert f"| `{label}` | {n[0]} | {n[1]} | {n[2]} | {sum(n)} |" in card, label


def test_no_duplicates():
    seen = {}
    for split in SPLITS:
        for text, label in rows(split):
            key = normalise(text)
            assert key not in seen, (text, label, seen[key])
            seen[key] = (split, text, label)


@pytest.mark.parametrize(("first", "second"), [("train", "validation"), ("train", "test"), ("validation", "test")])
@pytest.mark.parametrize(("features", "limit"), [(trigrams, TRIGRAM_LIMIT), (tokens, TOKEN_LIMIT)])
def test_no_near_duplicates_across_splits(first, second, features, limit):
    a, b = ([normalise(text) for text, _ in rows(s)] for s in (first, second))
    sim = jaccard_matrix([features(t) for t in a], [features(t) for t in b])
    hits = np.argwhere(sim >= limit - 1e-6)
    assert not len(hits), [(a[i], b[j], float(sim[i, j])) for i, j in hits[:10]]
