"""Shaders that a page's runs dispatch, counted at WebGPU itself, on a GPU that grants a shader fewer buffers."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from edgepeft.artifact import read_json
from edgepeft.bench.gpu_graphs import naive
from tests.deploy.chromium import Page
from tests.runtime import writer

# Run in a page before its own scripts: `dispatched` then holds a number for the pipeline of each dispatch.
COUNTING = """(() => {
  const pass = GPUComputePassEncoder.prototype, seen = new Map();
  const { setPipeline, dispatchWorkgroups, dispatchWorkgroupsIndirect } = pass;
  let current;
  window.dispatched = [];
  pass.setPipeline = function (pipeline) {
    if (!seen.has(pipeline)) seen.set(pipeline, seen.size);
    current = seen.get(pipeline);
    return setPipeline.call(this, pipeline);
  };
  const counted = (dispatch) => function (...sizes) {
    dispatched.push(current);
    return dispatch.apply(this, sizes);
  };
  pass.dispatchWorkgroups = counted(dispatchWorkgroups);
  pass.dispatchWorkgroupsIndirect = counted(dispatchWorkgroupsIndirect);
})();"""
GRANTING = """(() => {
  const { requestDevice } = GPUAdapter.prototype;
  GPUAdapter.prototype.requestDevice = function (about) {
    about.requiredLimits.maxStorageBuffersPerShaderStage = %d;
    return requestDevice.call(this, about);
  };
})();"""
BUFFERS = "model.engine.gpu.limits.maxStorageBuffersPerShaderStage"


def per_layer(page: Page) -> int:
    """Return the dispatches of a decoder layer in one token's run: how far apart most pipelines of each layer are."""
    one = "model.logits([5]).then(() => 0)"
    page.run(f"{one}.then(() => {{ dispatched.length = 0 }}).then(() => {one})")
    found = page.run("dispatched")
    twice = [place for place in set(found) if found.count(place) == 2]  # once in each of two layers
    apart = Counter(len(found) - 1 - found[::-1].index(place) - found.index(place) for place in twice)
    (distance, times), *_ = apart.most_common()
    assert times > 2
    return distance


def with_graph(bundle: Path, folder: Path, which: str) -> Path:
    """Copy a language model's bundle with another graph for GPUs, to compare with or the CPU's; return the folder."""
    shutil.copytree(bundle, folder)
    if which == "cpu":
        shutil.copy(folder / "model.onnx", folder / "model.webgpu.onnx")
    else:
        naive(folder, folder, adapter=which == "naive")
    about = read_json(folder / "manifest.json")
    writer.reseal(folder, **{key: about[key] for key in ("context", "decoder", "base_digest", "format", "activation")})
    return folder
