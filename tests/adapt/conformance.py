"""Every method and setting against PEFT, on the same packed bits; run as a module, it prints the table of all of them.

    python -m tests.adapt.conformance          (from the root of the sources)

A cell is one method on one kind of model in one weight format: a random adapter is made and saved by PEFT, exported,
and run. "exact" means: the graph in float gives PEFT's logits under the exported adapter within `FLOAT`, and PEFT's
layers under the adapter as it was saved are the terms' equation; the adapter's float16 is all that lies between.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import LABELS, tiny_bert, tiny_decoder

from edgepeft.adapt import device, peft_files
from edgepeft.adapt.base import Base
from edgepeft.adapt.methods import METHODS
from edgepeft.artifact import Run
from edgepeft.backbone.families import family_of
from edgepeft.config import Config
from edgepeft.errors import EdgePeftError
from edgepeft.export import decoder, encoder
from edgepeft.export.emitter import ADAPTER_FILE, AdapterFile, Weights
from edgepeft.export.parity import OnnxModel
from edgepeft.quant.formats import FORMATS
from tests.adapt.foreign_settings import save, setting

FLOAT = 1e-4  # of the logits, largest difference
HALF = 1e-2  # of the logits' size, rms: what float16 in the adapter may change; measured: 1e-6 to 4e-3
KINDS_OF_MODELS = {"encoder": "bert", "decoder": "llama"}
SIZE = 128  # i4b128 takes no less


class Subject:
    """A packed tiny model; everything made on it lies below one folder."""

    def __init__(self, folder: Path, kind: str, tag: str = "i4b32", flavour: str = "", **changes: Any) -> None:
        from edgepeft.quant.stage import quantize

        self.kind, self.folder, encodes = kind, folder, kind == "bert"
        if encodes:
            model = tiny_bert(folder / "model", hidden=SIZE, **changes)
        else:
            sizes = {"hidden_size": SIZE, "intermediate_size": SIZE, **changes}
            model = tiny_decoder(folder / "model", flavour or "llama", **sizes)
        task = "text-classification" if encodes else "text-generation"
        self.config = Config(model=str(model), data="none.csv", task=task, format=tag, threads=1)
        self.labels, self.heads = (list(LABELS), ["classifier"]) if encodes else ([], [])
        self.run = Run(folder / "run")
        self.run.make("quantized", "", lambda out: quantize(self.config, self.run, out))
        self.settings = json.loads((model / "config.json").read_text())
        self.base = Base.open(self.run.path("quantized"))
        ids = np.random.default_rng(0).integers(5, 60, (2 if encodes else 1, 9))
        self.batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if encodes:
            self.batch["token_type_ids"] = np.zeros_like(ids)

    def model(self, folder: Path | None = None) -> Any:
        """Return the packed model in PyTorch, with an adapter as PEFT loads it, or our layers."""
        from edgepeft.adapt import layers
        from edgepeft.backbone.load import quantized_model

        model = quantized_model(self.run.path("quantized"), self.labels, self.config)
        return model if folder is None else layers.load(model, folder).eval()

    def made(self, name: str) -> Path:
        """Make the random adapter of a setting, saved by PEFT; return its folder."""
        place = self.folder / name.replace(" ", "_") / "peft"
        return save(setting(name, self.kind, self.model(), self.heads, self.config), place)

    def logits(self, model: Any) -> np.ndarray:
        """Return PyTorch's logits."""
        import torch

        with torch.inference_mode():
            return model(**{name: torch.from_numpy(array) for name, array in self.batch.items()}).logits.numpy()

    def adapter(self, folder: Path) -> peft_files.Adapter:
        """Read an adapter that PEFT saved."""
        return peft_files.read(folder, base=self.base, foreign=True)

    def export(self, folder: Path) -> Path:
        """Export an adapter with its graph; return the exported folder."""
        out = folder.parent / "export"
        device.write_form((out / ADAPTER_FILE).parent, self.adapter(folder), self.base)
        family, file = family_of(self.settings, "tiny"), AdapterFile.read(out / ADAPTER_FILE)
        weights = Weights(self.run.path("quantized"))
        if self.heads:
            graph = encoder.build(family, self.settings, weights, file, "float")
        else:
            graph = decoder.build(family, self.settings, weights, file, "float", 64)
        graph.save(out)
        return out


