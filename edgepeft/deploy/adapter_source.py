"""Where an adapter comes from, whether it belongs to a bundle's base, and its device form.

    a build's output   export/adapters/default, or adapter/ where it was merged
    a bundle           its only adapter
    a folder           of a bundle's adapter, of a build's, or as Hugging Face PEFT saves one

The base of an adapter is known by its digest. One that names none, as other tools save it, needs the model it was
trained on (--base), whose digest is then compared, or the word of the user (--trust-base), and fitting shapes. A digest
that is another is refused whatever the user says.

The device form is what `adapt.device` writes, under the digest and the format of the bundle. Methods whose terms depend
on the base's weights need the packed ones, which lie beside the adapter in a build's output.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepeft.adapt.terms import PREFIX, TERMS_FILE, aliases
from edgepeft.artifact import read_json, read_tensors, tensor_header, write_json, write_tensors
from edgepeft.console import say
from edgepeft.errors import ArtifactError
from edgepeft.runtime import adapters as ad
from edgepeft.runtime import manifest as mf
from edgepeft.runtime.prompts import PAST

ABOUT = "about.json"
SETTINGS, LABELS = "adapter_config.json", "labels.json"
BASE_KEY, FORMAT_KEY = "edgepeft.base", "edgepeft.format"


class Source:
    """An adapter's folder as it was given. packed: the packed backbone it was trained on, where that is at hand."""

    def __init__(self, folder: Path, packed: Path | None = None, training: Mapping[str, Any] | None = None) -> None:
        self.folder, self.packed = folder, packed
        self.settings = read_json(folder / SETTINGS)
        self.metadata = tensor_header(folder / ad.TENSORS)[1]
        training = training or {}
        self.labels = read_json(folder / LABELS) if (folder / LABELS).exists() else training.get("labels")
        self.about = {**about(training), **(read_json(folder / ABOUT) if (folder / ABOUT).exists() else {})}

    @property
    def device_form(self) -> bool:
        """Tell whether it is what an export wrote."""
        if (self.folder / TERMS_FILE).exists():
            return True
        half = all(e["dtype"] == "F16" for n, e in tensor_header(self.folder / ad.TENSORS)[0].items() if ".lora_" in n)
        return half and BASE_KEY in self.metadata and _scale_is_folded(self.settings)


