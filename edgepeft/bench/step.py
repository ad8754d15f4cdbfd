"""A QLoRA training step of a language model on the CPU, beside bitsandbytes and float, in one run.

    python -m edgepeft.bench.step --shape qwen2.5-0.5b --tokens 512 --threads 1 2

Published shapes with random weights, since speed does not depend on the values: the same NF4 bits, LoRA of rank 16 on
every linear of the backbone by Hugging Face PEFT, one row of tokens, AdamW in float32.

| candidate | backbone | loss |
|---|---|---|
| edgepeft | packed linears and embeddings | without logits (`edgepeft.train.losses`) |
| edgepeft-int8 | the same, forward on int8 activations as the shipped op multiplies | the same |
| bitsandbytes | transformers with Linear4bit; embeddings and head are not quantized | transformers' own |
| float | transformers' | transformers' own |

With `--precision bfloat16` all train under autocast, as the Trainer does, and what bitsandbytes and float do not
quantize is loaded in bfloat16, as QLoRA has it; adapters stay in float32.

Each candidate is a process of its own; after a step to warm up they take `--steps` each by turns, beginning with
another one each time. A time is the median, and how many times as fast the median over the turns. Memory is the peak
of the steps, the model in it, above what the imported libraries take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepeft.artifact import Run, cache_dir
from edgepeft.bench.shapes import RANK, SHAPES, write_model
from edgepeft.bench.turns import Process, Program
from edgepeft.config import Config
from edgepeft.console import progress, table
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS

LEARNING_RATE = 2e-4
BITSANDBYTES, FLOAT = "bitsandbytes", "float"


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


def _float(config: Config, **more: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, config.precision), **more)


def _bitsandbytes(config: Config) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, config.precision)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return _float(config, quantization_config=how, device_map="cpu")


CANDIDATES: dict[str, Callable[[Config], Any]] = {
    "edgepeft": _packed, "edgepeft-int8": _packed_int8, BITSANDBYTES: _bitsandbytes, FLOAT: _float,
}  # fmt: skip


@contextlib.contextmanager
def training(config: Config, candidate: str, tokens: int, share: float) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield what does one training step of a candidate: {"loss", "seconds", "cpu_s", "memory_bytes"}."""
    import peft  # noqa: F401 - its memory belongs to the libraries
    import torch
    from transformers import Trainer, set_seed  # noqa: F401 - and Trainer's

    from edgepeft.train import loop, watch
    from edgepeft.train.chats import IGNORED
    from edgepeft.train.losses import without_logits
    from edgepeft.train.tasks import token_loss

    libraries_bytes, ours = _resident_bytes(), candidate not in (BITSANDBYTES, FLOAT)
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
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            if not ours:
                return model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
            return token_loss(model(input_ids=inputs, shift_labels=targets).figures, targets)

    def step() -> dict[str, Any]:
        watch.reset_peak_resident()
        began = time.perf_counter(), time.process_time()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds, cpu_s = time.perf_counter() - began[0], time.process_time() - began[1]
        memory = watch.peak_resident_bytes() - libraries_bytes
        return {"loss": value.item(), "seconds": seconds, "cpu_s": cpu_s, "memory_bytes": memory}

    with contextlib.ExitStack() as stack:
        if ours:
            stack.enter_context(without_logits(model))
            if config.checkpointing:
                stack.enter_context(watch.frugal())
        yield step


def _resident_bytes() -> int:
    """Return what this process holds now, once garbage is gone."""
    import gc

    from edgepeft.train import watch

    gc.collect()
    watch.reset_peak_resident()
    return watch.peak_resident_bytes()


def _serve(config: Config, options: argparse.Namespace) -> None:
    """Answer each question, {"threads"}, with one step of the candidate, as `turns.Process` asks."""
    import torch

    with training(config, options.candidates[0], options.tokens, options.targets) as step:
        torch.set_num_threads(options.threads[0])
        print(json.dumps(step()), flush=True)
        for line in sys.stdin:
            torch.set_num_threads(json.loads(line)["threads"])
            print(json.dumps(step()), flush=True)


def by_turns(processes: Sequence[Process], threads: int, count: int) -> dict[str, list[dict[str, Any]]]:
    """Return {candidate: its answers}, of `count` steps each."""
    found: dict[str, list[dict[str, Any]]] = {process.name: [] for process in processes}
    for turn in range(count):
        at = turn % len(processes)
        for process in [*processes[at:], *processes[:at]]:
            found[process.name].append(process.ask(threads=threads))
    return found


def summary(
    found: Mapping[str, Sequence[Mapping[str, Any]]], first: Mapping[str, float], threads: int
) -> list[dict[str, Any]]:
    """Return a row per candidate, its speed and memory beside those of bitsandbytes where that took part.

    first: the loss of each one's first step.
    """
    memory = {name: max(answer["memory_bytes"] for answer in answers) for name, answers in found.items()}
    rows = []
    for name, answers in found.items():
        row = {
            "threads": threads, "candidate": name, "loss": round(first[name], 4),
            "s/step": round(statistics.median(answer["seconds"] for answer in answers), 2),
            "CPU s/step": round(statistics.median(answer["cpu_s"] for answer in answers), 2),
            "MiB": round(memory[name] / 2**20),
        }  # fmt: skip
        if BITSANDBYTES in found:
            pairs = zip(found[BITSANDBYTES], answers, strict=True)
            row["times as fast"] = round(statistics.median(peer["seconds"] / own["seconds"] for peer, own in pairs), 2)
            row["of its memory"] = round(memory[name] / memory[BITSANDBYTES], 2)
        rows.append(row)
    return rows


def compare(options: argparse.Namespace, given: Sequence[str], model: Path) -> list[dict[str, Any]]:
    """Return the rows of all candidates for each number of threads. Raises EdgePeftError when a process fails."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    processes: list[Process] = []
    try:
        for name in progress(options.candidates, "load"):
            command = (sys.executable, "-m", "edgepeft.bench.step", *given, "--one", "--candidates", name)
            processes.append(Process(Program(name, command, model, {"PYTHONPATH": path})))
        first = {process.name: process.ready["loss"] for process in processes}
        rows = [summary(by_turns(processes, count, options.steps), first, count) for count in options.threads]
        return [row for part in rows for row in part]
    finally:
        for process in processes:
            process.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the candidates by turns and print the table, and JSON with --json."""
    parser = argparse.ArgumentParser(prog="edgepeft.bench.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--targets", type=float, default=1.0, help="share of the tokens to learn, the last ones")
    parser.add_argument("--steps", type=int, default=3, help="of each candidate and number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--format", default="nf4b64", choices=FORMATS, help="of edgepeft's candidates")
    parser.add_argument("--embedding-format", default="i4b32", choices=[*EMBEDDING_FORMATS, "float"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    config = prepared(options.shape, options.format, options.embedding_format)
    config = config.replace(checkpointing=options.checkpointing, precision=options.precision)
    if options.one:
        _serve(config, options)
        return
    given = list(sys.argv[1:] if arguments is None else arguments)
    rows = compare(options, given, Path(config.model))
    print(table(rows))
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
