"""An adapter that was trained elsewhere takes the place of training: read exactly or refused, judged, stamped.

    PEFT folder ─► checked against the model ┄► checked against the packed base ─► labels in the data's order ─► figures
                   before anything is packed                                                         ─► adapter folder

Such a folder names its base by a name at most, so the model given is taken for it: every module has to be there with
these shapes, and what is known of both names is printed. The folder written names the base's digest, and all later
stages treat it as one that was trained here.

A classifier's head has a row for each label, and PEFT does not save which. So the labels come from labels.json in the
folder, a JSON list in the order of the rows, unless edgepeft wrote them; rows are put into the order of the data's.

Left out: adapters of other tools (`edgepeft doctor FOLDER --convert OUT` makes a PEFT folder of them), heads for other
labels than the data has.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.adapt import peft_files
from edgepeft.adapt.base import Base
from edgepeft.adapt.device import write_form
from edgepeft.adapt.terms import PREFIX
from edgepeft.artifact import Run, file_digest, key_of, read_json, tensor_header, write_json
from edgepeft.console import say
from edgepeft.errors import ArtifactError, all_of
from edgepeft.train.data import load_splits

if TYPE_CHECKING:
    from edgepeft.backbone.families import Family
    from edgepeft.backbone.load import ModelSource
    from edgepeft.config import Config
    from edgepeft.train.data import Splits

LABELS, TRAINING = "labels.json", "training.json"


def folder_digest(config: Config) -> str:
    """Return the digest of the adapter that is attached, or "" where one is trained.

    Raises ArtifactError where there is none.
    """
    if not config.adapter_from:
        return ""
    folder = Path(config.adapter_from).expanduser()
    if not all((folder / name).is_file() for name in (peft_files.SETTINGS, peft_files.TENSORS)):
        raise ArtifactError(
            f"{folder}: no adapter: expected {peft_files.SETTINGS} and {peft_files.TENSORS}. `edgepeft doctor` says "
            "what it is and, for MLX, GGUF and .onnx_adapter, converts it."
        )
    files = [folder / name for name in (peft_files.SETTINGS, peft_files.TENSORS, LABELS, TRAINING)]
    return key_of([file_digest(path) if path.is_file() else "" for path in files])


def check(config: Config, source: ModelSource, family: Family, splits: Splits[Any]) -> None:
    """Raise ArtifactError that lists every reason against the adapter of config.adapter_from, before a base is packed.

    It is brought all the way to its device form, and away again; but for a prompt, whose keys and values the packed
    base makes.
    """
    folder, base = Path(config.adapter_from).expanduser(), Base.planned(source, family, config)
    adapter, _ = _read(folder, base, splits.labels)
    if adapter.kind.prompt:
        return
    with tempfile.TemporaryDirectory(prefix="edgepeft-") as name:
        write_form(Path(name), adapter, base)


def attach(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Write the adapter of config.adapter_from and training.json to `out`, and return its figures.

    Raises ArtifactError that lists every reason against carrying it over exactly.
    """
    from edgepeft.adapt import layers
    from edgepeft.backbone.load import quantized_model
    from edgepeft.train.loop import evaluate, load_tokenizer, versions
    from edgepeft.train.watch import quiet

    folder, quantized = Path(config.adapter_from).expanduser(), run.path("quantized")
    base, splits = Base.open(quantized), load_splits(config)
    adapter, order = _read(folder, base, splits.labels)
    tensors = in_order(dict(adapter.tensors), order, base.heads)
    adapter.effect(base)  # what has no terms is refused before anything is written
    peft_files.write(out, _untied(adapter), tensors, base.digest, base.about["format"])
    _tell(adapter, config, folder)
    with quiet():
        model = layers.load(quantized_model(quantized, splits.labels, config), out).eval()
        tokenizer = load_tokenizer(quantized)
    judged = [name for name in ("validation", "test") if len(getattr(splits, name))]
    figures = {name: evaluate(model, config, getattr(splits, name), tokenizer) for name in judged}
    settings = {**dataclasses.asdict(config), "method": str(adapter.settings["peft_type"]).lower()}
    settings["rank"] = int(adapter.settings.get("r") or 0)
    report = {**figures, "labels": list(splits.labels), "config": settings, "versions": versions()}
    write_json(out / TRAINING, report)
    return figures


