"""Exported tiny decoders, made without training: packed weights, random adapters, the graph, and the PyTorch model."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from builders import tiny_decoder

from edgepeft.adapt import peft_files
from edgepeft.artifact import Run
from edgepeft.backbone.decoder import Decoder, describe
from edgepeft.backbone.families import family_of
from edgepeft.config import Config
from edgepeft.export import decoder
from edgepeft.export.emitter import ADAPTER_FILE, AdapterFile, Weights

CONTEXT, RANK = 64, 4
Feeds = Mapping[str, np.ndarray]


def random_adapter(quantized: Path, out: Path, rank: int = RANK, seed: int = 0) -> Path:
    """Write the device form of an adapter whose every tensor is random, on all linears, below `out`; return its folder.

    Alpha is twice the rank, as trained ones have it.
    """
    about = json.loads((quantized / "quantized.json").read_text())
    rng, tensors = np.random.default_rng(seed), {}
    linears = {part["name"]: part["shape"] for part in about["layers"] + about["kept"] if part["kind"] == "linear"}
    for module, (n, k) in linears.items():
        name = f"base_model.model.{module}.lora_"
        tensors[f"{name}A.weight"] = rng.standard_normal((rank, k), np.float32) / np.float32(np.sqrt(k))
        tensors[f"{name}B.weight"] = rng.standard_normal((n, rank), np.float32) * np.float32(0.1)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "base_model_name_or_path": "tiny", "target_modules": sorted(linears),
    }  # fmt: skip
    peft_files.write(out / "trained", settings, tensors, about["base_digest"], about["format"])
    peft_files.write_device(out / "device", out / "trained")
    return out / "device"


@dataclasses.dataclass
class Exported:
    """One exported decoder. adapter: the device form of the one in it, None for a model without."""

    config: Config
    run: Run
    adapter: Path | None
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The exported folder."""
        return self.run.path("export")

    @property
    def about(self) -> Decoder:
        """What config.json says."""
        return describe(self.settings)

    def torch_model(self, adapter: Path | None) -> Any:
        """The packed model in PyTorch, with an adapter as PEFT loads it."""
        from peft import PeftModel

        from edgepeft.backbone.load import quantized_model

        model = quantized_model(self.run.path("quantized"), [], self.config)
        return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()

    @functools.cached_property
    def torch(self) -> Any:
        """The PyTorch model with the exported adapter."""
        return self.torch_model(self.adapter)

    @functools.cached_property
    def base(self) -> Any:
        """The PyTorch model without any."""
        return self.torch_model(None)


def export_decoder(
    folder: Path, kind: str, tag: str = "i4b32", embedding: str = "i4b32", adapter: bool = True, context: int = CONTEXT,
    **changes: Any,
) -> Exported:  # fmt: skip
    """Build one of builders.DECODERS up to its exported folder; `changes` go to its configuration."""
    from edgepeft.quant.stage import quantize

    model = tiny_decoder(folder / "model", kind, **changes)
    config = Config(
        model=str(model), data="none.jsonl", output=str(folder / "run"), task="text-generation", format=tag,
        embedding_format=embedding, threads=1,
    )  # fmt: skip
    run = Run(folder / "run")
    run.make("quantized", "", lambda out: quantize(config, run, out))
    made = random_adapter(run.path("quantized"), folder / "adapter") if adapter else None
    settings = json.loads((model / "config.json").read_text())
    run.make("export", "", lambda out: write_graph(run, out, made, settings, context))
    return Exported(config, run, made, settings)


def write_graph(run: Run, out: Path, adapter: Path | None, settings: dict[str, Any], context: int) -> dict[str, Any]:
    """Write the graph of a run's packed weights, and the adapter beside it."""
    file = AdapterFile.read(None)
    if adapter is not None:
        place = out / ADAPTER_FILE
        place.parent.mkdir(parents=True)
        place.write_bytes((adapter / place.name).read_bytes())
        file = AdapterFile.read(place)
    weights = Weights(run.path("quantized"))
    decoder.build(family_of(settings, "tiny"), settings, weights, file, "float", context).save(out)
    return {}


class Stepper:
    """A graph in ONNX Runtime, run step by step on buffers of keys and values that past and present share."""

    def __init__(self, exported: Exported, library: Path | None = None, capacity: int = CONTEXT) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if library is not None:
            options.register_custom_ops_library(str(library))
        path = str(exported.folder / "model.onnx")
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.about, self.capacity = exported.about, capacity

    def shapes(self) -> dict[str, Any]:
        """The overridable inputs."""
        return {item.name: item.shape for item in self.session.get_overridable_initializers()}

    def start(self, rows: int = 1) -> None:
        """Take new buffers, filled with what no attention may see."""
        shape = (rows, self.about.kv_heads, self.capacity, self.about.head_dim)
        self.buffers = {
            f"{i}.{part}": ort.OrtValue.ortvalue_from_numpy(np.full(shape, np.nan, np.float32))
            for i in range(self.about.layers)
            for part in ("key", "value")
        }
        self.counts = np.zeros(rows, np.int64)

    def step(self, ids: np.ndarray, lengths: Any = None, feeds: Feeds | None = None) -> np.ndarray:
        """Run ids [rows, tokens], of which a row's first `lengths` are real; return the logits."""
        self.counts = self.counts + (ids.shape[1] if lengths is None else np.array(lengths))
        total = max(self.counts.max(), ids.shape[1])
        mask = (np.arange(total)[None] < self.counts[:, None]).astype(np.int64)
        binding = self.session.io_binding()
        for name, array in {"input_ids": ids, "attention_mask": mask, **(feeds or {})}.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))  # the only way for a default's
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()

    def whole(self, ids: np.ndarray, feeds: Feeds | None = None) -> np.ndarray:
        """Return the logits of every token of ids [rows, tokens], all computed at once."""
        self.start(len(ids))
        return self.step(ids, feeds={"logits_to_keep": np.array([ids.shape[1]]), **(feeds or {})})
