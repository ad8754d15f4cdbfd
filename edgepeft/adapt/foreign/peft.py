"""Folders of Hugging Face PEFT, and so of all that train with it (LLaMA-Factory, Unsloth, Axolotl, TRL, edgepeft).

Names are forgiven what PEFT itself would miss without a word: the prefix base_model.model. left out, the name of an
adapter left in (lora_A.default.weight), torch.compile's _orig_mod. Such an adapter loads and does nothing there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgepeft.adapt.foreign import PREFIX, Foreign, some
from edgepeft.artifact import read_json, read_tensor, tensor_header
from edgepeft.errors import ArtifactError

SETTINGS, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TERMS = "terms.safetensors"
NAMED = re.compile(r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$)\w+(?=\.|$)")
COMPILED = "_orig_mod."
WRAPPER = "base_model."


def read(path: Path) -> Foreign:
    """Read adapter_model.safetensors with the adapter_config.json beside it. Raises ArtifactError for a damaged one."""
    settings = read_settings(path.parent)
    header, metadata, base = tensor_header(path)
    tensors, changes = {}, dict[str, None]()
    for name, entry in header.items():
        new = _canonical(name, changes)
        tensors[new] = read_tensor(path, entry, base)
    tool, layout = "Hugging Face PEFT", "PEFT safetensors"
    if "edgepeft.base" in metadata:
        tool = "edgepeft"
    elif str(settings.get("base_model_name_or_path", "")).startswith("unsloth/"):
        tool = "Hugging Face PEFT (Unsloth)"
    if path.with_name(TERMS).exists():
        layout = "PEFT safetensors, and the device's terms"
    return Foreign(tool, layout, path.parent, settings, tensors, metadata, tuple(changes))


def unread_pickle(path: Path) -> Foreign:
    """Return what is known of a pickled adapter without opening it."""
    beside = path.with_name(SETTINGS)
    settings = read_settings(path.parent) if beside.exists() else {}
    why = (
        f"{path.name} is a pickle, which can run code when it is opened, so it is not. If you trust its source, "
        "load it with PEFT on a machine that may be lost and save it anew: PeftModel.save_pretrained(FOLDER) writes "
        "safetensors"
    )
    tool = "Hugging Face PEFT" if settings else "unknown"
    return Foreign(tool, "pickle", path.parent, settings, {}, unread=why)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises ArtifactError unless it is a JSON object."""
    if not (folder / SETTINGS).is_file():
        found = some(sorted(path.name for path in folder.iterdir()))
        raise ArtifactError(
            f"{folder}: no adapter: expected {SETTINGS} beside the tensors, found {found}. Give the folder that PEFT's "
            "save_pretrained wrote."
        )
    settings = read_json(folder / SETTINGS)
    if not isinstance(settings, dict):
        raise ArtifactError(f"{folder / SETTINGS}: expected a JSON object, found {type(settings).__name__}.")
    for key, kinds in (("target_modules", (list, str)), ("modules_to_save", (list,)), ("peft_type", (str,))):
        value = settings.get(key)
        of_texts = not isinstance(value, list) or all(isinstance(one, str) for one in value)
        if value is not None and not (isinstance(value, kinds) and of_texts):
            what = "a text" if kinds == (str,) else "a list of texts"
            raise ArtifactError(f"{folder / SETTINGS}: {key}: expected {what}, found {value!r:.60}.")
    return settings


def _canonical(name: str, changes: dict[str, None]) -> str:
    """Return a tensor's name as PEFT saves it, and note what was wrong with it."""
    new = name
    if COMPILED in new:
        new = new.replace(COMPILED, "")
        changes["_orig_mod. of torch.compile in the names"] = None
    if NAMED.search(new):
        new = NAMED.sub(r"\1", new)
        changes["the adapter's own name in the names"] = None
    if not new.startswith(WRAPPER) and "." in new:  # what modules share lies beside the model: base_model.vera_A
        new = PREFIX + new
        changes[f"{PREFIX} missing in the names"] = None
    return new
