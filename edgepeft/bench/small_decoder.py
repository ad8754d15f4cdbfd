"""A small language model of real English, trained here, to measure quantization on where no checkpoint is at hand.

    folders of text ─► paragraphs of prose, each once ─► byte-level BPE ─► Llama of 3 million weights ─► model folder
                                                                          train / validation / test .jsonl

    python -m edgepeft.bench.small_decoder --text /usr/share/man/man1 /usr/share/perl --output small

Read are text, Markdown, reStructuredText, Pod and manual pages (packed or not) and the docstrings of Python files;
taken are paragraphs of at least 160 ASCII characters of which nine in ten are letters or blanks. A file is one document
and lies in one split, by the hash of its name and the seed. Training is AdamW with a warm-up and a cosine down to a
tenth; it goes on from its last checkpoint when it was interrupted, and equal arguments give equal batches.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgepeft.artifact import staging, write_bytes, write_json
from edgepeft.console import say
from edgepeft.errors import DataError

PLAIN = re.compile(r"\.(txt|md|rst|pod|pm)(\.gz)?$|\.[1-9](\.gz)?$|\.info(-\d+)?(\.gz)?$")
ROFF = re.compile(r"^[.'].*$|\\f.|\\[&|^]", re.MULTILINE)
SHORTEST, LETTERS, LOWER = 160, 0.9, 0.7
VOCABULARY, ROW_TOKENS, ROWS = 2048, 128, 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
PEAK_RATE, WARM_UP, KEEP_EVERY, TOLD_EVERY = 3e-3, 50, 20, 20
END = "<|end|>"


# --- texts ---------------------------------------------------------------------------------------------------------


def read_texts(folders: Iterable[Path]) -> dict[str, str]:
    """Return {file: its prose} of all files below the folders; a paragraph met before is left out."""
    seen: set[bytes] = set()
    found = {}
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
            fresh = [paragraph for paragraph in _paragraphs(_raw(file)) if _first_time(paragraph, seen)]
            if fresh:
                found[str(file)] = "\n\n".join(fresh)
    return found


def _raw(file: Path) -> str:
    """Return a file as text: manual pages without their markup, Python as its docstrings, other kinds as nothing."""
    try:
        if file.suffix == ".py":
            return _docstrings(file.read_text(encoding="utf-8"))
        if not PLAIN.search(file.name):
            return ""
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return ROFF.sub("", data.decode("utf-8")).replace("\\-", "-").replace("\\", "")
    except (OSError, EOFError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return ""


def _docstrings(source: str) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n\n".join(ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs that are prose, each on one line."""
    for part in re.split(r"\n\s*\n", text):
        line = " ".join(part.split())
        if len(line) < SHORTEST or not line.isascii():
            continue
        letters = sum(c.isalpha() or c == " " for c in line)
        if letters >= LETTERS * len(line) and sum(map(str.islower, line)) >= LOWER * len(line):
            yield line


def _first_time(paragraph: str, seen: set[bytes]) -> bool:
    digest = hashlib.sha256(re.sub(r"\W+", " ", paragraph.lower()).encode()).digest()
    if digest in seen:
        return False
    seen.add(digest)
    return True


def write_splits(texts: dict[str, str], folder: Path, seed: int) -> None:
    """Write train, validation and test .jsonl: a twentieth of the files each, by a hash of name and seed."""
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name, text in texts.items():
        place = hashlib.sha256(f"{seed}\n{name}".encode()).digest()[0]
        parts["validation" if place < 13 else "test" if place < 26 else "train"].append(text)
    for name, rows in parts.items():
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        write_bytes(folder / f"{name}.jsonl", lines.encode())


# --- the model -----------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, texts: Sequence[str]) -> Any:
    """Train a byte-level BPE on the texts and write it as transformers reads it; return the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    write_json(folder / "tokenizer_config.json", {**about, "clean_up_tokenization_spaces": False})
    return tokenizer


def train(model: Any, ids: Any, steps: int, seed: int, kept: Path) -> None:
    """Train on rows drawn from one long row of ids; `kept` holds what an interrupted training goes on from."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    begin, started = _resume(model, optimizer, kept), time.monotonic()
    for step in range(begin, steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        draw = torch.Generator().manual_seed(seed * steps + step)
        starts = torch.randint(len(ids) - ROW_TOKENS, (ROWS,), generator=draw)
        batch = torch.stack([ids[start : start + ROW_TOKENS] for start in starts.tolist()]).long()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % TOLD_EVERY == 0:
            each = (time.monotonic() - started) / (step + 1 - begin)
            say(f"step {step + 1} of {steps}: loss {loss.item():.3f}, {each:.2f} s a step")
        if (step + 1) % KEEP_EVERY == 0:
            state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, kept.with_suffix(".tmp"))
            kept.with_suffix(".tmp").replace(kept)


def _rate(step: int, steps: int) -> float:
    import math

    down = 0.55 + 0.45 * math.cos(math.pi * min(step / steps, 1))
    return PEAK_RATE * min((step + 1) / WARM_UP, down)


def _resume(model: Any, optimizer: Any, kept: Path) -> int:
    import torch

    if not kept.is_file():
        return 0
    state = torch.load(kept, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def make(texts: Sequence[Path], output: Path, steps: int = 2400, seed: int = 0) -> Path:
    """Write output/data and output/model, each unless it is there, and return the model's folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    data, folder = output / "data", output / "model"
    if not data.is_dir():
        with staging(data) as place:
            found = read_texts(texts)
            if sum(map(len, found.values())) < 1000 * ROW_TOKENS:
                raise DataError(f"{', '.join(map(str, texts))}: too little English prose to train on. Give more.")
            write_splits(found, place, seed)
    rows = [json.loads(line)["text"] for line in (data / "train.jsonl").read_text().splitlines()]
    say(f"{len(rows)} documents to train on, {sum(map(len, rows)) / 1e6:.1f} MB")
    if folder.is_dir():
        return folder
    with staging(folder) as place:
        tokenizer = write_tokenizer(place, rows)
        ids = torch.tensor([i for row in tokenizer.encode_batch(rows) for i in (*row.ids, 0)], dtype=torch.int32)
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
        weights = sum(parameter.numel() for parameter in model.parameters())
        say(f"{len(ids) / 1e6:.2f} million tokens, {weights / 1e6:.1f} million weights")
        train(model, ids, steps, seed, output / "training.pt")
        model.save_pretrained(place)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model."""
    parser = argparse.ArgumentParser(prog="edgepeft.bench.small_decoder", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="folders of English text")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    print(make(options.text, options.output, options.steps, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
