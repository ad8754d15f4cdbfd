"""Published shapes of language models with random weights, built and measured: speed does not depend on the values.

    python -m edgepeft.bench.shapes smollm2-135m qwen2.5-0.5b llama-3.2-1b --threads 1 2

Each becomes a Hugging Face folder (float16, seeded), then by the real stages a bundle with a random adapter of rank 16
on every linear; training and verification are left out, as there is nothing to learn or to compare. Bundles stay in the
cache. A step of decoding reads every weight once, so beside the speeds stands what share of this machine's read
bandwidth they make use of: bytes of weights, adapter and cache per token, times tokens a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.artifact import Run, cache_dir, read_json, write_json
from edgepeft.backbone.families import FAMILIES
from edgepeft.bench.generation import DECODE, PROMPT
from edgepeft.config import Config
from edgepeft.console import progress, say, table
from edgepeft.errors import unknown

CONTEXT, RANK = 2048, 16
WEIGHT, ADAPTER = 0.02, 0.02  # standard deviations
FLOAT_BYTES = 4
BANDWIDTH_BYTES = 512 << 20
BANDWIDTH_RUNS = 5
COMMON: dict[str, Any] = {
    "max_position_embeddings": CONTEXT, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "torch_dtype": "float16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "rope_theta": 100000.0,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "rope_theta": 1000000.0,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "rope_theta": 500000.0,
    },
}  # fmt: skip


# --- making one ----------------------------------------------------------------------------------------------------


def bundle(shape: str, tag: str = "i4b32", activation: str = "int8") -> Path:
    """Return a shape's bundle from the cache, made at its first use."""
    from edgepeft.deploy.bundle import bundle as collect
    from edgepeft.export.stage import export
    from edgepeft.quant.stage import quantize

    place = cache_dir() / "shapes" / f"{shape}-{tag}-{activation}"
    config = Config(
        model=str(place / "model"), task="text-generation", format=tag, activation=activation, rank=RANK,
        context=CONTEXT, target="host", output=str(place),
    )  # fmt: skip
    run = Run(place)
    if run.holds("bundle", shape):
        return run.path("bundle")
    write_model(place / "model", SHAPES[shape])
    run.make("quantized", shape, lambda out: quantize(config, run, out))
    shutil.rmtree(place / "model")
    run.make("adapter", shape, lambda out: write_adapter(config, run, out))
    run.make("export", shape, lambda out: export(config, run, out))
    run.make("verify", shape, lambda out: _unverified(out))
    run.make("bundle", shape, lambda out: collect(config, run, out))
    return run.path("bundle")


def write_model(folder: Path, settings: dict[str, Any]) -> None:
    """Write a model folder of random weights, a file for each layer, and a tokenizer of bytes."""
    from safetensors.numpy import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = {**COMMON, **settings}
    family = FAMILIES[settings["model_type"]]
    write_json(folder / "config.json", settings)
    kinds, shapes, where = family.tensors(settings), family.shapes(settings), {}
    for number, names in enumerate(progress(list(_files(kinds)), "random weights", None)):
        file = f"model-{number:05d}.safetensors"
        save_file({name: _random(name, shapes[name], kinds[name]) for name in names}, folder / file)
        where.update(dict.fromkeys(names, file))
    write_json(folder / "model.safetensors.index.json", {"weight_map": where})
    _write_tokenizer(folder)


