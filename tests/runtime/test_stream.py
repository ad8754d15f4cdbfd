from __future__ import annotations

from pathlib import Path

import pytest
from builders import write_chat_tokenizer

from edgepeft.runtime.stream import REPLACEMENT, Decoding, Stops
from edgepeft.runtime.tokens import Tokens

TEXTS = [
    "plain words, and  two  spaces ",
    "naïve café €uro",
    "日本語 and русский",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    " leading",
    "line\n\n\tbreak",
    "ẹ̀ṣẹ̀",
    "a",
]


def byte_level(folder: Path) -> Tokens:
    write_chat_tokenizer(folder)
    return Tokens(folder / "tokenizer.json", None)


def sentencepiece(folder: Path, decoder: str) -> Tokens:
    """Return a tokenizer as Llama 2 has it: "▁" for spaces, bytes for what has no piece, a first space dropped."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz,", "▁a", "▁an"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("▁", "a"), ("▁a", "n")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if decoder == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokens(folder / "tokenizer.json", None)


@pytest.fixture(params=["bytes", "strip", "metaspace"])
def tokens(request: pytest.FixtureRequest, tmp_path: Path) -> Tokens:
    return byte_level(tmp_path) if request.param == "bytes" else sentencepiece(tmp_path, request.param)


def pieces(tokens: Tokens, ids: list[int], before: list[int] = []) -> list[str]:  # noqa: B006 - never written to
    decoding = Decoding(tokens.text, before)
    return [*(decoding.push(token) for token in ids), decoding.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_never_half_a_character(tokens: Tokens, text: str) -> None:
    ids = tokens.ids(text)
    found = pieces(tokens, ids)
    assert "".join(found) == tokens.text(ids)
    assert tokens.text(ids).lstrip() == text.lstrip()
    assert not any(REPLACEMENT in piece for piece in found)
    assert sum(map(bool, found)) > len(text) // 4  # it does stream


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", [1, 5])
def test_a_continuation_has_the_spaces_it_has_behind_its_prompt(tokens: Tokens, text: str, cut: int) -> None:
    ids = tokens.ids("a prompt of words, an " + text)
    before, after = ids[:-cut], ids[-cut:]
    if REPLACEMENT in (shown := tokens.text(before)):
        return  # no prompt ends within a character
    assert "".join(pieces(tokens, after, before)) == tokens.text(ids)[len(shown) :]


def test_bytes_that_are_never_completed_come_out_at_the_end(tokens: Tokens) -> None:
    ids = tokens.ids("an é€")
    found = pieces(tokens, ids[:-1])
    assert "".join(found).startswith("an é")
    assert set("".join(found)[4:]) == {REPLACEMENT}
    assert all(REPLACEMENT not in piece for piece in found[:-1])


def test_special_tokens_leave_no_text(tmp_path: Path) -> None:
    tokens = byte_level(tmp_path)
    ids = tokens.ids("<|im_start|>one<|im_end|>two")
    assert ids[0] == 1
    assert "".join(pieces(tokens, ids)) == "onetwo"


@pytest.mark.parametrize(
    ("strings", "text", "expected", "hit"),
    [
        ([], "all of it", "all of it", False),
        (["\n"], "one\ntwo", "one", True),
        (["</s>"], "a<</s>b", "a<", True),
        (["</s>"], "a</", "a</", False),
        (["aab"], "aaab", "a", True),
        (["abab", "ba"], "xabab", "xa", True),
        (["abc", "b"], "abc", "a", True),
        (["stop"], "stop", "", True),
        (["stop"], "sto", "sto", False),
        (["日本"], "今日日本", "今日", True),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings(strings: list[str], text: str, expected: str, hit: bool, size: int) -> None:
    stops = Stops(strings)
    shown = ""
    for start in range(0, len(text), size):
        shown += stops.push(text[start : start + size])
        assert expected.startswith(shown)
        if stops.hit:
            break
    assert stops.hit is hit
    assert shown + stops.flush() == expected


def test_no_more_is_held_back_than_may_be_a_stop_string() -> None:
    stops = Stops(["User:", "\n\n"])
    assert [stops.push(piece) for piece in ("Hi", " U", "se", "d\n", "x")] == ["Hi", " ", "", "Used", "\nx"]
