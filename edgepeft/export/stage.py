"""The export stage: one folder that stock ONNX Runtime, our library, optimum and PEFT can each read.

    model.onnx  model.onnx.data          the graph, and the frozen weights as they were trained against
    adapters/default/                    PEFT folder, terms.safetensors where its tensors are others, labels.json
    adapters/base.safetensors            the base's own of the tensors that the adapter replaces, if it does
    config.json  tokenizer files         as Hugging Face has them, with this model's labels
    export.json                          what was written, with sizes; of a decoder, what running it takes

The graph's defaults are byte ranges of the adapter's own file, but for B, which lies turned in model.onnx.data. Every
linear has inputs for A and B, of rank 0 where the adapter has none, so that another adapter may adapt others. A merged
model has no adapters folder and no adapter inputs; its head is a constant. A decoder's context is --context, or what
the model has.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.adapt import choice, peft_files
from edgepeft.adapt.base import Base
from edgepeft.adapt.device import neutral_values
from edgepeft.adapt.merge import merged_heads
from edgepeft.adapt.terms import BASE_FILE, PREFIX
from edgepeft.artifact import Run, read_json, write_json, write_tensors
from edgepeft.backbone.families import FAMILIES, Family
from edgepeft.console import say
from edgepeft.deploy.targets import load_target
from edgepeft.errors import VerifyError
from edgepeft.export.ops import NAME, OPSET
from edgepeft.train.tasks import TASKS

if TYPE_CHECKING:
    from edgepeft.config import Config
    from edgepeft.export.emitter import AdapterFile, Weights
    from edgepeft.export.graph import Graph

OWN_FILES = {"weights.safetensors", "quantized.json", "config.json", "merge.json"}


def export(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Write the exported folder of a run and return its sizes in bytes and counts.

    Raises ModelError for a model that would not come out exactly, ArtifactError for an adapter of another base.
    """
    chosen, config = choice.record(config, run), choice.decided(config, run)
    training = read_json(run.path("adapter") / "training.json")
    weights = _weights(config, run)
    about = weights.about
    adapter = _adapter(config, run, out, weights, training)
    family = FAMILIES[about["family"]]
    settings = write_settings(run.path("quantized"), out, training["labels"], TASKS[config.task].auto_class, family)
    running = running_numbers(out, settings, config.context) if family.kind == "decoder" else {}
    graph = _graph(family, settings, weights, adapter, config.activation, running.get("context"))
    check(graph.save(out))
    if "webgpu" in (target := load_target(config.target)).gpu:
        from edgepeft.export import webgpu

        webgpu.write(out)
        webgpu.check_sizes(out, target.gpu_buffer_mib)
    summary = {**_summary(graph, out, config, about), **running, **chosen}
    write_json(out / "export.json", summary)
    _tell(summary)
    return summary


def _graph(
    family: Family, settings: Mapping[str, Any], weights: Weights, adapter: AdapterFile, activation: str,
    context: int | None,
) -> Graph:  # fmt: skip
    from edgepeft.export import decoder, encoder

    if context is None:
        return encoder.build(family, settings, weights, adapter, activation)
    return decoder.build(family, settings, weights, adapter, activation, context)


