"""ONNX Runtime GenAI as a measured process, and its files by its own builder: int4, block 32, accuracy level 4.

    python genai.py make '{"folder", "model", "adapter", "layers", "linears", "context"}'
    python genai.py run  '{"folder", "threads", "context"}'

    base/      without an adapter (the builder packs q, k and v)
    adapted/   with the LoRA branches; their matrices are graph inputs with empty defaults, and adapter.onnx_adapter
               fills them, which is how OgaAdapters swap

The builder holds a model in float32 more than once, so it is given two layers and the second is then repeated, with
weights of its own: a model of a billion weights is made in 5 GB.

model and adapter are folders as Hugging Face and PEFT read them. Both graphs compute logits of the last token alone.
Making needs torch, transformers, peft, onnx, onnx-ir and onnxruntime too.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

if not __package__:
    import protocol  # type: ignore[import-not-found, unused-ignore]  # beside it
else:
    from edgepeft.bench.peers import protocol

FILE = "adapter.onnx_adapter"
NAME = "lora"
BUILT = 2  # layers
OPTIONS = [f"num_hidden_layers={BUILT}", "accuracy_level=4", "block_size=32", "prune_lm_head=true"]


def make(about: dict[str, Any]) -> None:
    """Build what is missing in the folder: base/ and adapted/."""
    folder = Path(about["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        _deepen(_build(about, folder / "base", OPTIONS), about["layers"]).rename(folder / "base")
    if not (folder / "adapted").exists():
        nodes = ",".join(f"{_node(name)}/lora_{side}/MatMul" for name in about["linears"] for side in "AB")
        with_adapter = [*OPTIONS, f"adapter_path={about['adapter']}", f"nodes_to_exclude={nodes}"]
        constant = _deepen(_build(about, folder / "constant", with_adapter), about["layers"])
        _swappable(constant, folder / "adapted")
        shutil.rmtree(constant)


def _node(name: str) -> str:
    """Return the builder's name for a linear of a checkpoint: model.layers.0.self_attn.q_proj.weight."""
    _, _, layer, part, linear, *_ = name.split(".")
    return f"/model/layers.{layer}/{part.replace('self_attn', 'attn')}/{linear}"


