"""What a bundle costs on this machine: latency, the adapter's share of it, swapping, loading, memory; beside a peer.

    latency   of a classifier: p50 and p95 per threads x batch x length, for: the base (rank 0), the default adapter as
              the graph holds it, an adapter that is fed (as every other one is; it alternates with the rest, so each of
              its runs includes a swap), and with --baseline the float32 peer
    speed     of a language model: tokens a second, see `generation`
    mixed     rows of a run with an adapter each, beside as many under one, see `mixed`
    swap      `use` of another adapter, microseconds; and its first use, which maps the file
    memory    fresh processes, peak and anonymous bytes above a bare ONNX Runtime process

All candidates of a row take turns in one process. Figures are those of this machine at this hour; the report says how
many cores others kept busy.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft import __version__
from edgepeft.artifact import write_json
from edgepeft.bench import generation, memory
from edgepeft.bench.mixed import mixed
from edgepeft.bench.timing import disturbed, interleave
from edgepeft.errors import ConfigError
from edgepeft.runtime import Model, load
from edgepeft.runtime.adapters import BASE, DEFAULT
from edgepeft.runtime.library import installed_onnxruntime, platform_tag
from edgepeft.runtime.manifest import check_bundle
from edgepeft.runtime.session import Bundle

LENGTHS = (8, 32, 128)
BATCHES = (1, 8)
FED = "(fed)"
BUDGET_S = 2.0
SWAPS = 200
PROCESSES = 3


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, load, versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    except OSError:
        fields = {}
    return {
        "cpu": fields.get("model name") or fields.get("Model") or fields.get("CPU part") or platform.processor(),
        "platform": platform_tag(),
        "cores": _cores(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": installed_onnxruntime(),
        "edgepeft": __version__,
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _candidates(model: Model, peer: Any, arrays: dict[str, np.ndarray]) -> dict[str, Callable[[], object]]:
    """Return what takes turns in one row of the latency table."""
    names = {"default": DEFAULT}
    if model.adapters:
        model.fed(DEFAULT, FED)
        names = {"base": BASE, "default": DEFAULT, "fed": FED}
    out: dict[str, Callable[[], object]] = {
        label: functools.partial(model.run, arrays, name) for label, name in names.items()
    }
    if peer is not None:
        out["float32"] = functools.partial(peer.run, arrays)
    return out


def latency(model: Model, peer: Any, threads: int, batch: int, length: int, budget_s: float) -> dict[str, Any]:
    """Return one row: p50 and p95 of each candidate, the adapter's overhead and the speed beside the peer."""
    timings = interleave(_candidates(model, peer, memory.rows(model, batch, length)), budget_s)
    own = timings["default"]
    row: dict[str, Any] = {
        "threads": threads, "batch": batch, "length": length, "p50_ms": own.p50_ms, "p95_ms": own.p95_ms,
        "tokens_s": 1000 * batch * length / own.p50_ms,
    }  # fmt: skip
    if "base" in timings:
        base = timings["base"].p50_ms
        row |= {"adapter_pct": 100 * (own.p50_ms / base - 1), "fed_pct": 100 * (timings["fed"].p50_ms / base - 1)}
    if "float32" in timings:
        row |= {"float32_ms": timings["float32"].p50_ms, "speedup": timings["float32"].p50_ms / own.p50_ms}
    row["disturbed"] = disturbed(own)
    return {**row, "timings": {name: dataclasses.asdict(timing) for name, timing in timings.items()}}


def swap(model: Bundle) -> dict[str, float]:
    """Return microseconds of a swap: median, largest; and of the first use of an adapter."""
    if not model.adapters:
        return {}
    started = time.perf_counter()
    model.fed(DEFAULT, "(new)")
    model._make(DEFAULT)
    first = time.perf_counter() - started
    spent = []
    for name in [FED, BASE, DEFAULT] * SWAPS:
        started = time.perf_counter()
        model.use(name)
        spent.append(time.perf_counter() - started)
    model.use(DEFAULT)
    return {"swap_us": 1e6 * float(np.median(spent)), "worst_us": 1e6 * max(spent), "first_use_us": 1e6 * first}