def running_numbers(folder: Path, settings: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Return what a device has to know to run an exported decoder; its tokenizer lies in `folder`.

    An answer ends with any token that config.json, generation_config.json or the tokenizer calls the end.
    """
    from edgepeft.backbone.decoder import describe, stop_tokens
    from edgepeft.train.chats import beginning
    from edgepeft.train.loop import load_tokenizer

    about, tokenizer = describe(settings), load_tokenizer(folder)
    eos = {*stop_tokens(folder), *about.eos, tokenizer.eos_token_id} - {None}
    bos = about.bos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    numbers = {
        "layers": about.layers, "hidden": about.hidden, "heads": about.heads, "kv_heads": about.kv_heads,
        "head_dim": about.head_dim, "vocabulary": about.vocabulary, "bos": bos, "eos": sorted(eos),
        "pad": tokenizer.pad_token_id, "add_bos": bool(beginning(tokenizer)),
        "windows": sorted({window for window in about.windows if window}),
    }  # fmt: skip
    if context > about.positions:
        say(f"  a context of {about.positions} tokens: the model has no more for which its positions hold (--context)")
    return {"context": min(context, about.positions), "decoder": numbers}


def _weights(config: Config, run: Run) -> Weights:
    """Return the packed weights to export; a merged model takes its head from the adapter."""
    from edgepeft.export.emitter import Weights

    if config.adapter != "merged":
        return Weights(run.path("quantized"))
    return Weights(run.path("merged"), merged_heads(run.path("adapter"), Base.open(run.path("merged"))))


def _adapter(config: Config, run: Run, out: Path, weights: Weights, training: Mapping[str, Any]) -> AdapterFile:
    """Write the adapter's device form and describe it; nothing for a merged model."""
    from edgepeft.export.emitter import ADAPTER_FILE, AdapterFile

    if config.adapter == "merged":
        return AdapterFile.read(None)
    folder = (out / ADAPTER_FILE).parent
    base = Base(weights.tensors, weights.about, weights.folder)
    peft_files.write_device(folder, run.path("adapter"), base=base)
    if training["labels"]:
        write_json(folder / "labels.json", training["labels"])
    adapter = AdapterFile.read(out / ADAPTER_FILE)
    if own := neutral_values(adapter.shapes(), base):
        metadata = {"format": "pt", "edgepeft.base": base.digest, "edgepeft.format": base.about["format"]}
        write_tensors(folder.parent / BASE_FILE, own, metadata)
    return adapter


def write_settings(source: Path, out: Path, labels: list[str], auto_class: str, family: Family) -> dict[str, Any]:
    """Write config.json with the labels, if any, copy the tokenizer's files, and return the settings."""
    settings = read_json(source / "config.json")
    names: dict[str, Any] = {"architectures": [family.class_prefix + auto_class.removeprefix("AutoModel")]}
    if labels:
        names["id2label"] = {str(i): label for i, label in enumerate(labels)}
        names["label2id"] = {label: i for i, label in enumerate(labels)}
        names["num_labels"] = len(labels)
    write_json(out / "config.json", {**settings, **names})
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in OWN_FILES:
            shutil.copyfile(path, out / path.name)
    return {**settings, **names}


def check(path: Path) -> None:
    """Run ONNX's checker and shape inference over the file. Raises VerifyError with their words."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerifyError(f"{path.name}: the ONNX checker refuses it: {error}. This is a defect of edgepeft.") from None


def _summary(graph: Any, out: Path, config: Config, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was written."""
    sizes = {p.relative_to(out).as_posix(): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
    fused = [node for node in graph.nodes if node.op_type.startswith(NAME)]
    adapter_inputs = [value.name for value in graph.inputs if value.name.startswith(PREFIX)]
    return {
        "format": about["format"],
        "embedding_format": about["embedding_format"],
        "activation": config.activation,
        "adapter": config.adapter,
        "fused_nodes": len(fused),
        "fused_linears": sum(len(node.output) for node in fused),
        "adapter_inputs": len(adapter_inputs),
        "opset": OPSET,
        "sizes_bytes": sizes,
        "total_bytes": sum(sizes.values()),
    }


def _tell(summary: Mapping[str, Any]) -> None:
    sizes = summary["sizes_bytes"]
    parts = {"model.onnx": sizes["model.onnx"], "weights": sizes["model.onnx.data"]}
    parts["adapter"] = sum(size for name, size in sizes.items() if name.startswith("adapters/"))
    text = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in parts.items() if size)
    say(
        f"  {summary['fused_linears']} linears in {summary['fused_nodes']} fused nodes ({summary['format']}), "
        f"{summary['adapter_inputs']} adapter inputs\n  {text}"
    )
