"""What training on packed bits costs and keeps: test accuracy, speed and memory beside float32 and bitsandbytes.

    python -m edgepeft.bench.training --seeds 0 1 2

Every variant trains the same LoRA with the same Trainer settings on the same data; only the frozen backbone differs:

| variant | backbone |
|---|---|
| float32 | transformers' model as it is, LoRA by Hugging Face PEFT: the reference |
| i4b32, nf4b64, ... | edgepeft's packed linears and embeddings |
| bnb-nf4 | bitsandbytes Linear4bit, NF4, blocks of 64, float32 compute; embeddings stay float32 |

Each training is a process of its own, so that peak memory is its own; `model MiB` is the peak above what the imported
libraries take; `CPU ms/step` is the processor time of a training step, which other processes stretch little. The figure
to hold: mean test accuracy of a packed variant at most one point below float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgepeft.artifact import Run
from edgepeft.config import Config
from edgepeft.console import progress, say, table
from edgepeft.errors import EdgePeftError
from edgepeft.quant.formats import FORMATS

REFERENCE = "float32"
VARIANTS = (REFERENCE, "i4b32", "nf4b64", "bnb-nf4")
ALLOWED_DROP = 0.01


def _float_model(config: Config, labels: int, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    from edgepeft.backbone.load import resolve_model

    path = resolve_model(config).path
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels, dtype=torch.float32, **options)


def _bitsandbytes_model(config: Config, labels: int) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],
    )  # fmt: skip
    return _float_model(config, labels, quantization_config=how, device_map="cpu")


def _packed_model(config: Config, labels: Sequence[str], folder: Path) -> Any:
    from edgepeft.backbone.load import quantized_model

    return quantized_model(folder / "quantized", labels, config)


def train_one(config: Config, variant: str, folder: Path) -> dict[str, Any]:
    """Train one variant in this process; return accuracy, speed and memory. `folder` holds the quantized backbone."""
    import peft  # noqa: F401 - its memory belongs to the libraries
    from transformers import Trainer, set_seed  # noqa: F401 - and Trainer's

    from edgepeft.backbone.load import resolve_model
    from edgepeft.train import loop, watch
    from edgepeft.train.data import load_splits

    splits = load_splits(config)
    watch.reset_peak_resident()
    libraries_bytes = watch.peak_resident_bytes()
    makers: dict[str, Callable[[], Any]] = {
        REFERENCE: lambda: _float_model(config, len(splits.labels)),
        "bnb-nf4": lambda: _bitsandbytes_model(config, len(splits.labels)),
    }
    with watch.quiet(), tempfile.TemporaryDirectory() as work:
        set_seed(config.seed)
        model = makers.get(variant, lambda: _packed_model(config, splits.labels, folder))()
        model.config.name_or_path = str(resolve_model(config).path)
        tokenizer = loop.load_tokenizer(resolve_model(config).path)
        result = loop.fit(loop.adapted(model, config), tokenizer, splits, config, Path(work))
    chosen = {
        name: result[name]
        for name in ("test", "validation", "samples_per_second", "step_ms", "step_cpu_ms", "seconds", "best_epoch")
    }
    memory = {"peak_bytes": result["peak_resident_bytes"], "libraries_bytes": libraries_bytes}
    return {"variant": variant, "seed": config.seed, **chosen, **memory}


def quantize_for(config: Config, folder: Path) -> None:
    """Quantize the backbone of a configuration into `folder`."""
    from edgepeft.quant.stage import quantize

    run = Run(folder)
    run.make("quantized", "bench", lambda out: quantize(config, run, out))


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every variant with every seed, each in a process of its own, and return their results."""
    results = []
    with tempfile.TemporaryDirectory() as place:
        for variant in options.variants:
            if variant in FORMATS:
                _child(options, ["--quantize", variant, "--folder", f"{place}/{variant}"])
        jobs = [(variant, seed) for seed in options.seeds for variant in options.variants]
        for variant, seed in progress(jobs, "train"):
            say(f"{variant}, seed {seed}")
            results.append(
                json.loads(_child(options, ["--one", variant, "--seeds", str(seed), "--folder", f"{place}/{variant}"]))
            )
    return results


def _child(options: argparse.Namespace, arguments: list[str]) -> str:
    command = [sys.executable, "-m", "edgepeft.bench.training", *arguments, "--set", *options.set]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EdgePeftError(f"{' '.join(arguments)}: ended with {done.returncode}; its message stands above.")
    return done.stdout


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per variant: means over the seeds, and accuracy against the reference in points."""
    accuracy = {r["variant"]: [] for r in results}  # type: dict[str, list[float]]
    for result in results:
        accuracy[result["variant"]].append(result["test"]["accuracy"])
    reference = statistics.mean(accuracy[REFERENCE]) if REFERENCE in accuracy else None
    rows = []
    for variant, values in accuracy.items():
        own = [r for r in results if r["variant"] == variant]
        mean = statistics.mean(values)
        rows.append({
            "variant": variant,
            "test accuracy %": round(100 * mean, 2),
            "spread": round(100 * (max(values) - min(values)), 2),
            "points to float32": None if reference is None else round(100 * (mean - reference), 2),
            "macro-F1 %": round(100 * statistics.mean(r["test"]["macro_f1"] for r in own), 2),
            "samples/s": round(statistics.median(r["samples_per_second"] for r in own), 1),
            "CPU ms/step": round(statistics.median(r["step_cpu_ms"] for r in own)),
            "seconds": round(statistics.median(r["seconds"] for r in own), 1),
            "peak MiB": round(max(r["peak_bytes"] for r in own) / 2**20),
            "model MiB": round(max(r["peak_bytes"] - r["libraries_bytes"] for r in own) / 2**20),
        })  # fmt: skip
    return rows


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name the packed variants that lost more accuracy than allowed."""
    limit = -100 * ALLOWED_DROP
    return [r["variant"] for r in rows if r["variant"] in FORMATS and (r["points to float32"] or 0) < limit]


def _config(options: argparse.Namespace, variant: str | None) -> Config:
    """Return the configuration: defaults, then `--set name=value`, typed as the field's default is."""
    given = typed(options.set)
    if variant in FORMATS:
        given["format"] = variant
    return Config(seed=options.seeds[0], **given)


def typed(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the settings of `name=value` each, typed as the field's default is; a truth is "true" or "false"."""
    given: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        kind = type(getattr(Config, name))
        given[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; exit 1 when a packed variant falls more than a point below float32."""
    parser = argparse.ArgumentParser(prog="edgepeft.bench.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=[*FORMATS, REFERENCE, "bnb-nf4"])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="settings other than the defaults")
    parser.add_argument("--json", type=Path, help="also write the results here")
    for name in ("--one", "--quantize", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quantize:
        quantize_for(_config(options, options.quantize), Path(options.folder))
        return 0
    if options.one:
        print(json.dumps(train_one(_config(options, options.one), options.one, Path(options.folder))))
        return 0
    results = compare(options)
    rows = summary(results)
    print(table(rows))
    text = json.dumps({"rows": rows, "results": results}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
