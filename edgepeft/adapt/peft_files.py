"""PEFT adapter folders: adapter_config.json + adapter_model.safetensors, read exactly or refused.

Reading checks everything at once (`peft_checks`): each setting that changes the result is understood or off, each
tensor belongs to a module, shapes agree with rank and base, values are finite, and the base is the one the adapter
was trained on. What a kind of adapter understands stands in its row (`kinds`). Any other setting that is switched on
is refused, also one this version has never heard of: a converter that skips it would be wrong silently.

Besides the terms of modules an adapter may bring whole tensors: those of modules_to_save and, with bias "all" or
"..._only", biases. A linear's bias becomes a term, all other tensors take the place of the base's own.

Writing gives equal bytes for equal content; `device` writes what a device reads. The safetensors metadata names the
base: {"format": "pt", "edgepeft.base": sha256, "edgepeft.format": tag}.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.adapt import peft_checks as checks
from edgepeft.adapt import prompts
from edgepeft.adapt.foreign.peft import read_settings
from edgepeft.adapt.kinds import KINDS, Kind, Module, lora_rank, lora_scale, vera_projections
from edgepeft.adapt.terms import PREFIX, Effect, Terms
from edgepeft.artifact import read_tensor, tensor_header, write_json, write_tensors
from edgepeft.errors import ArtifactError

if TYPE_CHECKING:
    from edgepeft.adapt.base import Base

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SHADOWS = (".original_module.", ".modules_to_save.")  # PEFT's own copies of what stands under its plain name as well
COPIES = tuple(f".base_layer.{part}" for part in ("weight", "qweight", "qscale"))  # of adapted embeddings and heads


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter folder that passed all checks: settings, {PEFT name: array}, safetensors metadata.

    shapes: {module: (N, K)} of the base's linears, as far as they were given.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """The row of its kind."""
        return KINDS[self.settings["peft_type"]]

    @functools.cached_property
    def _by_module(self) -> dict[str, dict[str, np.ndarray]]:
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, value in self.tensors.items():
            if match := self.kind.match(name.removeprefix(PREFIX)):
                found.setdefault(match[0], {})[match[1]] = value
        return dict(sorted(found.items()))

    @property
    def modules(self) -> list[str]:
        """The adapted modules, under the base model's own names, sorted."""
        return list(self._by_module)

    def module(self, name: str) -> Module:
        """Return one adapted module."""
        named = {key: self.tensors.get(f"base_model.{key}") for key in self.kind.common}
        common = {key: value for key, value in named.items() if value is not None}
        return Module(name, self._by_module[name], self.settings, common, self.shapes.get(name))

    @property
    def tables(self) -> set[str]:
        """The adapted modules that are embeddings, as PEFT names their tensors."""
        return {name for name, tensors in self._by_module.items() if "lora_embedding_A" in tensors}

    @property
    def heads(self) -> dict[str, np.ndarray]:
        """The tensors trained in full, float32, under PEFT's names; biases of linears among them."""
        return {f"{PREFIX}{name}": value for name, value in self.whole.items()}

    @property
    def whole(self) -> dict[str, np.ndarray]:
        """The tensors trained in full, float32, under the base's names."""
        found = {}
        for name, value in self.tensors.items():
            inner = name.removeprefix(PREFIX)
            if not self.kind.match(inner) and name.startswith(PREFIX):
                found[inner.replace(".base_layer.", ".")] = value.astype(np.float32)
        return found

    def rank(self, module: str) -> int:
        """Return R of a LoRA as the settings state it."""
        return lora_rank(self.module(module))

    def scale(self, module: str) -> float:
        """Return what lora_B·lora_A is multiplied by."""
        return lora_scale(self.module(module))

    def effect(self, base: Base | None = None) -> Effect:
        """Return the terms and whole tensors. `base` has to be there for kinds whose terms depend on its weights."""
        found = {name: self.kind.terms(self.module(name), base) for name in self.modules}
        modules = {name: terms for name, terms in found.items() if not _idle(terms)}
        replaced = self.whole
        for name in [name for name in replaced if name.endswith(".bias")]:
            module = name.removesuffix(".bias")
            if module in modules or (base is not None and module in base.linears):
                modules[module] = _with_bias(modules.get(module, Terms()), module, replaced.pop(name), self, base)
        return Effect(dict(sorted(modules.items())), replaced, self.prompt(base))

    def prompt(self, base: Base | None = None) -> dict[str, np.ndarray]:
        """Return {input of the graph: array} of what stands before the text; nothing for kinds that adapt modules."""
        rows = self.tensors.get(prompts.inner(prompts.ROWS))
        return {} if rows is None else prompts.held(rows.astype(np.float32), self.settings, base)


def _idle(terms: Terms) -> bool:
    """Tell whether terms add nothing: no rank was left, or one side is zero, as in what only carries biases."""
    if terms.present != ["a_rk", "b_nr"]:
        return False
    return not (np.any(terms.a_rk) and np.any(terms.b_nr))