def separate(subject: Subject, name: str) -> dict[str, float]:
    """Return the largest errors of one cell: of the graph against PEFT, of the layers, and what float16 changes."""
    folder = subject.made(name)
    trained = subject.model(folder)
    out = subject.export(folder)
    wanted = subject.logits(subject.model((out / ADAPTER_FILE).parent))
    before, found = subject.logits(trained), OnnxModel(out, None).logits(subject.batch)
    rms = float(np.sqrt(np.mean(np.square(wanted - before))) / np.sqrt(np.mean(np.square(before))))
    return {
        "graph": float(np.abs(found - wanted).max()),
        "layers": layer_error(subject, subject.adapter(folder), trained),
        "float16": rms,
        "effect": float(np.abs(before - subject.logits(subject.model())).max()),
    }


def layer_error(subject: Subject, adapter: peft_files.Adapter, peft: Any) -> float:
    """Return the largest difference between PEFT's adapted linears and the equation, relative to what they give."""
    import torch

    worst, chance = 0.0, np.random.default_rng(1)
    for module, terms in adapter.effect(subject.base).modules.items():
        if module in subject.base.embeddings or terms.beside:
            continue
        w_nk = subject.base.weight(module).astype(np.float64)
        x = chance.standard_normal((3, w_nk.shape[1])).astype(np.float32)
        bias = terms.bias if terms.bias is not None else subject.base.bias(module)
        y = x @ (w_nk + terms.delta(w_nk)).T + (0 if bias is None else bias)
        with torch.inference_mode():
            wanted = peft.get_submodule(f"base_model.model.{module}")(torch.from_numpy(x)).numpy()
        worst = max(worst, float(np.abs(y - wanted).max() / np.abs(wanted).max()))
    return worst


def merged(subject: Subject, name: str) -> dict[str, float]:
    """Return how far the merged weights lie from what they were to be, before the grid: the rest is retention's."""
    from edgepeft.adapt.merge import check_mergeable, merge_module, overall

    adapter = subject.adapter(subject.made(name))
    effect = adapter.effect(subject.base)
    check_mergeable(effect, subject.base)
    layers = {layer["name"]: dict(layer) for layer in subject.base.about["layers"]}
    rows = []
    for module, terms in effect.modules.items():
        if set(terms.present) - {"bias"}:
            delta = terms.delta(subject.base.weight(module))
            rows.append(merge_module(module, delta, layers[module], subject.base.tensors, subject.base.about)[0])
    return overall(rows) if rows else {"retention": 1.0, "share": 1.0}


def cell(subject: Subject, name: str, form: str) -> str:
    """Return one cell of the table in words."""
    try:
        figures = (separate if form == "separate" else merged)(subject, name)
    except EdgePeftError as error:
        return f"refused: {str(error).rpartition(': ')[2].partition('. ')[0]}"
    if form == "merged":
        return "measured"
    good = figures["graph"] <= FLOAT and figures["layers"] <= FLOAT and figures["float16"] <= HALF
    return "exact" if good else f"off by {figures['graph']:.1e}"


def table() -> str:
    """Return the table method x kind of model x form over all formats."""
    columns = [(kind, form) for kind in KINDS_OF_MODELS for form in ("separate", "merged")]
    found: dict[str, dict[tuple[str, str], set[str]]] = {tag: {column: set() for column in columns} for tag in METHODS}
    for kind, form in columns:
        for tag in FORMATS:
            with tempfile.TemporaryDirectory() as place:
                subject = Subject(Path(place), KINDS_OF_MODELS[kind], tag)
                for method in METHODS:
                    found[method][kind, form].add(cell(subject, method, form))
    lines = ["| `--method` | what is trained | " + " | ".join(f"{k}, {f}" for k, f in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for tag, row in METHODS.items():
        cells = " | ".join("; ".join(sorted(found[tag][column])) for column in columns)
        lines.append(f"| `{tag}` | {row.words} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(table())
