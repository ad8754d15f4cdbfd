"""A QLoRA training step of a language model on the CPU, beside bitsandbytes, in one run.

    python -m edgepeft.bench.step --shape qwen2.5-0.5b --tokens 512

Published shapes with random weights, since speed does not depend on the values: the same NF4 bits, LoRA of rank 16 on
every linear of the backbone by Hugging Face PEFT, one row of tokens, AdamW in float32.

| candidate | backbone | loss |
|---|---|---|
| edgepeft | packed linears and embeddings | without logits (`edgepeft.train.losses`) |
| edgepeft-int8 | the same, forward on int8 activations as the shipped op multiplies | the same |
| bitsandbytes | transformers with Linear4bit, float32 compute; embeddings and head stay float32 | transformers' own |

Each candidate is a process of its own, which does one step to warm up and then `--steps`; the least processor and wall
time of a step count. Memory is the peak of the steps, the model in it, above what the imported libraries take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgepeft.artifact import Run, cache_dir
from edgepeft.bench.shapes import RANK, SHAPES, write_model
from edgepeft.config import Config
from edgepeft.console import progress, table
from edgepeft.errors import EdgePeftError
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS

LEARNING_RATE = 2e-4
BITSANDBYTES = "bitsandbytes"


def prepared(shape: str, tag: str, embedding_format: str) -> Config:
    """Return the configuration of a shape, its model and quantized folder made in the cache at the first use."""
    place = cache_dir() / "steps" / f"{shape}-{tag}-{embedding_format}"
    model = cache_dir() / "steps" / shape
    if not (model / "tokenizer_config.json").is_file():
        write_model(model, SHAPES[shape])
    config = Config(
        model=str(model), task="text-generation", format=tag, embedding_format=embedding_format, rank=RANK,
        dropout=0.0, output=str(place),
    )  # fmt: skip
    return quantized(config, shape)


def quantized(config: Config, key: str) -> Config:
    """Return a configuration with its quantized folder made where it is not."""
    from edgepeft.quant.stage import quantize

    run = Run(Path(config.output))
    if not run.holds("quantized", key):
        run.make("quantized", key, lambda out: quantize(config, run, out))
    return config


def _packed(config: Config) -> Any:
    from edgepeft.backbone.load import quantized_model

    return quantized_model(Run(Path(config.output)).path("quantized"), (), config)


def _packed_int8(config: Config) -> Any:
    from edgepeft.quant.linear import multiply_int8

    model = _packed(config)
    multiply_int8(model)
    return model


def _bitsandbytes(config: Config) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        config.model, dtype=torch.float32, quantization_config=how, device_map="cpu"
    )


CANDIDATES: dict[str, Callable[[Config], Any]] = {
    "edgepeft": _packed, "edgepeft-int8": _packed_int8, BITSANDBYTES: _bitsandbytes,
}  # fmt: skip


def steps(config: Config, candidate: str, tokens: int, share: float, count: int) -> dict[str, Any]:
    """Train `count` steps of one candidate in this process; return seconds a step, bytes and the first loss."""
    import peft  # noqa: F401 - its memory belongs to the libraries
    import torch
    from transformers import Trainer, set_seed  # noqa: F401 - and Trainer's

    from edgepeft.train import loop, watch
    from edgepeft.train.chats import IGNORED
    from edgepeft.train.losses import without_logits
    from edgepeft.train.tasks import token_loss

    torch.set_num_threads(config.threads)
    libraries_bytes = _resident_bytes()
    with watch.quiet():
        set_seed(0)
        model = loop.adapted(CANDIDATES[candidate](config), config).train()
    if config.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, model.config.vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[:, : round(tokens * (1 - share))] = IGNORED
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)

    def loss() -> Any:
        if candidate == BITSANDBYTES:
            return model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        return token_loss(model(input_ids=inputs, shift_labels=targets).figures, targets)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    timed = []
    with contextlib.ExitStack() as stack:
        if candidate != BITSANDBYTES:
            stack.enter_context(without_logits(model))
            if config.checkpointing:
                stack.enter_context(watch.frugal())
        first = step()
        watch.reset_peak_resident()
        for _ in range(count):
            began = time.perf_counter(), time.process_time()
            step()
            timed.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return {
        "candidate": candidate, "loss": first, "step_s": min(wall for wall, _ in timed),
        "step_cpu_s": min(cpu for _, cpu in timed), "memory_bytes": watch.peak_resident_bytes() - libraries_bytes,
    }  # fmt: skip


def _resident_bytes() -> int:
    """Return what this process holds now, once garbage is gone."""
    import gc

    from edgepeft.train import watch

    gc.collect()
    watch.reset_peak_resident()
    return watch.peak_resident_bytes()


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per candidate, its speed and memory beside those of bitsandbytes where that took part."""
    peer = next((r for r in results if r["candidate"] == BITSANDBYTES), None)
    rows = []
    for r in results:
        row = {
            "candidate": r["candidate"], "loss": round(r["loss"], 4), "CPU s/step": round(r["step_cpu_s"], 2),
            "s/step": round(r["step_s"], 2), "MiB": round(r["memory_bytes"] / 2**20),
        }  # fmt: skip
        if peer:
            row["times as fast"] = round(peer["step_cpu_s"] / r["step_cpu_s"], 2)
            row["of its memory"] = round(r["memory_bytes"] / peer["memory_bytes"], 2)
        rows.append(row)
    return rows


def _child(arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "edgepeft.bench.step", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EdgePeftError(f"{' '.join(arguments)}: ended with {done.returncode}; its message stands above.")
    return json.loads(done.stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the candidates in turn and print the table, and JSON with --json."""
    parser = argparse.ArgumentParser(prog="edgepeft.bench.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--targets", type=float, default=1.0, help="share of the tokens to learn, the last ones")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--format", default="nf4b64", choices=FORMATS, help="of edgepeft's candidates")
    parser.add_argument("--embedding-format", default="i4b32", choices=[*EMBEDDING_FORMATS, "float"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    config = prepared(options.shape, options.format, options.embedding_format)
    config = config.replace(threads=options.threads, checkpointing=options.checkpointing)
    if options.one:
        print(json.dumps(steps(config, options.candidates[0], options.tokens, options.targets, options.steps)))
        return
    given = list(sys.argv[1:] if arguments is None else arguments)
    results = [_child([*given, "--one", "--candidates", name]) for name in progress(options.candidates, "steps")]
    print(table(summary(results)))
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
