"""Counts the instructions of a whole generated token on emulated ARM CPUs, beside the programs that do the same there.

    edgepeft   a shape's bundle with our library
    stock      the same file without it: the functions' bodies, which are ONNX Runtime's own operators
    genai      the graph of ONNX Runtime GenAI's builder (MatMulNBits), where `bench.shapes --peers` has made it
    llama      llama.cpp, Q4_0, where --llama names a guest program for the CPU, see kernels/emulation/llama_token.cc

Each with the adapter on and off, one thread, one token behind PAST others, between two marks (see
kernels/emulation/count.cc). Keys and values go in and out of ONNX Runtime's session by copy, for all of it alike; the
call's own Python is part of the count. Counts repeat and say nothing of cache misses. `--layers` takes a shape with
fewer layers of the same widths, for a try.

    python -m edgepeft.bench.token_instructions smollm2-135m --cpus cortex-a72 cortex-a76
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepeft.bench.report import publish
from edgepeft.deploy.emulator import MARK, NEWEST, SAFE, Emulator, available, marked, missing
from edgepeft.errors import EdgePeftError, TargetError, unknown

# The release that a board of that kind can run: newer ones have been seen to die on cores without dot products.
RELEASES = {"cortex-a53": SAFE, "cortex-a72": SAFE}
CPUS = ("cortex-a72", "cortex-a76")
PAST, TOKENS = 16, 2
TIMEOUT_S = 3600

GUEST = """
import json, os, sys
import numpy, onnxruntime
about = json.loads(sys.argv[1])
def here(number):
    try:
        os.getpgid(about["mark"] + number)
    except ProcessLookupError:
        pass
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
if about["library"]:
    options.register_custom_ops_library(about["library"])
session = onnxruntime.InferenceSession(
    about["model"], options, providers=["CPUExecutionProvider"],
    disabled_optimizers=["FuseFp16InitializerToFp32NodeTransformer"])
types = {"tensor(float)": numpy.float32, "tensor(float16)": numpy.float16, "tensor(int64)": numpy.int64}
def array(item, sizes):
    shape = [size if isinstance(size, int) else sizes(place) for place, size in enumerate(item.shape)]
    return numpy.full(shape, 0.01, types[item.type])
feeds = {}
for item in session.get_inputs():
    if item.name.startswith("past_key_values"):
        feeds[item.name] = array(item, lambda place: [1, None, about["past"], about["head_dim"]][place])
feeds["input_ids"] = numpy.array([[7]], numpy.int64)
feeds["attention_mask"] = numpy.ones((1, about["past"] + 1), numpy.int64)
lora = [item for item in session.get_overridable_initializers() if "lora_" in item.name]
for number, adapter in enumerate((True, False)):
    given = {item.name: array(item, lambda place: about["rank"] if adapter else 0) for item in lora}
    call = lambda: session.run(["logits"], {**feeds, **given})[0]
    logits = [call() for _ in range(2)][0]
    if not numpy.isfinite(logits).all():
        raise SystemExit("logits are not finite")
    here(2 * number)
    for _ in range(about["tokens"]):
        call()
    here(2 * number + 1)
"""


def _session_counts(emulator: Emulator, cpu: str, about: Mapping[str, Any], release: str) -> dict[str, int]:
    """Return the instructions of a token of an ONNX model with the adapter on and off."""
    argv = ["-c", GUEST, json.dumps(about)]
    options = emulator.count_options()
    done = emulator.python(cpu, argv, onnxruntime=release, options=options, timeout_s=TIMEOUT_S)
    marks = marked(done)
    return {name: (marks[2 * i + 1] - marks[2 * i]) // about["tokens"] for i, name in enumerate(("on", "off"))}


def _llama_counts(emulator: Emulator, cpu: str, program: Path, files: Path) -> dict[str, int]:
    """Return the same of llama.cpp, by a guest program."""
    found = {}
    for name, adapter in (("on", [str(files / "lora-f16.gguf")]), ("off", [])):
        argv = [str(program), str(files / "q4_0.gguf"), str(PAST), str(TOKENS), str(MARK), *adapter]
        marks = marked(emulator.run(cpu, argv, timeout_s=TIMEOUT_S, options=emulator.count_options()))
        found[name] = (marks[1] - marks[0]) // TOKENS
    return found


def count(
    emulator: Emulator, cpu: str, bundle: Path, peers: Mapping[str, Path], rank: int, llama: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a row for each program: instructions of a token with the adapter on and off.

    peers: {"genai" or "llama": the folder of its files}. Raises TargetError when a guest fails.
    """
    from edgepeft.artifact import read_json
    from edgepeft.deploy.compile import cross_library

    head_dim, release = read_json(bundle / "manifest.json")["decoder"]["head_dim"], RELEASES.get(cpu, NEWEST)
    with tempfile.TemporaryDirectory() as name:
        library = str(cross_library("linux-aarch64", Path(name) / "libedgepeft_ops.so"))
        about = {"mark": MARK, "past": PAST, "tokens": TOKENS, "rank": rank, "head_dim": head_dim}
        models = {
            "edgepeft": (bundle / "model.onnx", library, release), "stock": (bundle / "model.onnx", "", release),
        }  # fmt: skip
        if "genai" in peers:
            models["genai"] = (peers["genai"] / "adapted" / "model.onnx", "", NEWEST)  # its opset is 22
        for who, (model, lib, runtime) in models.items():
            asked = {**about, "model": str(model), "library": lib}
            yield _row(cpu, who, f"onnxruntime {runtime}", _session_counts(emulator, cpu, asked, runtime))
    if llama and "llama" in peers:
        yield _row(cpu, "llama", "llama.cpp", _llama_counts(emulator, cpu, llama, peers["llama"]))


def _row(cpu: str, who: str, by: str, found: Mapping[str, int]) -> dict[str, Any]:
    cost = round(100 * (found["on"] / found["off"] - 1), 1)
    return {"cpu": cpu, "who": who, "by": by, "adapter on": found["on"], "off": found["off"], "adapter %": cost}


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print the table; exit with 1 or more when there is no emulator or a guest fails."""
    from edgepeft.artifact import cache_dir
    from edgepeft.bench import shapes
    from edgepeft.console import say, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help=f"of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--cpus", nargs="+", default=list(CPUS))
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument(
        "--llama", action="append", default=[], metavar="CPU=PROGRAM", help="guest programs of llama.cpp"
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    if args.shape not in shapes.SHAPES:
        parser.error(unknown("shape", args.shape, shapes.SHAPES))
    name = args.shape
    if args.layers:
        name = f"{args.shape}-{args.layers}"
        shapes.SHAPES[name] = {**shapes.SHAPES[args.shape], "num_hidden_layers": args.layers}
    places = {peer: cache_dir() / "shapes" / f"{name}-{peer}" for peer in shapes.PEERS}
    peers = {peer: place for peer, place in places.items() if (place / ".complete").exists()}
    programs = dict(word.split("=", 1) for word in args.llama)
    rows: list[dict[str, Any]] = []
    try:
        emulator = available()
        if emulator is None:
            raise TargetError(f"no emulator: {missing()}")
        bundle = shapes.bundle(name)
        for cpu in args.cpus:
            llama = Path(programs[cpu]) if cpu in programs else None
            for row in count(emulator, cpu, bundle, peers, shapes.RANK, llama):
                say(json.dumps(row))
                rows.append(row)
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    publish(table(rows), rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
