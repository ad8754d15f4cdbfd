"""What quantization costs: the metric against the size of the packed weights, for each solver, format and budget.

    python -m edgepeft.bench.quantization --model small/model --data small/data --task text-generation --plot sizes.png

For a language model the metric is the perplexity of the packed model on the test split (validation where there is
none), before any adapter, and

    lost = perplexity - perplexity of the float32 model        share = lost / what rtn loses in the same format

Solvers that draw calibration texts are measured once per seed; table and plot show the mean, and the worst share.

For an encoder, whose head is not there before training, it is the test metric after training an adapter as `edgepeft
train` does (--set epochs=3 and the like shorten that). Sizes are those of weights.safetensors, embeddings included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from edgepeft.artifact import Run, read_json, write_json
from edgepeft.bench.training import typed
from edgepeft.config import Config
from edgepeft.console import say, table
from edgepeft.errors import ConfigError, EdgePeftError
from edgepeft.quant.formats import FORMATS
from edgepeft.quant.solvers import SOLVERS

PLAIN, DECODING = "rtn", "text-generation"


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the settings to measure: each solver in each format, then under each budget, once per seed that matters."""
    kinds = [*(("format", tag) for tag in options.formats), *(("size", size) for size in options.sizes)]
    for kind, value in kinds:
        for solver in options.solvers:
            draws = SOLVERS[solver].calibrated or kind == "size" or options.task != DECODING
            for seed in options.seeds if draws else options.seeds[:1]:
                yield {kind: value, "solver": solver, "seed": seed}


def measure(config: Config, folder: Path, examples: int | None) -> dict[str, Any]:
    """Quantize into a run folder and return {format, solver, MB, seconds, output error} and the metric."""
    from edgepeft.pipeline import build, stage_named

    run, started = config.replace(output=str(folder)), time.monotonic()
    build(run, [stage_named("quantize")])
    seconds = time.monotonic() - started
    summary = Run(folder).records["quantized"]["summary"]
    if config.task == DECODING:
        found = perplexity(run, folder / "quantized", examples)
    else:
        build(run, [stage_named("train")])
        found = Run(folder).records["adapter"]["summary"]["test"]
    row = {"format": label(config), "solver": config.solver, "seed": config.seed}
    error = summary.get("mean_output_error")
    return {**row, "MB": summary["bytes"] / 1e6, "quantize s": round(seconds, 1), "output error": error, **found}


def perplexity(config: Config, quantized: Path | None, examples: int | None) -> dict[str, float]:
    """Return loss and perplexity of a packed folder, or of the float model, on the first `examples` texts."""
    import transformers

    from edgepeft.backbone.load import quantized_model, resolve_model
    from edgepeft.train.data import load_splits
    from edgepeft.train.loop import evaluate, load_tokenizer

    source, splits = resolve_model(config).path, load_splits(config)
    whole = splits.test if len(splits.test) else splits.validation
    split = dataclasses.replace(whole, rows=whole.rows[:examples])
    if quantized is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(source), dtype="float32").eval()
    else:
        model = quantized_model(quantized, (), config)
    found = evaluate(model, config, split, load_tokenizer(source))
    return {"loss": found["loss"], "perplexity": found["perplexity"]}


def with_losses(rows: list[dict[str, Any]], reference: float) -> list[dict[str, Any]]:
    """Add what each row lost in perplexity, and that as a share of what rtn lost in the same format."""
    plain: dict[str, list[float]] = {}
    for row in rows:
        row["lost"] = row["perplexity"] - reference
        if row["solver"] == PLAIN:
            plain.setdefault(row["format"], []).append(row["lost"])
    for row in rows:
        base = mean(plain.get(row["format"], [0.0]))
        row["share of rtn's"] = row["lost"] / base if base > 0 else None
    return rows


def averaged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per format and solver: the mean over the seeds of each figure, and the worst share."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["format"], row["solver"]), []).append(row)
    return [_mean_row(group) for group in groups.values()]


def _mean_row(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, shares = group[0], [share for row in group if (share := row.get("share of rtn's")) is not None]
    figures = [name for name in first if name not in ("format", "solver", "seed")]
    means = {name: None if first[name] is None else mean([row[name] for row in group]) for name in figures}
    worst = {"worst share": max(shares)} if shares else {}
    return {"format": first["format"], "solver": first["solver"], "seeds": len(group), **means, **worst}


def draw(rows: Sequence[dict[str, Any]], metric: str, reference: float | None, file: Path) -> None:
    """Plot metric against size, one line of points per solver."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for solver in dict.fromkeys(row["solver"] for row in rows):
        own = sorted((row for row in rows if row["solver"] == solver), key=lambda row: row["MB"])
        axes.plot([row["MB"] for row in own], [row[metric] for row in own], "o-", label=solver)
    for row in rows:
        axes.annotate(row["format"], (row["MB"], row[metric]), fontsize=7, xytext=(3, 3), textcoords="offset points")
    if reference is not None:
        axes.axhline(reference, color="grey", linestyle=":", label="float32")
    axes.set(xlabel="packed weights, MB", ylabel=metric)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases; return {"reference", "metric", "rows"}."""
    base = Config(model=options.model, data=options.data, task=options.task, **typed(options.set))
    decoder = base.task == DECODING
    known = read_json(options.json) if options.json and options.json.is_file() else {"reference": None, "rows": []}
    asked = {name: getattr(options, name) for name in ("model", "data", "task", "examples", "set")}
    if known.setdefault("asked", asked) != asked:
        raise ConfigError(f"{options.json}: holds results of other settings ({known['asked']}). Give another file.")
    result = {"metric": "perplexity" if decoder else "accuracy", **known}
    if decoder and result["reference"] is None:
        result["reference"] = perplexity(base, None, options.examples)["perplexity"]
    there = {(row["format"], row["solver"], row["seed"]) for row in result["rows"]}
    for config in (base.replace(**case) for case in cases(options)):
        if (label(config), config.solver, config.seed) in there:
            continue
        with tempfile.TemporaryDirectory() as folder:
            result["rows"].append(measure(config, Path(folder) / "run", options.examples))
        say(json.dumps(result["rows"][-1]))
        if options.json:
            write_json(options.json, result)
    if decoder:
        with_losses(result["rows"], result["reference"])
    return result


def label(config: Config) -> str:
    """Return how a configuration's formats are called in the table."""
    return f"{config.size} mixed" if config.size else config.format


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write JSON and plot where asked."""
    parser = argparse.ArgumentParser(prog="edgepeft.bench.quantization", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--data", default="home-assistant")
    parser.add_argument("--task", default="text-classification")
    parser.add_argument("--formats", nargs="*", default=["i8c", "i4b32", "i4b128", "nf4b64"], choices=list(FORMATS))
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    parser.add_argument("--sizes", nargs="*", default=[], metavar="SIZE", help="budgets as for --size")
    parser.add_argument("--examples", type=int, help="texts to measure perplexity on; all unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration texts that are drawn")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="settings other than the defaults")
    parser.add_argument("--json", type=Path, help="also write the results here; cases it holds are not measured again")
    parser.add_argument("--plot", type=Path, help="also draw metric against size here")
    options = parser.parse_args(arguments)
    try:
        result = run(options)
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if result["reference"] is not None:
        print(f"float32: {result['metric']} {result['reference']:.4f}\n")
    rows = averaged(result["rows"])
    print(table(rows))
    if options.json:
        write_json(options.json, result)
    if options.plot:
        draw(rows, result["metric"], result["reference"], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
