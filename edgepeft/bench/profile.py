"""Where the time of a language model's bundle goes: ONNX Runtime's own profile, by group of operators.

    python -m edgepeft.bench.profile qwen2.5-0.5b --threads 1

    linears     the fused op, and of it the head alone, which is read once a prompt and once a token
    attention   GroupQueryAttention        norms        RMSNorm, SkipRMSNorm
    activation  GatedActivation            embedding    PackedEmbedding
    other       what else the graph holds  between      the session's time outside of any operator

A row is a kind of run (a part of a prompt, a token) with the adapter on or off, milliseconds a run and percent of it;
medians over runs, so the parts need not add up to the last digit. Profiling itself costs some microseconds a node.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepeft.bench.peers import ours, protocol
from edgepeft.errors import EdgePeftError, unknown

GROUPS = {
    "AdapterMatMul": "linears", "GroupQueryAttention": "attention", "RMSNorm": "norms", "SkipRMSNorm": "norms",
    "GatedActivation": "activation", "PackedEmbedding": "embedding",
}  # fmt: skip
HEADS = ("logits_kernel_time", "lm_head_kernel_time")  # as a head is called that gives logits, or what is capped
NAMES = (*dict.fromkeys(GROUPS.values()), "head", "other", "between")
PROMPT, RUNS, TOKENS = 128, 4, 32


@contextlib.contextmanager
def _profiling(folder: Path) -> Iterator[None]:
    """Let every session that is made meanwhile write a profile into `folder` when it ends."""
    import onnxruntime

    plain = onnxruntime.SessionOptions

    def options() -> Any:
        made = plain()
        made.enable_profiling, made.profile_file_prefix = True, str(folder / "profile")
        return made

    onnxruntime.SessionOptions = options
    try:
        yield
    finally:
        onnxruntime.SessionOptions = plain


def _events(bundle: Path, threads: int, what: str, adapter: bool, count: int) -> list[dict[str, Any]]:
    """Run one kind of work in a session of its own and return the events of its profile, in order of time."""
    with tempfile.TemporaryDirectory() as name:
        with _profiling(Path(name)):
            engine = ours.Engine(str(bundle), threads)
        text = engine.open(adapter)
        if what == "prefill":
            for _ in range(RUNS + 1):
                text.back(0)
                protocol.read(engine, text, count)
        else:
            protocol.read(engine, text, PROMPT)
            protocol.write(engine, text, count + 1)
        events = json.loads(Path(engine.end_profiling()).read_text())
    return sorted(events, key=lambda event: event.get("ts", 0))


def _group(event: Mapping[str, Any]) -> str:
    if event["name"] in HEADS:
        return "head"
    kind = event["args"]["op_name"]
    return next((group for op, group in GROUPS.items() if kind.split("_")[0] == op), "other")


def shares(events: Sequence[Mapping[str, Any]], runs: int) -> tuple[float, dict[str, float]]:
    """Return milliseconds of one of the last `runs` runs, and {group: percent of it}; medians over the runs."""
    whole = [event for event in events if event.get("name") == "model_run"][-runs:]
    nodes = [e for e in events if e.get("cat") == "Node" and str(e["name"]).endswith("_kernel_time")]
    rows: list[dict[str, float]] = []
    for run in whole:
        row = dict.fromkeys(NAMES, 0.0)
        for event in nodes:
            if run["ts"] <= event["ts"] < run["ts"] + run["dur"]:
                row[_group(event)] += event["dur"] / 1000
        rows.append({**row, "between": run["dur"] / 1000 - sum(row.values())})
    total = statistics.median(run["dur"] for run in whole) / 1000
    return total, {name: 100 * statistics.median(row[name] for row in rows) / total for name in NAMES}


def profile(bundle: Path, threads: int, part: int) -> list[dict[str, Any]]:
    """Return a row for prompts and tokens with the adapter on and off; `part` is how long a prompt is read at once."""
    rows = []
    for what, count, runs in (("prefill", part, RUNS), ("decode", TOKENS, TOKENS)):
        for adapter in (True, False):
            total, found = shares(_events(bundle, threads, what, adapter, count), runs)
            row = {"run": f"{part} tokens" if what == "prefill" else "a token", "adapter": "on" if adapter else "off"}
            rows.append({**row, "ms": round(total, 2), **{f"{n} %": round(found[n], 1) for n in NAMES}})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a shape (see `edgepeft.bench.shapes`) or of a bundle."""
    from edgepeft.bench import shapes
    from edgepeft.console import table
    from edgepeft.runtime.generate import CHUNK

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", metavar="SHAPE|BUNDLE", help=f"a folder, or of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.what not in shapes.SHAPES and not Path(args.what).is_dir():
        parser.error(unknown("shape", args.what, shapes.SHAPES))
    try:
        folder = shapes.bundle(args.what) if args.what in shapes.SHAPES else Path(args.what)
        print(table(profile(folder, args.threads, CHUNK)))
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