def _files(names: Iterable[str]) -> Iterator[list[str]]:
    """Yield the names of the tensors of each layer, and of the rest."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.split(".")[2] if name.startswith("model.layers.") else "", []).append(name)
    yield from layers.values()


def _random(name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    seed = np.frombuffer(name.encode(), np.uint8)
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(WEIGHT)
    return (values + np.float32(kind == "norm")).astype(np.float16)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def write_adapter(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Write a random adapter on every linear, as training leaves one."""
    from edgepeft.adapt import peft_files

    about = read_json(run.path("quantized") / "quantized.json")
    linears = {part["name"]: part["shape"] for part in about["layers"] + about["kept"] if part["kind"] == "linear"}
    tensors, rng = {}, np.random.default_rng(0)
    for module, (n, k) in linears.items():
        for side, shape in (("A", (RANK, k)), ("B", (n, RANK))):
            values = rng.standard_normal(shape, np.float32) * np.float32(ADAPTER)
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = values
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none",
        "base_model_name_or_path": "random", "target_modules": sorted(linears),
    }  # fmt: skip
    peft_files.write(out, settings, tensors, about["base_digest"], about["format"])
    write_json(out / "training.json", {"labels": [], "config": dataclasses.asdict(config)})
    return {}


def _unverified(out: Path) -> dict[str, Any]:
    write_json(out / "report.json", {"checks": {}, "note": "random weights: nothing to verify"})
    return {}


# --- the limit -----------------------------------------------------------------------------------------------------


def token_bytes(folder: Path) -> int:
    """Return the bytes that writing one token reads: weights and adapter, and the cache half way through a run."""
    manifest = read_json(folder / "manifest.json")
    about, sizes = manifest["decoder"], manifest["sizes_bytes"]
    cache = 2 * about["layers"] * about["kv_heads"] * about["head_dim"] * (PROMPT + DECODE // 2) * FLOAT_BYTES
    return sizes["weights"] + sizes["adapters"] + cache


def read_bandwidth(threads: int) -> float:
    """Return this machine's bytes a second: the best of a few sums over memory that no cache holds, a part a thread."""
    from concurrent.futures import ThreadPoolExecutor

    memory = np.ones(BANDWIDTH_BYTES // 8, np.int64)
    parts = np.array_split(memory, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(BANDWIDTH_RUNS):
            started = time.perf_counter()
            list(pool.map(lambda part: part.max(), parts))
            best = max(best, BANDWIDTH_BYTES / (time.perf_counter() - started))
    return best


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(shape: str, threads: Sequence[int], tag: str, activation: str, budget_s: float) -> dict[str, Any]:
    """Return the figures of a shape, see `edgepeft.bench.measure.bench`, with the share of the bandwidth in use."""
    from edgepeft.bench.measure import bench

    folder = bundle(shape, tag, activation)
    result = bench(folder, threads, budget_s=budget_s)
    for row in result["speed"]:
        limit = read_bandwidth(row["threads"]) / token_bytes(folder)
        row["decode_limit_tok_s"], row["decode_limit_pct"] = limit, 100 * row["decode_default_tok_s"] / limit
    return result


def limits_text(result: dict[str, Any]) -> str:
    """Return the table of what a step reads and how near to the machine's limit that is."""
    rows = [
        {
            "threads": row["threads"], "limit tok/s": round(row["decode_limit_tok_s"], 1),
            "decode default tok/s": round(row["decode_default_tok_s"], 1),
            "of the limit %": round(row["decode_limit_pct"]),
        }
        for row in result["speed"]
    ]  # fmt: skip
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Build and measure shapes; print tables, and one JSON line a shape with --json."""
    from edgepeft.bench.report import report_text

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}  [default: all]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--format", default="i4b32")
    parser.add_argument("--activation", default="int8")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each figure of a row")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(argv)
    if strange := [shape for shape in asked.shapes if shape not in SHAPES]:
        parser.error(unknown("shape", strange[0], SHAPES))
    for shape in asked.shapes or SHAPES:
        say(f"{shape} (as process {os.getpid()})")
        result = measure(shape, asked.threads, asked.format, asked.activation, asked.seconds)
        print(f"## {shape}\n\n{report_text(result)}\n\n{limits_text(result)}\n")
        if asked.json:
            print(json.dumps({"shape": shape, "speed": result["speed"], "processes": result["processes"]}))


if __name__ == "__main__":
    main()
