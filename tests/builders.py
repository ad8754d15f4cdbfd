"""Small things that tests build for themselves: seeded random model folders, labelled sentences, conversations.

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


CHAT_SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DECODER_SIZES: dict[str, Any] = {
    "vocab_size": 262, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LONG_ROPE = {
    "rope_type": "longrope", "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "short_factor": [1.0] * 8,
    "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0], "original_max_position_embeddings": 64,
}  # fmt: skip
TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}  # of 32 numbers, half of them rotated
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# Every family, and every flag of the one decoder description, in a model of two layers.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": YARN_ROPE}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 24, "tie_word_embeddings": True, **ALTERNATING},
    ),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 24, **ALTERNATING}),
    "phi3": ("Phi3Config", {}),
    "phi4": ("Phi3Config", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64, **TWO_HEADS}),
}


def write_chat_tokenizer(folder: Path, template: str | None = CHAT_TEMPLATE) -> None:
    """Write a byte-level tokenizer: three special tokens, the 256 bytes, and a merge or two of common pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*CHAT_SPECIAL, *letters, "th", "the", "in"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e"), ("i", "n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CHAT_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False, "model_max_length": 256,
    }  # fmt: skip
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def tiny_decoder(folder: Path, kind: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a complete Hugging Face folder of a random causal language model, one of DECODERS; return it.

    `changes` go to its configuration. Norms and biases are random too, so that none of them can be forgotten unseen.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    name, flags = DECODERS[kind]
    config = getattr(transformers, name)(**{**DECODER_SIZES, **flags, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter_name, value in model.named_parameters():
            if value.ndim == 1:
                centre = 0.0 if parameter_name.endswith("bias") or name.startswith("Gemma") else 1.0
                torch.nn.init.normal_(value, mean=centre, std=0.1)
    model.save_pretrained(folder)
    write_chat_tokenizer(folder)
    return folder


def conversations(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` short conversations a small model can learn: [{"messages": [{"role", "content"}, ...]}]."""
    import random

    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        thing, room, verb = chance.choice(THINGS), chance.choice(ROOMS), chance.choice(("on", "off"))
        asked, answer = f"turn {verb} the {thing} in the {room}", f"{thing}.{room} = {verb}"
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
    return rows


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
