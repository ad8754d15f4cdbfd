"""Counts the instructions of the fused op on emulated ARM CPUs, beside ONNX Runtime's MatMulNBits.

    ours   AdapterMatMul_<format>_g1, int8 activations, with a LoRA of rank R
    peer   MatMulNBits (4 bits, block 32, accuracy_level 4), without any adapter

Each model runs in one guest process per CPU between two marks (see kernels/emulation/count.cc); what a session's call
costs on its own, taken from a model of one Identity, is subtracted. Counts repeat from run to run, on any machine, and
say nothing of cache misses: they compare two kernels on one core, not a core with another.

    python -m edgepeft.bench.instructions
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.bench.report import publish
from edgepeft.deploy.emulator import MARK, NEWEST, Emulator, available, marked, missing
from edgepeft.errors import EdgePeftError, TargetError

CPUS = ("cortex-a72", "cortex-a76")
# The least that peer / ours must be: A72 has no dot products, so ONNX Runtime has no fast path for it.
BOUNDS = {"cortex-a53": 4.0, "cortex-a72": 4.0, "cortex-a76": 1.0}
REPEATS = 20

GUEST = """
import os, sys
import numpy, onnxruntime
folder, repeats, mark = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def here(number):
    try:
        os.getpgid(mark + number)
    except ProcessLookupError:
        pass
x = numpy.load(folder + "/x.npy")
for number, name in enumerate(sys.argv[4:]):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(folder + "/libedgepeft_ops.so")
    session = onnxruntime.InferenceSession(folder + "/" + name, options, providers=["CPUExecutionProvider"])
    y = [session.run(None, {"x": x})[0] for _ in range(3)][0]
    here(2 * number)
    for _ in range(repeats):
        session.run(None, {"x": x})
    here(2 * number + 1)
    numpy.save(folder + "/" + name + ".npy", y)
"""


def _identity(k: int) -> bytes:
    """Return a model that only hands x on."""
    from onnx import helper

    from edgepeft.bench.ops import _model

    return _model([helper.make_node("Identity", ["x"], ["y"])], {}, k, k)


def _write_models(folder: Path, formats: Sequence[str], m: int, k: int, n: int, rank: int) -> dict[str, np.ndarray]:
    """Write library, x and all models; returns the float32 result that each model must come near, by file name."""
    from edgepeft.bench.ops import Case, our_model, peer_model
    from edgepeft.deploy.compile import cross_library

    cross_library("linux-aarch64", folder / "libedgepeft_ops.so")
    rng = np.random.default_rng(0)
    x_mk, w_nk, a_rk, b_nr = (rng.standard_normal(s, dtype=np.float32) for s in ((m, k), (n, k), (rank, k), (n, rank)))
    np.save(folder / "x.npy", x_mk)
    base = x_mk @ w_nk.T
    models = {"idle": (_identity(k), x_mk), "peer": (peer_model(Case("i4b32", m, k, n, 0, 1), w_nk, a_rk, b_nr), base)}
    for name in formats:
        models[name] = our_model(Case(name, m, k, n, rank, 1), w_nk, a_rk, b_nr), base + x_mk @ a_rk.T @ b_nr.T
    for name, (model, _) in models.items():
        (folder / name).write_bytes(model)
    return {name: expected for name, (_, expected) in models.items()}


def _check(name: str, cpu: str, y_mn: np.ndarray, expected_mn: np.ndarray) -> None:
    """Raise EdgePeftError unless y is as near to float32 as 4-bit weights let it be."""
    error = float(np.linalg.norm(y_mn - expected_mn) / np.linalg.norm(expected_mn))
    if not error <= 0.2:
        raise EdgePeftError(f"{name} on {cpu}: expected within 0.2 of the float32 weights' result, found {error:.3g}.")


def count(
    emulator: Emulator,
    cpu: str,
    formats: Sequence[str] = ("i4b32",),
    shape: tuple[int, int, int] = (1, 1024, 1024),
    rank: int = 8,
    onnxruntime: str = NEWEST,
) -> list[dict[str, Any]]:
    """Count on one CPU; `shape` is (M, K, N). Returns a row per format: instructions per call of ours and of the peer.

    Raises EdgePeftError when a result is wrong, so that no wrong kernel is counted.
    """
    m, k, n = shape
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = _write_models(folder, formats, m, k, n, rank)
        argv = ["-c", GUEST, str(folder), str(REPEATS), str(MARK), *expected]
        marks = marked(emulator.python(cpu, argv, onnxruntime=onnxruntime, options=emulator.count_options()))
        for model, wanted in expected.items():
            _check(model, cpu, np.load(folder / f"{model}.npy"), wanted)
    calls = {model: (marks[2 * i + 1] - marks[2 * i]) // REPEATS for i, model in enumerate(expected)}
    peer = calls["peer"] - calls["idle"]
    row = {"cpu": cpu, "onnxruntime": onnxruntime, "M": m, "K": k, "N": n, "rank": rank}
    found = {form: calls[form] - calls["idle"] for form in formats}
    return [{**row, "format": f, "ours": ours, "peer": peer, "peer/ours": peer / ours} for f, ours in found.items()]


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for every i4b32 row at M = 1 that misses its bound."""
    return [
        f"{row['cpu']}: peer/ours is {row['peer/ours']:.2f}, at least {BOUNDS[row['cpu']]:g} was expected."
        for row in rows
        if row["format"] == "i4b32" and row["M"] == 1 and not row["peer/ours"] >= BOUNDS.get(row["cpu"], 0)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: prints the table; exits with 1 when a bound is missed or there is no emulator."""
    from edgepeft.console import table
    from edgepeft.quant.formats import FORMATS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpus", nargs="+", default=list(CPUS))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["i4b32"])
    parser.add_argument("--shape", nargs=3, type=int, default=[1, 1024, 1024], metavar=("M", "K", "N"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--onnxruntime", default=NEWEST, help="release of the peer")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    try:
        emulator = available()
        if emulator is None:
            raise TargetError(f"no emulator: {missing()}")
        shape = (args.shape[0], args.shape[1], args.shape[2])
        rows = [r for c in args.cpus for r in count(emulator, c, args.formats, shape, args.rank, args.onnxruntime)]
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    publish(table(rows), rows, args.json)
    for text in failures(rows):
        print(text, file=sys.stderr)
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