def _read(folder: Path, base: Base, labels: Sequence[str]) -> tuple[peft_files.Adapter, list[int]]:
    """Return a folder's adapter, and which row of its heads each label is.

    Raises ArtifactError that lists every reason against both.
    """
    adapter, order = all_of(
        lambda: peft_files.read(folder, base=base, foreign=True), lambda: row_order(folder, labels, base.heads)
    )
    return adapter, order


def _untied(adapter: peft_files.Adapter) -> dict[str, Any]:
    """Return the settings of an adapter, of one that PEFT ties as those of the two that it holds.

    A packed base has two modules for one weight, so that PEFT would see nothing there to tie.
    """
    settings = dict(adapter.settings)
    if settings.get("ensure_weight_tying"):
        settings |= {"ensure_weight_tying": False, "target_modules": adapter.modules}
    return settings


def row_order(folder: Path, labels: Sequence[str], heads: Sequence[str]) -> list[int]:
    """Return which row of an adapter's heads each label is, [] where there are no labels or heads.

    Raises ArtifactError where the folder does not say which row is which, or has other labels than the data.
    """
    shapes = {name: entry["shape"] for name, entry in tensor_header(folder / peft_files.TENSORS)[0].items()}
    rows = _head_tensors(shapes, heads)
    if not rows or not labels:
        return []
    own = _labels(folder, shapes[rows[0]][0], labels)
    return [own.index(label) for label in labels]


def in_order(tensors: dict[str, np.ndarray], order: Sequence[int], heads: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the tensors with the rows of the heads in an order."""
    rows = _head_tensors(tensors, heads) if order else []
    return {**tensors, **{name: np.ascontiguousarray(tensors[name][order]) for name in rows}}


def _head_tensors(names: Iterable[str], heads: Sequence[str]) -> list[str]:
    return [name for head in heads for name in names if name.startswith(f"{PREFIX}{head}.")]


def _labels(folder: Path, count: int, labels: Sequence[str]) -> list[str]:
    """Return the labels of a head of `count` rows, in their order."""
    path = folder / LABELS
    trained = folder / TRAINING  # of an adapter that was trained here
    path = trained if not path.is_file() and trained.is_file() else path
    if not path.is_file():
        example = ", ".join(f'"{label}"' for label in labels[:2])
        raise ArtifactError(
            f"{path}: missing. The adapter's head has {count} rows and does not say which label each one is. Write "
            f"them there as a JSON list in the order of the rows: [{example}, ...]."
        )
    own = read_json(path)
    own = own.get("labels") if path == trained and isinstance(own, dict) else own
    if not isinstance(own, list) or not all(isinstance(label, str) for label in own) or len(set(own)) != len(own):
        raise ArtifactError(f"{path}: expected a list of texts, each one once, found {own!r:.60}.")
    if len(own) != count or sorted(own) != sorted(labels):
        raise ArtifactError(
            f"{path}: expected the {count} labels of the head, which are those of the data ({', '.join(labels)}); "
            f"found {', '.join(own)}."
        )
    return own


def _tell(adapter: peft_files.Adapter, config: Config, folder: Path) -> None:
    named = adapter.settings.get("base_model_name_or_path") or "no base"
    kind, count = adapter.settings["peft_type"], len(adapter.modules)
    say(f"  {folder}: {kind} on {count} modules, nothing is trained")
    if "edgepeft.base" not in adapter.metadata:
        say(f"  it names {named!r} and no digest: {config.model!r} is taken for its base, as names and shapes agree")
