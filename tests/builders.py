"""Small things that tests build for themselves: a seeded random BERT folder and labelled sentences.

Nothing is downloaded and nothing depends on the machine: equal arguments give equal bytes.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

LABELS = ("light_off", "light_on", "music")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROOMS = ("kitchen", "hall", "garden", "attic", "bedroom", "office", "garage", "cellar")
THINGS = ("lamp", "light", "bulb", "lantern")
POLITE = ("please", "now", "quickly", "hey", "thanks")
VERBS = {"light_off": ("turn off", "kill", "dim"), "light_on": ("turn on", "start", "raise"), "music": ("play", "sing")}
SONGS = ("jazz", "rock", "song", "tune")


def vocabulary() -> list[str]:
    """Return the WordPiece vocabulary: special tokens, every letter alone and as a continuation, and our words."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)] + list(".,!?'-")
    verbs = [word for many in VERBS.values() for verb in many for word in verb.split()]
    words = ["the", "in", "a", "on", "off", *ROOMS, *THINGS, *POLITE, *verbs, *SONGS]
    return [*SPECIAL, *letters, *(f"##{c}" for c in letters), *dict.fromkeys(words)]


def write_tokenizer(folder: Path, max_tokens: int = 64) -> None:
    """Write a lower-casing WordPiece tokenizer as BERT has it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    names = vocabulary()
    vocab = {word: i for i, word in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{role}_token": name for role, name in zip(roles, SPECIAL, strict=True)}
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": max_tokens, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    (folder / "vocab.txt").write_text("\n".join(names) + "\n")


def tiny_bert(
    folder: Path, layers: int = 2, hidden: int = 64, heads: int = 4, seed: int = 0, max_tokens: int = 64, **changes: Any
) -> Path:
    """Write a complete Hugging Face folder of a random BERT encoder (config, safetensors, tokenizer); return it.

    The linears are [hidden, hidden], [2*hidden, hidden] and [hidden, 2*hidden]; `changes` go to BertConfig.
    """
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary()), "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": 2 * hidden, "max_position_embeddings": max_tokens,
        "initializer_range": 0.1, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(BertConfig(**{**settings, **changes}))
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(value, std=0.05)
    model.save_pretrained(folder)
    write_tokenizer(folder, max_tokens)
    return folder


def sentences(each: int = 30, seed: int = 0) -> list[dict[str, str]]:
    """Return `each` different sentences for every one of LABELS, shuffled: [{"text": ..., "label": ...}]."""
    import random

    chance = random.Random(seed)
    rows: dict[str, str] = {}
    for label in LABELS:
        made = 0
        while made < each:
            thing = f"a {chance.choice(SONGS)}" if label == "music" else f"the {chance.choice(THINGS)}"
            words = [chance.choice(VERBS[label]), thing, "in the", chance.choice(ROOMS)]
            words.insert(0 if chance.random() < 0.7 else len(words), chance.choice(POLITE))
            text = " ".join(words)
            made += text not in rows
            rows.setdefault(text, label)
    pairs = [{"text": text, "label": label} for text, label in rows.items()]
    chance.shuffle(pairs)
    return pairs


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the kind the name ends in: .csv, .jsonl or .parquet."""
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def tiny_data(path: Path, kind: str = "csv", each: int = 30, seed: int = 0) -> Path:
    """Write labelled sentences of one kind and return what `Config.data` should name.

    `path` is a folder to write in; kinds: csv, jsonl, parquet (one file without splits), folder (train, validation and
    test CSV files), dataset (a saved `datasets.Dataset`), dataset-dict (a saved `datasets.DatasetDict` of splits).
    """
    path.mkdir(parents=True, exist_ok=True)
    rows = sentences(each, seed)
    cut = len(rows) // 10
    parts = {"train": rows[2 * cut :], "validation": rows[:cut], "test": rows[cut : 2 * cut]}
    if kind in ("csv", "jsonl", "parquet"):
        return write_rows(path / f"data.{kind}", rows)
    if kind == "folder":
        for name, part in parts.items():
            write_rows(path / f"{name}.csv", part)
        return path
    from datasets import Dataset, DatasetDict

    splits = DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()})
    (Dataset.from_list(rows) if kind == "dataset" else splits).save_to_disk(str(path / "saved"))
    return path / "saved"
