"""Bundles with a page, of seeded small models, and the server that gives them to a browser."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
from builders import LABELS

from edgepeft.adapt import peft_files
from edgepeft.artifact import tensor_header, write_json, write_tensors
from edgepeft.backbone.decoder import Decoder
from edgepeft.deploy import serve, web
from edgepeft.export import webgpu as export
from tests.export import tiny_decoder, tiny_run
from tests.runtime import standin, writer

CONTEXT, BEFORE = 200, 7  # tokens; columns of the adapter that stands before the text


class Served:
    """A bundle with a page, and its address while it is served."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._start(0)

    def _start(self, port: int) -> None:
        self._server = serve.server(self.folder, port)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://{serve.HOST}:{self.port}/"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def again(self) -> None:
        self._start(self.port)


def _sealed(folder: Path, kind: str, exported: Path, quantized: Path) -> Path:
    """Make a bundle with a page of an exported folder, with a second adapter of another rank."""
    export.write(exported)
    shutil.copytree(exported, folder)
    about = json.loads((quantized / "quantized.json").read_text())
    same = {"base_digest": about["base_digest"], "format": about["format"], "activation": "float"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (quantized / name).exists():
            shutil.copy(quantized / name, folder)
    web.write(folder)
    seal = standin.reseal if kind == "classifier" else writer.reseal
    seal(
        folder, **same, **({"labels": list(LABELS), "max_length": 48} if kind == "classifier" else {"context": CONTEXT})
    )
    return folder


def _classifier(place: Path) -> Path:
    config, run = tiny_run.make_run(place)
    exported = tiny_run.export_run(config, run)
    tiny_run.random_adapter(run, place / "trained", rank=6, seed=5)
    other = exported / "adapters" / "other"
    peft_files.write_device(other, place / "trained")
    write_json(other / "labels.json", list(LABELS))
    return _sealed(place / "bundle", "classifier", exported, run.path("quantized"))


def _writer(place: Path) -> Path:
    exported = tiny_decoder.export_decoder(place, "llama", "i4b32", context=CONTEXT)
    other = tiny_decoder.random_adapter(exported.run.path("quantized"), place / "second", rank=6, seed=5)
    shutil.copytree(other, exported.folder / "adapters" / "other")
    default = exported.folder / "adapters" / "default"
    shutil.copy(exported.adapter / "adapter_config.json", default)
    _before(exported.folder / "adapters" / "before", default, exported.about)
    return _sealed(place / "bundle", "writer", exported.folder, exported.run.path("quantized"))


def _before(folder: Path, other: Path, about: Decoder) -> None:
    """Write an adapter of keys and values that stand before the text."""
    rng, shape = np.random.default_rng(3), (1, about.kv_heads, BEFORE, about.head_dim)
    names = [f"past_key_values.{layer}.{part}" for layer in range(about.layers) for part in ("key", "value")]
    metadata = tensor_header(other / "adapter_model.safetensors")[1]
    folder.mkdir(parents=True)
    write_tensors(folder / "adapter_model.safetensors", {"prompt_embeddings": np.ones((1, 2), np.float32)}, metadata)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name in names}
    write_tensors(folder / "terms.safetensors", tensors, metadata)
    write_json(folder / "adapter_config.json", {"peft_type": "PREFIX_TUNING"})


MAKE = {"classifier": _classifier, "writer": _writer}
