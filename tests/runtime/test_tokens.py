from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepeft.errors import ArtifactError
from edgepeft.runtime.tokens import NAMES, Tokens
from tests.runtime.standin import write_tokenizer

TEXTS = ["play", "turn the kitchen lights off now now", "a b c", "play", "turn on"]


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    write_tokenizer(tmp_path)
    return Tokens(tmp_path / "tokenizer.json", 8)


def test_batches_cover_every_text_once_and_pad_little(tokens: Tokens) -> None:
    seen, padded = [], 0
    for places, arrays in tokens.batches(TEXTS, 2):
        seen += places
        for row, place in enumerate(places):
            ids = tokens.encode([TEXTS[place]])[0].ids
            assert arrays["input_ids"][row, : len(ids)].tolist() == ids
            assert arrays["attention_mask"][row].sum() == len(ids) <= 8
            assert (arrays["input_ids"][row, len(ids) :] == tokens.pad_id).all()
        padded += int((1 - arrays["attention_mask"]).sum())
        assert {name: a.dtype for name, a in arrays.items()} == dict.fromkeys(NAMES, np.dtype(np.int64))
    assert sorted(seen) == list(range(len(TEXTS)))
    assert padded <= 1


def test_padding_and_truncation_of_the_file_are_replaced(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_padding(length=64, pad_id=5)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = Tokens(tmp_path / "tokenizer.json", 8)
    assert tokens.pad_id == 5
    assert [len(e.ids) for e in tokens.encode(["play", "a " * 20])] == [3, 8]


def test_a_damaged_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer.json: not a tokenizer"):
        Tokens(tmp_path / "tokenizer.json", 8)