def _with_bias(terms: Terms, module: str, bias: np.ndarray, adapter: Adapter, base: Base | None) -> Terms:
    """Return the terms with a bias that was trained in place of the base's."""
    if terms.bias is None:
        return dataclasses.replace(terms, bias=bias)
    own = base.bias(module) if base is not None else None
    if terms.s_out is not None:  # IA3 scales the bias too
        return dataclasses.replace(terms, bias=bias * terms.s_out)
    return dataclasses.replace(terms, bias=terms.bias + (bias if own is None else bias - own))


def read(
    folder: Path,
    base_digest: str | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    heads: Iterable[str] = (),
    base: Base | None = None,
    foreign: bool = False,
) -> Adapter:
    """Read and check an adapter folder.

    base_digest: the base it has to belong to.  shapes: {module: (N, K)} of the base's linears.  heads: modules whose
    trained weights it has to hold.  base: all of that in one.  foreign: it may name no base, as one that PEFT saved.
    Raises ArtifactError that lists every reason against using it.
    """
    settings = read_settings(folder)
    tensors, metadata = _tensors(folder, settings.get("peft_type") in prompts.TYPES)
    copies = {name: tensors.pop(name) for name in list(tensors) if name.endswith(COPIES)}
    if base is not None:
        base_digest, shapes, heads = base.digest, {**base.linears, **base.embeddings}, heads or base.heads
    adapter = Adapter(settings, tensors, metadata, shapes or {})
    unnamed = foreign and "edgepeft.base" not in metadata
    problems = checks.base_problems(metadata, None if unnamed else base_digest or None)
    if settings.get("peft_type") not in KINDS:
        known = ", ".join(sorted(KINDS))
        problems.append(
            f"peft_type {settings.get('peft_type')!r} is not supported; known: {known}. Train with one of these, or "
            "build from the model with this one merged in, where PEFT can (merge_and_unload)."
        )
        raise ArtifactError("\n".join(f"{folder}: {problem}" for problem in problems))
    problems += checks.setting_problems(settings) + checks.tensor_problems(adapter)
    problems += checks.tie_problems(adapter) + checks.head_problems(adapter, heads)
    if adapter.kind.prompt:
        about = base.settings if base is not None else None
        problems += prompts.problems(adapter.tensors.get(prompts.inner(prompts.ROWS)), settings, about)
    problems += checks.shape_problems(adapter, shapes)
    if base is not None:
        problems += checks.whole_problems(adapter, base) + checks.copy_problems(copies, base)
    if problems:
        raise ArtifactError("\n".join(f"{folder}: {problem}" for problem in problems))
    return _with_common(adapter, shapes)


def _tensors(folder: Path, prompt: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors of a folder, bfloat16 widened, without PEFT's own copies; and the metadata."""
    header, metadata, start = tensor_header(folder / TENSORS)
    found = {}
    for name, entry in header.items():
        if not any(part in name for part in SHADOWS):
            found[prompts.inner(name) if prompt else name] = read_tensor(folder / TENSORS, entry, start)
    return found, metadata


def _with_common(adapter: Adapter, shapes: Mapping[str, tuple[int, int]] | None) -> Adapter:
    """Return a VeRA with its shared matrices, drawn anew where the file leaves them out."""
    if adapter.kind.peft_type != "VERA" or "base_model.vera_A" in adapter.tensors or shapes is None:
        return adapter
    largest = [max((shapes[name][axis] for name in adapter.modules if name in shapes), default=1) for axis in (0, 1)]
    drawn = {f"base_model.{name}": value for name, value in vera_projections(adapter.settings, *largest).items()}
    return dataclasses.replace(adapter, tensors={**adapter.tensors, **drawn})


# --- writing -----------------------------------------------------------------------------------------------------


def write(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], base_digest: str, weight_format: str
) -> None:
    """Write an adapter folder's two files; equal content gives equal bytes."""
    metadata = {"format": "pt", "edgepeft.base": base_digest, "edgepeft.format": weight_format}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, {key: _plain(value) for key, value in settings.items()})
    if settings.get("peft_type") in prompts.TYPES:
        tensors = {prompts.outer(name): array for name, array in tensors.items()}
    write_tensors(folder / TENSORS, tensors, metadata)


def _plain(value: Any) -> Any:
    """Turn what PEFT's configuration holds into JSON of one spelling: sets and name lists sorted."""
    if isinstance(value, (set, frozenset)) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return sorted(value)
    return getattr(value, "value", value)


def write_device(folder: Path, source: Path, **expected: Any) -> Adapter:
    """Write the device form of the PEFT folder `source` and return what PEFT reads of it; `expected` goes to `read`."""
    from edgepeft.adapt.device import write_form

    adapter = read(source, **expected)
    return write_form(folder, adapter, expected.get("base"))
