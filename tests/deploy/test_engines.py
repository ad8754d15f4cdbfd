"""One file and one bundle through every engine: functions and library of the CPU, WebGPU, a browser, and Vulkan."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edgepeft.deploy.compile import host_library, host_vulkan_library
from edgepeft.export import ops
from edgepeft.quant.formats import FORMATS
from edgepeft.runtime import load, vulkan, webgpu
from tests.kernels.test_ort_op import agree, inputs
from tests.kernels.test_vulkan import linear

TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order
DIGITS_TOLERANCE = 5e-3  # where adapters, here as strong as the base, come in 4-bit digits
K, ROWS, RANKS = 128, [32, 16], [3, 5]
ASKED = {"classifier": "play a JAZZ in the hall, please", "writer": "turn on the lamp in the attic"}
ENGINES: dict[str, Callable[[Path], Any]] = {
    "functions": lambda folder: load(folder, library="none"),
    "library": lambda folder: load(folder, library=host_library()),
    "webgpu": lambda folder: load(folder, device="webgpu"),
    "vulkan": lambda folder: load(folder, device="vulkan", library=host_vulkan_library()),
}
# Feeds are {name: [shape, numbers]}; outputs come back as lists.
IN_A_BROWSER = """(async (file, feeds) => {
  const { ort, gpu } = model.engine;
  const bytes = Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0));
  const session = await ort.InferenceSession.create(bytes, {
    executionProviders: [{ name: "webgpu", device: gpu }],
    extra: { session: { disable_cpu_ep_fallback: "1" } },
  });
  const tensor = ([shape, numbers]) => new ort.Tensor("float32", Float32Array.from(numbers), shape);
  const entries = Object.entries(feeds).map(([name, given]) => [name, tensor(given)]);
  const out = await session.run(Object.fromEntries(entries));
  return session.outputNames.map((name) => [...out[name].data]);
})(%s, %s)"""


def _session(model: bytes, device: Any = None, library: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library))
    if device:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_provider_for_devices([device], {})
    return ort.InferenceSession(model, options)


@pytest.mark.parametrize("format", FORMATS)
def test_one_file_computes_the_same_on_every_engine(gpu, pages, format: str) -> None:
    values = inputs(format, K, ROWS, (2,), RANKS, np.float32)
    fed = ["x", *(name for name in ops.input_names(len(ROWS)) if name.startswith(("a", "b")) and "bias" not in name)]
    names = ops.input_names(len(ROWS))
    feeds = {name: value for name, value in zip(names, values, strict=True) if name in fed}
    model = linear(format, K, ROWS, values, fed)
    sessions = {
        "functions": _session(model),
        "library": _session(model, library=host_library()),
        "webgpu": _session(model, device=webgpu._device()),
        "vulkan": vulkan.open_session(host_vulkan_library(), model),
    }
    found = {engine: session.run(None, feeds) for engine, session in sessions.items()}
    given = {name: [list(array.shape), array.ravel().tolist()] for name, array in feeds.items()}
    file = base64.b64encode(model).decode()
    page = pages("classifier", "webgpu")
    rows = page.run(IN_A_BROWSER % (json.dumps(file), json.dumps(given)))
    shapes = [y.shape for y in found["functions"]]
    found["browser"] = [np.array(row, np.float32).reshape(shape) for row, shape in zip(rows, shapes, strict=True)]
    for ys in found.values():
        agree(format, "float", ROWS, values, ys)


@pytest.mark.parametrize("kind", ASKED)
def test_one_bundle_answers_the_same_on_every_engine(gpu, bundles, pages, kind: str) -> None:
    folder, page = bundles(kind).folder, pages(kind, "webgpu")
    assert page.run("model.device") == "webgpu"
    models = {engine: make(folder) for engine, make in ENGINES.items()}
    assert models["library"].library is not None
    assert models["webgpu"].gpu
    assert models["vulkan"].memory is not None
    for adapter in ("default", "other", "none"):
        asked = [ASKED[kind]] if kind == "classifier" else models["functions"].encode(ASKED[kind])
        found = {engine: np.ravel(model.logits(asked, adapter)) for engine, model in models.items()}
        about = json.dumps({"adapter": adapter})
        text = json.dumps(ASKED[kind] if kind == "classifier" else asked)
        found["browser"] = np.array(page.run(f"model.logits({text}, {about}).then(row => [...row])"))
        wanted = found["functions"][-len(found["browser"]) :]
        for engine, row in found.items():
            in_digits = kind == "writer" and engine in ("webgpu", "browser") and adapter != "none"
            error = np.abs(row[-len(wanted) :] - wanted).max() / np.abs(wanted).max()
            assert error <= (DIGITS_TOLERANCE if in_digits else TOLERANCE), f"{engine}, {adapter}: {error}"
