"""Tokenizers of the kinds that models have, trained here on a few sentences, and texts to try them on.

Random letters are of Unicode 3.2: browsers know marks and punctuation that the tokenizers library does not know yet.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from typing import Any

from builders import sentences
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZE = 700
SPECIAL = ["<|begin|>", "<|end|>"]
SPLIT = (  # of Llama 3 and, with one digit a piece, Qwen 2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRICKY = (
    "", " ", "  two  spaces ", "\n\n\tlines\r\n end", "It's we'll I'D they'RE", "1234567 3.14 1,000",
    "naïve café Ångström", "ﬁﬃ ½ ² ①", "İstanbul ß ẞ ς Σ",
    "日本語のテキスト 한국어 中文", "مرحبا שלום नमस्ते ไทย", "👩‍👩‍👧 🇩🇪 👍🏽 ❤️",
    "e\u0301 a\u0308\u0323", "zero\u200bwidth\u00a0space\u2003em\u3000wide", "\x00\x01\x7f\u0085\ufffd",
    "a<|end|>b <|begin|> c",
    "[CLS] [SEP][MASK] [PAD]x", "snake_case camelCase HTML5 C++ x=y/z;#%&*", "…—–“quotes” ‘x’", "\ufeffbom \u2028 line",
    "a" * 120,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈", "▁under ##hash", "ǅ ǆ Ǆ", "º ª µ",
)  # fmt: skip


def texts(count: int = 400) -> list[str]:
    """Return TRICKY, sentences, and random strings of all kinds of letters, with a seed."""
    rng = random.Random(0)
    planes = [(32, 127), (32, 127), (0xA0, 0x250), (0x370, 0x530), (0x5D0, 0x700), (0x900, 0xE80), (0x1E00, 0x2070)]
    planes += [(0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFB00, 0xFB07)]

    def one() -> str:
        letters = [chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(1, 24))]
        return "".join(letter for letter in letters if unicodedata.ucd_3_2_0.category(letter) != "Cn")

    known = [row["text"] for row in sentences(each=10)]
    mixed = [f"{rng.choice(known)}{rng.choice(['', ' ', chr(10), '  '])}{one()}" for _ in range(count // 2)]
    return [*TRICKY, *known, *mixed, *(one() for _ in range(count // 2))]


def _trained(tokenizer: Any, trainer: Any) -> Any:
    tokenizer.train_from_iterator([*(row["text"] for row in sentences()), *TRICKY[:9]], trainer)
    return tokenizer


def wordpiece(lowercase: bool = True) -> Any:
    """As BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def byte_level(split: bool) -> Any:
    """As GPT-2's, or with `split` as Llama 3's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    whole = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte])
    tokenizer.pre_tokenizer = whole if split else byte
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if split:
        tokenizer.normalizer = normalizers.NFC()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet))


def byte_fallback() -> Any:
    """As Llama 2's and Mistral's: pieces of SentencePiece, and bytes for what has none."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special))


KINDS: dict[str, Callable[[], Any]] = {
    "wordpiece": wordpiece,
    "wordpiece-cased": lambda: wordpiece(lowercase=False),
    "byte-level": lambda: byte_level(split=False),
    "byte-level-split": lambda: byte_level(split=True),
    "byte-fallback": byte_fallback,
}