def tensor_file(folder: Path) -> Path:
    """Return the file of an adapter's folder that the runtime reads."""
    return folder / (TERMS_FILE if (folder / TERMS_FILE).is_file() else ad.TENSORS)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return {input of the graph: shape} of an adapter in its device form, names that share a tensor included."""
    header, metadata, _ = tensor_header(tensor_file(folder))
    stored = {name: name for name in header} | aliases(metadata)
    return {name: tuple(header[source]["shape"]) for name, source in stored.items()}


def columns(folder: Path) -> int:
    """Return how many tokens an adapter in its device form puts before every text."""
    shapes = tensor_shapes(folder)
    found = [shape[0] for name, shape in shapes.items() if name.endswith(ad.BEFORE)]
    return max([*found, *(shape[2] for name, shape in shapes.items() if name.startswith(PAST))], default=0)


def _scale_is_folded(settings: Mapping[str, Any]) -> bool:
    """Tell whether PEFT's settings mean y + B·(A·x) with no factor."""
    ranks, alphas = (settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    plain = not any(settings.get(key) for key in ("use_dora", "use_rslora", "use_qalora", "fan_in_fan_out"))
    same = settings.get("lora_alpha") == settings.get("r") and ranks == alphas
    return settings.get("peft_type") == "LORA" and same and plain


def about(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return what about.json says of an adapter that a build trained; `training` is training.json."""
    given = training.get("config", {})
    told = {"method": given.get("method"), "model": _last(given.get("model")), "data": _last(given.get("data"))}
    told |= {key: training.get(key) for key in ("examples", "test")}
    return {key: value for key, value in told.items() if value}


def _last(path: Any) -> str | None:
    """Return the last part of a path, so that no folder of the machine that trained is told."""
    return Path(path).name if isinstance(path, str) else None


def find(folder: Path) -> Source:
    """Return the adapter that a folder holds or is. Raises ArtifactError that says what was found instead."""
    if (folder / "run.json").is_file():
        return _of_build(folder)
    if (folder / mf.NAME).is_file():
        folder = _one_of(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder. `edgepeft doctor {folder}` explains files of other tools.")
    if not (folder / ad.TENSORS).is_file() or not (folder / SETTINGS).is_file():
        raise ArtifactError(
            f"{folder}: expected {SETTINGS} and {ad.TENSORS}. `edgepeft doctor {folder}` says what it is and, for MLX, "
            "GGUF and .onnx_adapter, converts it."
        )
    training = folder / "training.json"
    packed = folder.parent / "quantized"
    return Source(
        folder, packed if training.exists() and packed.is_dir() else None,
        read_json(training) if training.exists() else None,
    )  # fmt: skip


def _of_build(folder: Path) -> Source:
    training = folder / "adapter" / "training.json"
    if not training.exists():
        raise ArtifactError(f"{folder}: nothing was trained there yet. Run 'edgepeft train' or 'edgepeft build'.")
    exported = folder / "export" / "adapters" / ad.DEFAULT
    place = exported if (exported / ad.TENSORS).is_file() else folder / "adapter"
    return Source(place, folder / "quantized", read_json(training))


def folders(manifest: mf.Manifest) -> dict[str, Path]:
    """Return {name: folder}. Raises ArtifactError for a merged bundle, which has and takes none."""
    if manifest["adapter"] == "merged":
        raise ArtifactError(
            f"{manifest.folder}: its adapter was merged into the weights, so it has none and takes none. Build with "
            "--adapter separate."
        )
    return ad.adapter_folders(manifest.folder)


def _one_of(bundle: Path) -> Path:
    """Return the folder of a bundle's only adapter."""
    found = folders(mf.check_bundle(bundle))
    if len(found) != 1:
        names = ", ".join(str(path) for path in found.values())
        raise ArtifactError(f"{bundle}: holds {len(found)} adapters. Give one of: {names}.")
    return next(iter(found.values()))


def proof(source: Source, manifest: mf.Manifest, base: Path | None, trust_base: bool) -> str:
    """Return how it is known that an adapter is of this base: "digest", "model" or "word". Raises ArtifactError."""
    digest, tag = source.metadata.get(BASE_KEY), source.metadata.get(FORMAT_KEY)
    if not digest and base is not None:
        digest = _digest_of(base)
    if digest and digest != manifest["base_digest"]:
        raise ArtifactError(
            f"{source.folder}: made for another base: its digest is {digest[:12]}…, this bundle's "
            f"{manifest['base_digest'][:12]}…. Its answers would be wrong; train it on this base."
        )
    if not digest and not trust_base:
        name = source.settings.get("base_model_name_or_path") or "a base it does not name"
        raise ArtifactError(
            f"{source.folder}: trained on {name}; nothing proves that this is the bundle's base. Give that model "
            "(--base MODEL_DIR), so that its digest can be compared, or your word for it (--trust-base)."
        )
    if tag and tag != manifest["format"] and not trust_base:
        raise ArtifactError(
            f"{source.folder}: trained on {tag} weights, the bundle has {manifest['format']}; answers would differ "
            f"from those in training. Build with --format {tag}, or give --trust-base to take it all the same."
        )
    if not tag or tag != manifest["format"]:
        say(f"note: not trained on {manifest['format']} weights: answers may differ a little from those in training.")
    return ("digest" if source.metadata.get(BASE_KEY) else "model") if digest else "word"


def _digest_of(base: Path) -> str:
    """Return the digest of a model folder, or of what a build packed."""
    if (base / "run.json").is_file():
        return read_json(base / "quantized" / "quantized.json")["base_digest"]
    from edgepeft.backbone.load import open_folder

    return open_folder(base).digest


# --- the device form -----------------------------------------------------------------------------------------------


def write_device(source: Source, out: Path, manifest: mf.Manifest, places: Mapping[str, ad.Slot]) -> None:
    """Write the device form of an adapter below `out`."""
    if source.device_form:
        for path in sorted(source.folder.iterdir()):
            if path.name in (ad.TENSORS, TERMS_FILE):
                _name_base(path, out / path.name, manifest)
            elif path.name in (SETTINGS, LABELS):
                shutil.copyfile(path, out / path.name)
    else:
        _convert(source, out, manifest, places)


def write_labels(source: Source, out: Path, manifest: mf.Manifest) -> None:
    """Write the labels of an adapter below `out`, where the bundle has some."""
    if "labels" in manifest.values:
        write_json(out / LABELS, _labels(source, list(manifest["labels"])))


def _name_base(source: Path, out: Path, manifest: mf.Manifest) -> None:
    """Write a file of tensors under the bundle's base and format."""
    named = {BASE_KEY: manifest["base_digest"], FORMAT_KEY: manifest["format"]}
    metadata = tensor_header(source)[1]
    if {**metadata, **named} != metadata:
        write_tensors(out, read_tensors(source), {**metadata, **named})
    elif source != out:
        shutil.copyfile(source, out)


def _convert(source: Source, out: Path, manifest: mf.Manifest, places: Mapping[str, ad.Slot]) -> None:
    """Write the device form of what PEFT saved."""
    from edgepeft.adapt import peft_files

    expected: dict[str, Any] = {"shapes": {**linears(places), **tables(manifest.folder)}}
    if source.packed is not None:
        from edgepeft.adapt.base import Base

        expected = {"base": Base.open(source.packed)}
    peft_files.write_device(out, source.folder, **expected)
    for path in (out / ad.TENSORS, out / TERMS_FILE):
        if path.exists():
            _name_base(path, path, manifest)


def tables(bundle: Path) -> dict[str, tuple[int, int]]:
    """Return {module: (V, K)} of the embeddings that a bundle's config.json tells the sizes of."""
    from edgepeft.backbone.families import FAMILIES

    settings = read_json(bundle / "config.json")
    family = next(row for row in FAMILIES.values() if settings["model_type"] in row.model_types)
    sizes = {"word": ("vocab_size", "hidden_size"), **family.sizes}
    return {
        f"{family.prefix}.{name}": (settings[sizes[role][0]], settings[sizes[role][1]])
        for role, name in family.embeddings.items()
    }


def linears(places: Mapping[str, ad.Slot]) -> dict[str, tuple[int, int]]:
    """Return {module: (N, K)} of the linears that a graph has inputs for."""
    found = {}
    for name, slot in places.items():
        if name.endswith(f".{ad.DOWN}"):
            module = name.removesuffix(f".{ad.DOWN}")
            n, k = places[f"{module}.{ad.UP}"].shape[1], slot.shape[1]
            found[module.removeprefix(PREFIX)] = (int(n or 0), int(k or 0))
    return found


def _labels(source: Source, of_bundle: list[str]) -> list[str]:
    """Return the labels of an adapter's head; the bundle's where it has as many and names none."""
    tensors = tensor_header(source.folder / ad.TENSORS)[0]
    rows = next((entry["shape"][0] for name, entry in tensors.items() if name.endswith("classifier.bias")), None)
    if source.labels is not None:
        return list(source.labels)
    if rows is not None and rows != len(of_bundle):
        raise ArtifactError(
            f"{source.folder}: its head has {rows} labels and does not name them. Put them beside it, as {LABELS}: a "
            "JSON list of texts, in the order of the head."
        )
    say(f"note: no {LABELS} in {source.folder}: its {len(of_bundle)} labels are taken to be the bundle's.")
    return of_bundle