def processes(bundle: Path, threads: int, peers: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return start-up times and memory of fresh processes, medians of PROCESSES each, memory above a bare one's."""
    kinds = {"bare": ("bare", ""), "tokenizer": ("tokenizer", ""), "bundle": ("model", "")}
    kinds |= {name: ("model", str(file)) for name, file in peers.items()}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(PROCESSES):
        for kind, (what, file) in kinds.items():
            found[kind].append(memory.measure(what, str(bundle), threads, file))
    medians = {kind: _medians(rows) for kind, rows in found.items()}
    for row in medians.values():
        row["above_bare_bytes"] = row["peak_bytes"] - medians["bare"]["peak_bytes"]
        row["anonymous_above_bare_bytes"] = row["anonymous_bytes"] - medians["bare"]["anonymous_bytes"]
    return [{"process": kind, **row} for kind, row in medians.items()]


def _medians(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = [key for key, value in rows[0].items() if isinstance(value, (int, float))]
    return {key: float(np.median([row[key] for row in rows])) for key in numbers}


def bench(
    bundle: Path,
    threads: Sequence[int] = (1,),
    baseline: bool = False,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
    budget_s: float = BUDGET_S,
) -> dict[str, Any]:
    """Measure a bundle and return all figures. baseline=True exports and measures the float32 peer too."""
    from edgepeft.bench.peer import export_peer, load_peer

    with tempfile.TemporaryDirectory() as scratch:
        peers = export_peer(bundle, Path(scratch)) if baseline else {}
        result: dict[str, Any] = {"machine": machine(), "latency": [], "speed": [], "mixed": [], "swap": {}}
        result["processes"] = processes(bundle, threads[0], peers)
        for count in threads:
            model = load(bundle, threads=count)
            if isinstance(model, Model):
                peer = load_peer(bundle, peers["float32"], count) if peers else None
                for batch, length in itertools.product(batches, fitting(model, lengths)):
                    result["latency"].append(latency(model, peer, count, batch, length, budget_s))
            else:
                result["speed"].append(generation.speeds(model, count, budget_s))
            result["mixed"] += [{"threads": count, **row} for row in [mixed(model, budget_s)] if row]
            result["swap"] = swap(model)
    result["bundle"] = {key: model.manifest.values.get(key) for key in ("name", "format", "rank", "base_digest")}
    result["bundle"]["sizes_bytes"] = model.manifest.values.get("sizes_bytes", {})
    result["library"] = dataclasses.asdict(model.library) if model.library else None
    return result


def fitting(model: Model, lengths: Sequence[int]) -> list[int]:
    """Return those lengths in tokens that the model has positions for, behind the prompt of its own adapter."""
    most = int(model.manifest["positions"]) - model.prompt(DEFAULT)
    return [length for length in lengths if length <= most]


def bench_cli(
    bundle: Path | str, threads: Sequence[int] = (), baseline: bool = False, json_file: Path | None = None
) -> dict[str, Any]:
    """Measure a bundle, print the tables to standard output and write the figures to json_file; return them."""
    from edgepeft.bench.report import report_text

    if check_bundle(Path(bundle))["task"] != "text-classification" and baseline:
        raise ConfigError("--baseline: there is a float32 peer for classifiers alone. Leave it out.")
    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise ConfigError(f"{json_file}: there is no folder to write it to.")
    result = bench(Path(bundle), list(threads) or [1], baseline)
    print(report_text(result))
    if json_file is not None:
        write_json(Path(json_file), _plain(result))
    return result


def _plain(value: Any) -> Any:
    """Return a JSON-able copy: paths become names, numbers plain."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Path) else value
