"""Every method and setting against PEFT, on the same packed bits; run as a module, it prints the table of all of them.

    python -m tests.adapt.conformance [--readme README.md]          (from the root of the sources)

A cell is one method on one kind of model in one weight format: a random adapter is made and saved by PEFT, exported,
and run. "exact" means: the graph in float gives PEFT's logits under the exported adapter within `FLOAT`, and PEFT's
layers under the adapter as it was saved are the terms' equation; the adapter's float16 is all that lies between. With
int8 activations our kernels differ from float by no more than twice what PyTorch does when it rounds alike: the table
gives the largest difference of the float logits, by its power of ten, and the noise as a share of that bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
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
from edgepeft.deploy.compile import host_library
from edgepeft.errors import EdgePeftError
from edgepeft.export import decoder, encoder, parity
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
        rows = 24 if encodes else 1  # with few logits the noise of rounding is a matter of luck
        ids = np.random.default_rng(0).integers(5, 60, (rows, 9))
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

    def logits(self, model: Any, batch: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Return PyTorch's logits of a batch, the subject's own unless given."""
        import torch

        with torch.inference_mode():
            found = model(
                **{name: torch.from_numpy(array) for name, array in (batch or self.batch).items()}
            ).logits.numpy()
        return found if self.heads else found[:, -self.batch["input_ids"].shape[1] :]  # behind a prompt

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
    rounding = rounding_share(subject, out, wanted)
    rms = float(np.sqrt(np.mean(np.square(wanted - before))) / np.sqrt(np.mean(np.square(before))))
    return {
        "graph": float(np.abs(found - wanted).max()),
        "layers": layer_error(subject, subject.adapter(folder), trained),
        "float16": rms,
        "rounding": rounding,
        "effect": float(np.abs(before - subject.logits(subject.model())).max()),
    }


def rounding_share(subject: Subject, out: Path, exact: np.ndarray) -> float:
    """Return what int8 activations change in our kernels' logits, as a share of what `edgepeft verify` allows."""
    from edgepeft.export.verify import NOISE_FACTOR, NOISE_FLOOR

    model = subject.model((out / ADAPTER_FILE).parent)
    with parity.int8_activations(model):
        rounded = subject.logits(model)
    allowed = max(NOISE_FACTOR * parity.noise(rounded, exact), NOISE_FLOOR)
    found = OnnxModel(out, host_library(), "int8").logits(subject.batch)
    return parity.noise(found, exact) / allowed


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
    from edgepeft.adapt.merge import check_mergeable, merge_terms, overall

    adapter = subject.adapter(subject.made(name))
    effect = adapter.effect(subject.base)
    check_mergeable(effect, subject.base)
    layers = {layer["name"]: dict(layer) for layer in subject.base.about["layers"]}
    rows = []
    for module, terms in effect.modules.items():
        if set(terms.present) - {"bias"}:
            rows.append(merge_terms(module, terms, subject.base, layers[module])[0])
    return overall(rows) if rows else {"retention": 1.0, "share": 1.0}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One cell: "exact", "off", "merged" or "refused" with the reason.

    error: largest difference of float logits; rounding: noise of int8 activations as a share of what is allowed;
    kept: the share of the adapter's change of the weights that a merge keeps.
    """

    kind: str
    reason: str = ""
    error: float = 0.0
    rounding: float = 0.0
    kept: float = 1.0

    @property
    def words(self) -> str:
        """The cell in words."""
        off = f"off by {self.error:.1e}, by {self.rounding:.2f} of the bound with int8 activations"
        return {"off": off, "refused": f"refused: {self.reason}"}.get(self.kind, self.kind)


def outcome(subject: Subject, name: str, form: str) -> Outcome:
    """Return what comes of one method on one packed model, in its own graph or merged."""
    try:
        figures = (separate if form == "separate" else merged)(subject, name)
    except EdgePeftError as error:
        return Outcome("refused", _reason(str(error)))
    if form == "merged":
        least, kept = subject.config.min_retention, figures["retention"]
        enough = kept >= least
        return Outcome(
            "merged" if enough else "refused", "" if enough else f"the merge keeps less than {least:g}", kept=kept
        )
    exact = figures["graph"] <= FLOAT and figures["layers"] <= FLOAT and figures["float16"] <= HALF
    good = exact and figures["rounding"] <= 1
    return Outcome("exact" if good else "off", error=figures["graph"], rounding=figures["rounding"])


def _reason(message: str) -> str:
    """Return why, without who: what is said of many modules is said once."""
    parts = message.rpartition(": ")[2].partition(". ")[0].split("; ")
    return "; ".join(dict.fromkeys(re.sub(r"^(\w+\.)+\w+ ", "a linear ", part) for part in parts))


def cell(subject: Subject, name: str, form: str) -> str:
    """Return one cell of the table in words."""
    return outcome(subject, name, form).words


# --- the table -----------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- conformance -->", "<!-- end of conformance -->"
COLUMNS = [(kind, form) for kind in KINDS_OF_MODELS for form in ("separate", "merged")]
Cells = dict[tuple[str, str, str], dict[str, Outcome]]  # (method, kind of model, form) -> {format: outcome}


def measured() -> Cells:
    """Return all cells."""
    found: Cells = {}
    for kind, model in KINDS_OF_MODELS.items():
        for tag in FORMATS:
            with tempfile.TemporaryDirectory() as place:
                subject = Subject(Path(place), model, tag)
                for method in METHODS:
                    for form in ("separate", "merged"):
                        found.setdefault((method, kind, form), {})[tag] = outcome(subject, method, form)
    return found


def table(cells: Cells) -> str:
    """Return the table method x kind of model x form, each cell over all formats, and the reasons below it."""
    reasons: dict[str, int] = {}
    lines = ["| `--method` | " + " | ".join(f"{k}, {f}" for k, f in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method in METHODS:
        row = (_over(cells[method, *column], reasons) for column in COLUMNS)
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    formats = ", ".join(f"`{tag}`" for tag in FORMATS)
    return "\n".join([f"Formats: {formats}.", "", *lines, "", *notes]).rstrip()


def _over(found: dict[str, Outcome], reasons: dict[str, int]) -> str:
    """Return a cell: the worst of all formats, or each format apart where they do not end alike."""
    kinds: dict[tuple[str, str], dict[str, Outcome]] = {}
    for tag, one in found.items():
        kinds.setdefault((one.kind, one.reason), {})[tag] = one
    said = {" ".join(f"`{tag}`" for tag in own): _said(list(own.values()), reasons) for own in kinds.values()}
    return next(iter(said.values())) if len(said) == 1 else "; ".join(f"{tags}: {text}" for tags, text in said.items())


def _said(found: Sequence[Outcome], reasons: dict[str, int]) -> str:
    first = found[0]
    if first.kind == "refused":
        return f"refused ({reasons.setdefault(first.reason, len(reasons) + 1)})"
    if first.kind == "merged":
        return f"{min(one.kept for one in found):.2f} kept"
    worst = max(max(one.error for one in found), 1e-9)
    bound = f"1e{math.ceil(math.log10(worst))}"
    return f"{first.kind}, {bound}; {max(one.rounding for one in found):.2f}"


def write_into(readme: Path, text: str) -> None:
    """Put the table between the marker lines of a file."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme}: expected the lines {BEGIN} and {END}, found no such pair. Add them.")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(prog="tests.adapt.conformance", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--readme", type=Path, help="write the table between the marker lines of this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    text = table(measured())
    print(text)
    if options.readme:
        write_into(options.readme, text)


if __name__ == "__main__":
    main()
