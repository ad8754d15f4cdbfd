"""What tests of either GPU need: the CPU's session of an exported folder, a language model's feeds, a sealed bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from builders import LABELS

from edgepeft.runtime.library import platform_tag
from tests.runtime import standin, writer


def stock_session(folder: Path):
    """Return stock ONNX Runtime's session of a folder's graph."""
    import onnxruntime

    off = ["FuseFp16InitializerToFp32NodeTransformer"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path = str(folder / "model.onnx")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=off)


def writing(session, new: int, past: int, keep: int) -> dict[str, np.ndarray]:
    """Return a language model's feeds for `new` tokens behind a random past."""
    rng = np.random.default_rng(new)
    feeds = {"input_ids": rng.integers(5, 200, (1, new)), "attention_mask": np.ones((1, new + past), np.int64)}
    for item in session.get_inputs():
        if item.name.startswith("past_key_values"):
            feeds[item.name] = rng.normal(size=(1, item.shape[1], past, item.shape[3])).astype(np.float32)
    return {**feeds, "logits_to_keep": np.array([keep], np.int64)}


def sealed_bundle(exported_folder: Path, bundle: Path, kind: str, provider: Path | None = None) -> Path:
    """Make a bundle of an exported folder, with a library for Vulkan if one is given."""
    quantized = exported_folder.parent / "quantized"
    about = json.loads((quantized / "quantized.json").read_text())
    shutil.copytree(exported_folder, bundle)
    if provider:
        place = bundle / "lib" / platform_tag()
        place.mkdir(parents=True)
        shutil.copy(provider, place)
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(quantized / name, bundle)
    same = {"base_digest": about["base_digest"], "format": about["format"], "activation": "float"}
    if kind == "bert":
        standin.reseal(bundle, labels=list(LABELS), max_length=60, **same)
    else:
        settings = exported_folder.parents[1] / "adapter" / "device" / "adapter_config.json"
        shutil.copy(settings, bundle / "adapters" / "default")
        size = json.loads((quantized / "config.json").read_text()).get("head_dim") or writer.HEAD_DIM
        writer.reseal(bundle, context=64, decoder={"head_dim": size}, **same)
    return bundle
