"""Peak and anonymous memory, and start-up times, each taken in a fresh process that does one thing.

    what      the process
    bare      imports ONNX Runtime and makes a session of a one-node model
    tokenizer the runtime and a bundle's tokenizer on top of that, no model
    model     loads a bundle, answers a text, then RUNS times one row of TOKENS tokens, or writes RUNS tokens; given a
              model file it takes that in the place of the bundle's, and no library (the float32 peer)

VmHWM is the peak of resident memory, files mapped and read included; RssAnon is what cannot be given back under
pressure. Both are reported above the bare process, in whose figure Python, numpy and ONNX Runtime stand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgepeft.errors import EdgePeftError

RUNS = 20
TEXT = "turn the kitchen lights off"
TOKENS = 32
# y = Identity(x), float32 [1], opset 13
TINY_MODEL = bytes.fromhex(
    "080812003a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a"
    "02080142040a00100d"
)


def resident_bytes() -> dict[str, int]:
    """Return this process's peak and anonymous memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith("kB")}
    return {"peak_bytes": found["VmHWM"], "anonymous_bytes": found["RssAnon"]}


def measure(what: str, bundle: str = "", threads: int = 1, model: str = "") -> dict[str, Any]:
    """Return the figures of a fresh process. Raises EdgePeftError with its words when it fails."""
    command = [sys.executable, "-m", "edgepeft.bench.memory", what, bundle, str(threads), model]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    if done.returncode:
        raise EdgePeftError(f"the process that measures {what!r} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _bare() -> dict[str, Any]:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(TINY_MODEL, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones(1, np.float32)})
    return {}


def _tokenizer(folder: str) -> dict[str, Any]:
    """Import and check as a bundle's process does, and load its tokenizer, but no model."""
    from edgepeft.runtime.manifest import check_bundle
    from edgepeft.runtime.tokens import Tokens

    manifest = check_bundle(folder)
    longest = manifest["max_length"] if manifest["task"] == "text-classification" else None
    kept = Tokens(manifest.folder / "tokenizer.json", longest)
    return {**_bare(), "vocabulary": kept.vocabulary}


def _bundle(folder: str, threads: int, model_file: str) -> dict[str, Any]:
    """Load and answer as `edgepeft run` does, or with another model file in the bundle's place."""
    started = time.perf_counter()
    import onnxruntime

    imported = time.perf_counter()
    from edgepeft.runtime import load

    model: Any = _peer(folder, model_file, threads) if model_file else load(folder, threads)
    loaded = time.perf_counter()
    if hasattr(model, "classify"):
        model.classify(TEXT)
        answered = time.perf_counter()
        arrays = rows(model, 1, TOKENS)
        for _ in range(RUNS):
            model.run(arrays)
    else:
        model.generate(TEXT, max_new_tokens=1)
        answered = time.perf_counter()
        model.generate(TEXT, max_new_tokens=RUNS)
    return {
        "import_ms": 1000 * (imported - started),
        "load_ms": 1000 * (loaded - imported),
        "first_answer_ms": 1000 * (answered - loaded),
        "onnxruntime": onnxruntime.__version__,
    }


def _peer(folder: str, model_file: str, threads: int) -> Any:
    from edgepeft.bench.peer import load_peer

    return load_peer(folder, model_file, threads)


def rows(model: Any, batch: int, length: int) -> dict[str, Any]:
    """Return arrays of `batch` rows of `length` scattered tokens, all of them real (numpy.random is 3 MB to import)."""
    import numpy as np

    ids = np.arange(batch * length, dtype=np.int64).reshape(batch, length) * 7919 % model.tokens.vocabulary
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


if __name__ == "__main__":
    kind, folder, threads, model_file = sys.argv[1:]
    if kind == "model":
        figures = _bundle(folder, int(threads), model_file)
    else:
        figures = _tokenizer(folder) if kind == "tokenizer" else _bare()
    print(json.dumps({**figures, **resident_bytes()}))
