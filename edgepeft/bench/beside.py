"""The figures of a shape, ours and the peers', as one table and one drawing beside the machine's limit.

    decode limit    bandwidth / bytes that our bundle reads for a token: weights, adapter, and the cache half way
    prefill limit   int8 peak of the instructions that read our prompts / operations of a token: 2 for each weight of
                    the layers; the head's, once a text

Both limits are measured just before and after a shape is, and the higher counts (see `edgepeft.bench.limit`). They are
the same for everybody: what 4-bit weights and this processor allow. "% of limit" is with the adapter on. A star marks a
row during which others kept cores busy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepeft.artifact import read_json, tensor_header
from edgepeft.bench.limit import int8_peaks, read_bandwidth
from edgepeft.bench.peers.protocol import ROOM
from edgepeft.bench.turns import PROMPT
from edgepeft.console import table
from edgepeft.runtime.adapters import DEFAULT, TENSORS, UP
from edgepeft.runtime.library import find_library, open_library
from edgepeft.runtime.manifest import check_bundle

FLOAT_BYTES, HALF_BYTES = 4, 2
OURS = "edgepeft"
FIGURES = ("decode_on", "decode_off", "prefill_on", "prefill_off")


def token_bytes(folder: Path) -> int:
    """Return the bytes that writing one token reads: weights and adapter, and the cache half way through a run.

    The default adapter's B lies among the weights and in the adapter's file, and is read once.
    """
    header, _, _ = tensor_header(folder / "adapters" / DEFAULT / TENSORS)
    twice = sum(math.prod(entry["shape"]) for name, entry in header.items() if name.endswith(UP)) * HALF_BYTES
    manifest = read_json(folder / "manifest.json")
    about, sizes = manifest["decoder"], manifest["sizes_bytes"]
    cache = 2 * about["layers"] * about["kv_heads"] * about["head_dim"] * (PROMPT + ROOM // 2) * FLOAT_BYTES
    return sizes["weights"] + sizes["adapters"] - twice + cache


def instructions(folder: Path) -> str:
    """Return the set of instructions by which a bundle's linears read a prompt here; "" without our library."""
    manifest = check_bundle(folder, "quick")
    path = find_library(manifest, "auto")
    row = f"{manifest['format']}_{manifest['activation']}_"
    names = open_library(path).kernels if path else ()
    return next((name.removeprefix(row) for name in names if name.startswith(row)), "")


def limits(folder: Path, about: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Return what this machine allows at this moment; `about` holds the shape's `tensors` and `linears`."""
    size_bytes = token_bytes(folder)
    bandwidth, settings = read_bandwidth(threads, size_bytes), about["settings"]
    return {
        "token_bytes": size_bytes, "bandwidth_bytes_s": bandwidth,
        "instructions": instructions(folder), "int8_ops_s": int8_peaks(threads), "decode_tok_s": bandwidth / size_bytes,
        "layer_ops": 2 * sum(math.prod(about["tensors"][name]) for name in about["linears"]),
        "head_ops": 2 * settings["hidden_size"] * settings["vocab_size"],
    }  # fmt: skip


def higher(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the higher of two measured limits, figure by figure: others can only lower one."""
    return {
        name: higher(value, second[name]) if isinstance(value, Mapping) else max(value, second[name])
        for name, value in first.items()
    }


def prefill_limit(limit: Mapping[str, Any], tokens: int) -> float:
    """Return tokens a second of a text of that length at the int8 peak of our instructions; 0 where there is none."""
    return limit["int8_ops_s"].get(limit["instructions"], 0.0) / (limit["layer_ops"] + limit["head_ops"] / tokens)


def _best(rows: Sequence[Mapping[str, Any]], figure: str) -> float:
    """Return the best that a peer reached."""
    return max((row[f"{figure}_tok_s"] for row in rows if row["who"] != OURS), default=0.0)


def _number(value: float) -> float:
    return round(value, 1) if value < 100 else round(value)


def lines(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the lines of one shape and number of threads: everybody's, our ratio to the best peer, the limit."""
    place, rows, limit = {"shape": result["shape"], "threads": result["threads"]}, result["rows"], result["limit"]
    top = prefill_limit(limit, rows[0]["prefill_tokens"])
    for row in rows:
        speeds = {_head(name): _number(row[f"{name}_tok_s"]) for name in FIGURES}
        yield {
            **place, "who": row["who"] + "*" * row["disturbed"], **speeds,
            "adapter costs decode %": round(row["decode_cost_pct"], 1),
            "prefill %": round(row["prefill_cost_pct"], 1),
            "decode % of limit": round(100 * row["decode_on_tok_s"] / limit["decode_tok_s"]),
            "prefill % of peak": round(100 * row["prefill_on_tok_s"] / top) if top else None,
            "anonymous MB": round(row["anonymous_bytes"] / 1e6), "load s": round(row["load_s"], 2),
        }  # fmt: skip
    own = next(row for row in rows if row["who"] == OURS)
    if len(rows) > 1:
        ratios = {_head(f): f"{own[f'{f}_tok_s'] / _best(rows, f):.2f}x" for f in FIGURES}
        yield {**place, "who": f"{OURS} / best peer", **ratios}
    name = f"limit, {limit['instructions']}" if top else "limit"
    yield {**place, "who": name, _head("decode_on"): _number(limit["decode_tok_s"]), _head("prefill_on"): round(top)}


def _head(figure: str) -> str:
    what, adapter = figure.split("_")
    return f"{what} {adapter}"


def text(host: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """Return the whole report as Markdown: the table in tokens a second, and what each row stands on."""
    parts = [
        f"{host['cpu']}, {host['cores']} cores, load {host['load_average']}; onnxruntime {host['onnxruntime']}, "
        f"Python {host['python']}; " + ", ".join(f"{row['who']} {row['version']}" for row in results[0]["rows"]),
        "tokens a second, adapter on and off; the best peer is the better of the others in each column",
        "",
        table([line for result in results for line in lines(result)]),
        "",
        *(_note(result) for result in results),
    ]
    if any(row["disturbed"] for result in results for row in result["rows"]):
        parts.append("* measured while others kept cores busy: bounds, not figures.")
    return "\n".join(parts)


def _note(result: Mapping[str, Any]) -> str:
    limit, row = result["limit"], result["rows"][0]
    peaks = ", ".join(f"{name} {speed / 1e9:.0f}" for name, speed in limit["int8_ops_s"].items())
    return (
        f"{result['shape']}, {result['threads']} threads: prompts of {row['prefill_tokens']} ({row['prefill_rounds']} "
        f"rounds), {row['decode_rounds']} rounds of decoding; a token reads {limit['token_bytes'] / 1e6:.0f} MB at "
        f"{limit['bandwidth_bytes_s'] / 1e9:.1f} GB/s; int8 peak, billion operations/s: {peaks or 'none'}"
    )


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw tokens a second with the adapter on, and the limit, as a PNG, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 2.4 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for result, pair in zip(results, axes, strict=True):
        rows, limit = result["rows"], result["limit"]
        tops = limit["decode_tok_s"], prefill_limit(limit, rows[0]["prefill_tokens"])
        for axis, what, top in zip(pair, ("decode", "prefill"), tops, strict=True):
            axis.barh([row["who"] for row in rows], [row[f"{what}_on_tok_s"] for row in rows])
            axis.axvline(top, color="black", linestyle=":")
            axis.set_title(f"{result['shape']}, {result['threads']} threads: {what}, tokens/s", fontsize=9)
            axis.invert_yaxis()
    figure.savefig(path, dpi=120, metadata={"Software": None})
