"""The figures of a bench as Markdown tables, with a sentence wherever they must not be taken at face value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepeft.bench.generation import speeds_text
from edgepeft.console import table

MB = 1e6


def publish(text: str, rows: Sequence[Mapping[str, Any]], file: Path | None) -> None:
    """Print a table and, where a file is given, write its rows there as JSON."""
    print(text)
    if file:
        file.write_text(json.dumps(rows, indent=1) + "\n")


def _latency(rows: list[Mapping[str, Any]]) -> str:
    """Return the latency table; a star marks a row that others disturbed."""
    shown = []
    for row in rows:
        line = {
            "threads": row["threads"],
            "batch": row["batch"],
            "tokens": row["length"],
            "p50 ms": f"{row['p50_ms']:.2f}{'*' if row['disturbed'] else ''}",
            "p95 ms": f"{row['p95_ms']:.2f}",
            "tokens/s": round(row["tokens_s"]),
        }
        if "adapter_pct" in row:
            line |= {"adapter %": round(row["adapter_pct"], 1), "fed adapter %": round(row["fed_pct"], 1)}
        if "speedup" in row:
            line |= {"float32 ms": f"{row['float32_ms']:.2f}", "faster by": f"{row['speedup']:.2f}x"}
        shown.append(line)
    return table(shown)


def _processes(rows: list[Mapping[str, Any]]) -> str:
    shown = []
    for row in rows:
        line = {"process": row["process"], "peak MB": round(row["peak_bytes"] / MB, 1)}
        line["above bare MB"] = round(row["above_bare_bytes"] / MB, 1)
        line["anonymous above bare MB"] = round(row["anonymous_above_bare_bytes"] / MB, 1)
        for key in ("import_ms", "load_ms", "first_answer_ms"):
            line[key.replace("_ms", " ms").replace("_", " ")] = round(row[key], 1) if key in row else None
        shown.append(line)
    return table(shown)


def _ratio(rows: list[Mapping[str, Any]]) -> str:
    """Return the sentence that lays the bundle's memory beside the peers', where there are any."""
    above = {row["process"]: row["above_bare_bytes"] for row in rows}
    parts = [f"{above['bundle'] / above[name]:.2f} of {name}'s" for name in above if name.startswith("float32")]
    text = above["tokenizer"]
    own = [f"{(above['bundle'] - text) / (above[n] - text):.2f}" for n in above if n.startswith("float32")]
    if not parts:
        return ""
    return f"peak memory above a bare process: {', '.join(parts)}; less the tokenizer: {', '.join(own)}"


def _mixed(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what adapters of their own cost the rows of a run, for each number of threads."""
    for row in rows:
        by_bytes = f"; {row['by_bytes']:.2f} if bytes alone took time" if row["by_bytes"] else ""
        yield (
            f"{row['rows']} rows under an adapter each run at {row['speed']:.2f} of the speed of as many under one "
            f"({row['each_ms']:.2f} and {row['one_ms']:.2f} ms, threads {row['threads']}{by_bytes})"
        )


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a reader must know before believing the tables."""
    busy = [row for row in (*result["latency"], *result["speed"]) if row["disturbed"]]
    if busy:
        yield f"* {len(busy)} rows were measured while others kept cores busy: bounds, not figures."
    if result["library"] is None:
        yield "no op library: these are stock ONNX Runtime's figures."


def _instruction_sets(library: Mapping[str, Any]) -> str:
    """Return what a library's kernels are written for, best first: a row's name ends with it."""
    return ", ".join(dict.fromkeys(name.rpartition("_")[2] for name in library["kernels"]))


def report_text(result: Mapping[str, Any]) -> str:
    """Return the report of a bench as Markdown."""
    host, library = result["machine"], result["library"]
    kernels = f"{library['build']}, kernels: {_instruction_sets(library)}" if library else "stock ONNX Runtime"
    swap = result["swap"]
    swapping = (
        "adapter swap: {swap_us:.1f} us (worst {worst_us:.0f}), first use {first_use_us:.0f} us".format(**swap)
        if swap
        else "merged: no adapter to swap"
    )
    lines = [
        f"{result['bundle']['name']}, rank {result['bundle']['rank']}; {kernels}",
        f"{host['cpu']}, {host['cores']} cores, load {host['load_average']}; onnxruntime {host['onnxruntime']}, "
        f"numpy {host['numpy']}, Python {host['python']}",
        "",
        _latency(result["latency"]) if result["latency"] else speeds_text(result["speed"]),
        "",
        _processes(result["processes"]),
        "",
        *_mixed(result["mixed"]),
        swapping,
        _ratio(result["processes"]),
        *_notes(result),
    ]
    return "\n".join(lines).rstrip()