def _build(about: dict[str, Any], out: Path, options: list[str]) -> Path:
    """Run the builder into a folder beside `out` and return it."""
    part, log = out.with_suffix(".part"), out.with_suffix(".log")
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", about["model"], "-o", str(part)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(out.parent / "cache"), "--extra_options", *options]
    with open(log, "w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=stream, check=False).returncode
    if code:
        raise SystemExit(f"GenAI's builder failed ({code}):\n{log.read_text()[-2000:]}")
    log.unlink()
    config = json.loads((part / "genai_config.json").read_text())
    config["search"]["max_length"] = about["context"]
    (part / "genai_config.json").write_text(json.dumps(config))
    return part


def _deepen(folder: Path, layers: int) -> Path:
    """Repeat the last of the layers that were built until there are as many as asked for; return the folder."""
    import onnx

    model = onnx.load(str(folder / "model.onnx"))
    for items in (
        model.graph.node,
        model.graph.initializer,
        model.graph.value_info,
        model.graph.input,
        model.graph.output,
    ):
        plain = list(items)
        del items[:]
        for item in plain:
            place = _layer(item.name)
            copies = range(layers - BUILT + 1) if place == BUILT - 1 else [0 if place == 0 else layers - BUILT]
            items.extend(_shifted(item, by) for by in copies)
    (folder / "model.onnx.data").unlink()
    onnx.save(model, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["num_hidden_layers"] = layers
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


LAYER = re.compile(r"(layers|past_key_values|present)\.(\d+)")


def _layer(name: str) -> int:
    """Return the layer that a name of the graph speaks of, -1 where it is none."""
    found = LAYER.search(name)
    return int(found[2]) if found else -1


def _shifted(item: Any, by: int) -> Any:
    """Return a copy of a node, tensor or value that speaks of layers further up. Layer 0 feeds the second alone."""
    copy = type(item)()
    copy.CopyFrom(item)
    for field in ("input", "output"):
        if hasattr(copy, field):
            names = [_up(name, by) for name in getattr(copy, field)]
            del getattr(copy, field)[:]
            getattr(copy, field).extend(names)
    copy.name = _up(copy.name, by)
    return copy


def _up(name: str, by: int) -> str:
    return LAYER.sub(lambda found: f"{found[1]}.{int(found[2]) + by}", name)


def _swappable(constant: Path, out: Path) -> None:
    """Write a built graph anew with the matrices of its adapter as inputs, and these into an adapter file."""
    import onnx
    import onnxruntime

    part = out.with_suffix(".writing")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(constant, part, ignore=shutil.ignore_patterns("model.onnx*"))
    model = onnx.load(str(constant / "model.onnx"))
    values = {}
    for tensor in model.graph.initializer:
        if "lora_" in tensor.name:
            values[tensor.name] = onnx.numpy_helper.to_array(tensor).copy()
            _to_input(model.graph, tensor, values[tensor.name])
    onnx.save(model, str(part / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    adapter.export_adapter(str(part / FILE))
    part.rename(out)


def _to_input(graph: Any, tensor: Any, value: Any) -> None:
    """Declare a constant an input of any rank, whose default is rank 0."""
    import onnx

    side = 1 if "lora_A" in tensor.name else 0  # x A [K, R], then B [R, N]
    sizes: list[Any] = list(value.shape)
    sizes[side] = "lora_r"
    graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, sizes))
    tensor.CopyFrom(onnx.numpy_helper.from_array(value[:, :0] if side else value[:0], tensor.name))


class Text:
    """A generator of one sequence."""

    def __init__(self, package: Any, model: Any, adapters: Any, context: int) -> None:
        self._package, self._model, self._adapters, self._context = package, model, adapters, context
        self._begin()

    def _begin(self) -> None:
        asked = self._package.GeneratorParams(self._model)
        asked.set_search_options(
            max_length=self._context, min_length=self._context - 1, do_sample=False, past_present_share_buffer=True
        )
        self._generator = self._package.Generator(self._model, asked)
        if self._adapters is not None:
            self._generator.set_active_adapter(self._adapters, NAME)
        self.length = 0

    def read(self, ids: list[int]) -> None:
        """Read tokens; GenAI runs the model when they are appended."""
        import numpy as np

        self._generator.append_tokens(np.array([ids], np.int32))
        self.length += len(ids)

    def back(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length:
            self._generator.rewind_to(length)
            self.length = length
        else:
            self._begin()


class Engine:
    """The graph with the adapter; the one without is loaded when it is asked for."""

    def __init__(self, package: Any, about: dict[str, Any]) -> None:
        self._package, self._about, self._folder = package, about, Path(about["folder"])
        self._model = self._load("adapted")
        self._adapters = package.Adapters(self._model)
        self._adapters.load(str(self._folder / "adapted" / FILE), NAME)
        self.version = package.__version__
        config = json.loads((self._folder / "adapted" / "genai_config.json").read_text())
        self.vocabulary = config["model"]["vocab_size"]

    def _load(self, kind: str) -> Any:
        config = self._package.Config(str(self._folder / kind))
        threads = {"intra_op_num_threads": self._about["threads"], "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        return self._package.Model(config)

    def open(self, adapter: bool) -> Text:
        """Return an empty text."""
        if adapter:
            return Text(self._package, self._model, self._adapters, self._about["context"])
        return Text(self._package, self._load("base"), None, self._about["context"])


def run(about: dict[str, Any]) -> None:
    """Serve."""
    import onnxruntime_genai

    protocol.serve(lambda: Engine(onnxruntime_genai, about))


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](json.loads(sys.argv[2]))
