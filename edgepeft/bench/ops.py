"""Times the fused op against ONNX Runtime's own way to say the same: MatMulNBits, MatMul, MatMul, Add.

    ours   AdapterMatMul_<format>_g1   int8 activations, adapter float16
    peer   MatMulNBits (4 bits, block 32, accuracy_level 4) + (x A) B, adapter float32 constants

Both run in one process, by turns in a drawn order, on the same x; a row reports medians, the median ratio of paired
turns and its quartiles. One thread is timed by its own CPU time, which other programs hardly disturb; several by the
wall clock, and they sleep while the others are timed.
Before a row is timed both outputs are held to the float32 result of their weights. Rank 0 of ours beside rank R of ours
gives what an adapter costs, next to the share of the bytes that it adds.

Left out: other peers, other operators, whole models (`edgepeft.bench` has them).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.bench.report import publish
from edgepeft.bench.timing import orders
from edgepeft.errors import EdgePeftError
from edgepeft.quant.formats import FORMATS
from edgepeft.runtime.session import REST

SHAPES = ((384, 1536), (896, 4864), (2048, 2048), (2048, 8192), (8192, 2048))  # (K, N)
MS = (1, 128, 512)
PEER_BLOCK = 32
MIN_TURNS, PATIENCE = 5, 60  # turns; times the seconds asked for
LIMIT = 0.05  # of |y|, as a norm: int8 activations and 4-bit arithmetic on the same weights stay far below


@dataclasses.dataclass(frozen=True)
class Case:
    """One op: x [M, K], weight [N, K] in `format`, LoRA of `rank`, `threads` of ONNX Runtime."""

    format: str
    m: int
    k: int
    n: int
    rank: int
    threads: int

    @property
    def adapter_share(self) -> float:
        """Bytes of the float16 adapter over the bytes of the packed weight."""
        spec = FORMATS[self.format]
        scale_bytes = spec.blocks(self.k) * np.dtype(spec.scale_dtype).itemsize
        return 2 * self.rank * (self.k + self.n) / (self.n * (self.k * spec.bits / 8 + scale_bytes))


def _model(nodes: list[Any], tensors: dict[str, np.ndarray], k: int, n: int) -> bytes:
    """Return a serialized model x [m, K] -> y [m, N]."""
    from onnx import TensorProto, helper, numpy_helper

    from edgepeft.export import ops

    graph = helper.make_graph(
        nodes,
        "op",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors.items()],
    )
    domains = [("", ops.OPSET), ("com.microsoft", 1), (ops.DOMAIN, ops.VERSION)]
    imports = [helper.make_opsetid(*domain) for domain in domains]
    return helper.make_model(graph, opset_imports=imports, ir_version=ops.IR_VERSION).SerializeToString()


def our_model(case: Case, w_nk: np.ndarray, a_rk: np.ndarray, b_nr: np.ndarray) -> bytes:
    """Return the fused op; a_rk, b_nr become float16."""
    from onnx import helper

    from edgepeft.export import ops

    packed = FORMATS[case.format].quantize(w_nk)
    one = np.ones(1, np.float32)
    values = [packed.w, packed.scale, one]
    values += [a_rk.astype(np.float16), b_nr.T.astype(np.float16), one, one, 0 * one]
    tensors = dict(zip(ops.input_names(1)[1:], values, strict=True))
    attributes = ops.attributes(case.k, [case.n], "int8")
    node = helper.make_node(ops.op_type(case.format, 1), ops.input_names(1), ["y"], domain=ops.DOMAIN, **attributes)
    return _model([node], tensors, case.k, case.n)


def peer_model(case: Case, w_nk: np.ndarray, a_rk: np.ndarray, b_nr: np.ndarray) -> bytes:
    """Return the same in ONNX Runtime's operators, at 4 bits in blocks of 32."""
    from onnx import helper

    codes_nk, scale_nb = FORMATS["i4b32"].unpack(FORMATS["i4b32"].quantize(w_nk))
    packed = (codes_nk[:, 0::2] | codes_nk[:, 1::2] << 4).reshape(case.n, -1, PEER_BLOCK // 2)
    tensors = {"w": packed, "s": scale_nb.astype(np.float32), "a": a_rk.T, "b": b_nr.T}
    sizes: dict[str, Any] = {"K": case.k, "N": case.n, "bits": 4, "block_size": PEER_BLOCK, "accuracy_level": 4}
    base = "y" if case.rank == 0 else "wx"
    nodes = [helper.make_node("MatMulNBits", ["x", "w", "s"], [base], domain="com.microsoft", **sizes)]
    if case.rank:
        nodes += [helper.make_node("MatMul", ["x", "a"], ["t"]), helper.make_node("MatMul", ["t", "b"], ["u"])]
        nodes += [helper.make_node("Add", ["wx", "u"], ["y"])]
    else:
        del tensors["a"], tensors["b"]
    return _model(nodes, tensors, case.k, case.n)


def session(model: bytes, threads: int) -> Any:
    """Return an ONNX Runtime session with our library registered."""
    import onnxruntime

    from edgepeft.deploy.compile import host_library

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry(*REST)
    options.register_custom_ops_library(str(host_library()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _runner(model: bytes, threads: int, x_mk: np.ndarray) -> Callable[[], np.ndarray]:
    made = session(model, threads)
    feed = {"x": x_mk}
    return lambda: made.run(None, feed)[0]


def _check(name: str, y_mn: np.ndarray, expected_mn: np.ndarray) -> None:
    """Raise EdgePeftError unless y is finite and near what was expected."""
    error = float(np.linalg.norm(y_mn - expected_mn) / np.linalg.norm(expected_mn))
    if not error <= LIMIT:
        raise EdgePeftError(f"{name}: expected an output within {LIMIT} of float32, found {error:.3g}. Do not time it.")


def interleave(runs: dict[str, Callable[[], Any]], seconds: float, threads: int = 1) -> dict[str, list[float]]:
    """Time several functions turn by turn for about `seconds` (at least 5 turns); returns seconds per call by name.

    One thread is timed by its own CPU time, several by the wall clock.
    Raises EdgePeftError when the clock hardly ever moves between two calls.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    start_s, order = time.perf_counter(), orders(list(runs))
    while (spent_s := time.perf_counter() - start_s) < seconds or len(next(iter(times.values()))) < MIN_TURNS:
        if spent_s > PATIENCE * max(1.0, seconds):
            raise EdgePeftError(f"{clock.__name__} stands still from call to call: too coarse a clock for this op.")
        turn = {}
        for name in next(order):
            start = clock()
            runs[name]()
            turn[name] = clock() - start
        if min(turn.values()) > 0:  # a virtual machine's CPU clock may stand still for a call
            for name, value in turn.items():
                times[name].append(value)
    return times


def _spread(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of the ratio of paired times: (25 %, median, 75 %)."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    return low, statistics.median(ratios), high


def measure(case: Case, seconds: float = 1.0) -> dict[str, Any]:
    """Time one case: ours, ours with no adapter, the peer. Returns one row, times in microseconds."""
    rng = np.random.default_rng(0)
    w_nk = rng.standard_normal((case.n, case.k), np.float32) / case.k**0.5
    x_mk = rng.standard_normal((case.m, case.k), np.float32)
    a_rk = (rng.standard_normal((case.rank, case.k)) / case.k**0.5).astype(np.float16).astype(np.float32)
    b_nr = (rng.standard_normal((case.n, case.rank)) * 0.25).astype(np.float16).astype(np.float32)
    bare = dataclasses.replace(case, rank=0)
    none = a_rk[:0], b_nr[:, :0]
    runs = {
        "ours": _runner(our_model(case, w_nk, a_rk, b_nr), case.threads, x_mk),
        "bare": _runner(our_model(bare, w_nk, *none), case.threads, x_mk),
        "peer": _runner(peer_model(case, w_nk, a_rk, b_nr), case.threads, x_mk),
    }
    for name, tag in (("ours", case.format), ("peer", "i4b32")):
        spec = FORMATS[tag]
        _check(f"{case} {name}", runs[name](), x_mk @ spec.dequantize(spec.quantize(w_nk)).T + (x_mk @ a_rk.T) @ b_nr.T)
    times = interleave(runs, seconds, case.threads)
    low, ratio, high = _spread(times["peer"], times["ours"])
    row = {**dataclasses.asdict(case), **{f"{name}_us": statistics.median(t) * 1e6 for name, t in times.items()}}
    row |= {f"{name}_min_us": min(t) * 1e6 for name, t in times.items()}
    row |= {"ratio": ratio, "ratio_25": low, "ratio_75": high, "ratio_min": row["peer_min_us"] / row["ours_min_us"]}
    row |= {"adapter_cost": _spread(times["ours"], times["bare"])[1] - 1, "adapter_share": case.adapter_share}
    return row | {"gops": 2e-3 * case.m * case.n * case.k / row["ours_us"], "turns": len(times["ours"])}


def compare(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    ms: Sequence[int] = MS,
    threads: Sequence[int] = (1, 2),
    rank: int = 16,
    formats: Sequence[str] = ("i4b32",),
    seconds: float = 1.0,
) -> list[dict[str, Any]]:
    """Measure every combination; `shapes` are (K, N). Returns one dict per row (see `measure`)."""
    cases = [Case(f, m, k, n, rank, t) for f in formats for t in threads for m in ms for k, n in shapes]
    return [measure(case, seconds) for case in cases]


COLUMNS = (
    "format", "threads", "M", "K", "N", "ours_us", "peer_us", "peer/ours", "quartiles", "adapter_cost", "adapter_bytes",
    "ours_GOPS",
)  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: median microseconds, median ratio of paired turns and its quartiles."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [
            row["format"],
            row["threads"],
            row["m"],
            row["k"],
            row["n"],
            f"{row['ours_us']:.1f}",
            f"{row['peer_us']:.1f}",
        ]
        cells += [f"{row['ratio']:.2f}", f"{row['ratio_25']:.2f}-{row['ratio_75']:.2f}"]
        cells += [f"{row['adapter_cost']:+.1%}", f"{row['adapter_share']:.1%}", f"{row['gops']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m edgepeft.bench.ops --threads 1 2 --ms 1 128 --json rows.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[f"{k}x{n}" for k, n in SHAPES], metavar="KxN")
    parser.add_argument("--ms", nargs="+", type=int, default=list(MS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rank", "-R", type=int, default=16)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["i4b32"])
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    shapes = [(int(k), int(n)) for k, n in (text.split("x") for text in args.shapes)]
    rows = compare(shapes, args.ms, args.threads, args.rank, args.formats, args.seconds)
    publish(markdown(rows), rows, args.json)


if __name__ == "__main__":
    main()
