"""Bundles with a page, of seeded small models, and the server that gives them to a browser."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from builders import LABELS

from edgepeft.adapt import peft_files
from edgepeft.artifact import tensor_header, write_json, write_tensors
from edgepeft.backbone.decoder import Decoder
from edgepeft.deploy import serve, web
from edgepeft.export import webgpu as export
from tests.adapt.conformance import SIZE, Subject
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
        self._connections: list[socket.socket] = []
        accept = self._server.get_request

        def get_request() -> tuple[socket.socket, Any]:
            connection, address = accept()
            self._connections.append(connection)
            return connection, address

        self._server.get_request = get_request  # type: ignore[method-assign]  # to keep the connections
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://{serve.HOST}:{self.port}/"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:  # which browsers keep open, and would go on to be answered
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def again(self) -> None:
        self._start(self.port)


def _sealed(folder: Path, seal: Callable[..., None], exported: Path, quantized: Path, **about_it: Any) -> Path:
    """Make a bundle with a page of an exported folder, with a second adapter of another rank."""
    export.write(exported)
    shutil.copytree(exported, folder)
    about = json.loads((quantized / "quantized.json").read_text())
    same = {"base_digest": about["base_digest"], "format": about["format"], "activation": "float"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (quantized / name).exists():
            shutil.copy(quantized / name, folder)
    web.write(folder)
    seal(folder, **same, **about_it)
    return folder


def _classifier(place: Path) -> Path:
    config, run = tiny_run.make_run(place, activation="float")  # as the manifest says
    exported = tiny_run.export_run(config, run)
    tiny_run.random_adapter(run, place / "trained", rank=6, seed=5)
    other = exported / "adapters" / "other"
    peft_files.write_device(other, place / "trained")
    write_json(other / "labels.json", list(LABELS))
    labels = {"labels": list(LABELS), "max_length": 48}
    return _sealed(place / "bundle", standin.reseal, exported, run.path("quantized"), **labels)


def _writer(place: Path, family: str = "llama", tag: str = "i4b32", **settings: Any) -> Path:
    exported = tiny_decoder.export_decoder(place, family, tag, context=CONTEXT, **settings)
    other = tiny_decoder.random_adapter(exported.run.path("quantized"), place / "second", rank=6, seed=5)
    shutil.copytree(other, exported.folder / "adapters" / "other")
    default = exported.folder / "adapters" / "default"
    shutil.copy(exported.adapter / "adapter_config.json", default)
    _before(exported.folder / "adapters" / "before", default, exported.about)
    sizes = {"context": CONTEXT, "decoder": {"head_dim": exported.about.head_dim}}
    return _sealed(place / "bundle", writer.reseal, exported.folder, exported.run.path("quantized"), **sizes)


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


def _beside(place: Path, method: str) -> Path:
    """A language model whose adapter has what stands beside its linears."""
    subject = Subject(place, "llama")
    exported, quantized = subject.export(subject.made(method)), subject.run.path("quantized")
    shutil.copy(quantized / "tokenizer.json", exported)
    sizes = {"context": 64, "decoder": {"head_dim": SIZE // subject.settings["num_attention_heads"]}}
    return _sealed(place / "bundle", writer.reseal, exported, quantized, **sizes)


def _behind(place: Path, method: str) -> Path:
    """A classifier whose adapter stands before the text."""
    subject = Subject(place, "bert")
    exported, quantized = subject.export(subject.made(method)), subject.run.path("quantized")
    sizes = {"labels": subject.labels, "max_length": 40, "positions": 64}
    return _sealed(place / "bundle", standin.reseal, exported, quantized, **sizes)


MAKE = {
    "classifier": _classifier,
    "writer": _writer,
    "nf4": functools.partial(_writer, tag="nf4b64"),
    **{name: functools.partial(_beside, method=name) for name in ("experts", "houlsby")},
    **{name: functools.partial(_behind, method=name) for name in ("prompt", "prefix")},
    "capped": functools.partial(_writer, family="gemma2", attn_logit_softcapping=0.5),
}
