"""PEFT adapter folders: adapter_config.json + adapter_model.safetensors, read exactly or refused.

Reading checks everything at once: each setting that changes the result is understood or off, each tensor belongs to a
module, shapes agree with rank and base, values are finite, and the base is the one the adapter was trained on. What a
kind of adapter understands stands in its row (`kinds`). Any other setting that is switched on is refused, also one this
version has never heard of: a converter that skips it would be wrong silently.

Besides the terms of modules an adapter may bring whole tensors: those of modules_to_save and, with bias "all" or
"..._only", biases. A linear's bias becomes a term, all other tensors take the place of the base's own.

Writing gives equal bytes for equal content; `device` writes what a device reads. The safetensors metadata names the
base: {"format": "pt", "edgepeft.base": sha256, "edgepeft.format": tag}.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.adapt import prompts
from edgepeft.adapt.foreign import some
from edgepeft.adapt.foreign.peft import read_settings
from edgepeft.adapt.kinds import (
    KINDS,
    WITHOUT_EFFECT,
    Kind,
    Module,
    lora_group,
    lora_rank,
    lora_scale,
    vera_projections,
)  # fmt: skip
from edgepeft.adapt.terms import BOTTLENECK, PARALLEL, PREFIX, ROUTER, Effect, Terms
from edgepeft.artifact import read_tensor, tensor_header, write_json, write_tensors
from edgepeft.errors import ArtifactError

if TYPE_CHECKING:
    from edgepeft.adapt.base import Base

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
INITS_OF_A_AND_B = {True, False, "gaussian", "orthogonal", "eva"}  # the others change the base weights too
SHADOWS = (".original_module.", ".modules_to_save.")  # PEFT's own copies of what stands under its plain name as well
COPIES = tuple(f".base_layer.{part}" for part in ("weight", "qweight", "qscale"))  # of adapted embeddings and heads
SAME_ERROR = 1e-3
RANKS = ("r", "init_r")
ALPHAS = ("lora_alpha", "alpha")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter folder that passed all checks: settings, {PEFT name: array}, safetensors metadata."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]

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
        return Module(name, self._by_module[name], self.settings, common)

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
    adapter = Adapter(settings, tensors, metadata)
    problems = _base_problems(metadata, None if foreign and "edgepeft.base" not in metadata else base_digest)
    if settings.get("peft_type") not in KINDS:
        known = ", ".join(sorted(KINDS))
        problems.append(f"peft_type {settings.get('peft_type')!r} is not supported; known: {known}.")
        raise ArtifactError("\n".join(f"{folder}: {problem}" for problem in problems))
    problems += _setting_problems(settings) + _tensor_problems(adapter) + _head_problems(adapter, heads)
    if adapter.kind.prompt:
        problems += prompts.problems(adapter.tensors.get(prompts.inner(prompts.ROWS)), settings, base)
    if not problems:
        adapter = _with_common(adapter, shapes)
        problems = _shape_problems(adapter, shapes)
    if not problems and base is not None:
        problems = _whole_problems(adapter, base) + _copy_problems(copies, base)
    if problems:
        raise ArtifactError("\n".join(f"{folder}: {problem}" for problem in problems))
    return adapter


def _tensors(folder: Path, prompt: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors of a folder, bfloat16 widened, without PEFT's own copies; and the metadata."""
    header, metadata, start = tensor_header(folder / TENSORS)
    found = {}
    for name, entry in header.items():
        if not any(part in name for part in SHADOWS):
            found[prompts.inner(name) if prompt else name] = read_tensor(folder / TENSORS, entry, start)
    return found, metadata


def _base_problems(metadata: Mapping[str, str], base_digest: str | None) -> list[str]:
    if base_digest is None or (found := metadata.get("edgepeft.base")) == base_digest:
        return []
    if found is None:
        return [f"does not say which base it was trained on (metadata edgepeft.base); expected {base_digest[:12]}…"]
    return [f"trained on another base: expected {base_digest[:12]}…, found {found[:12]}…. Train it on this base."]


def _setting_problems(settings: Mapping[str, Any]) -> list[str]:
    """Name each setting that would change the result in a way the kind's row does not carry out."""
    kind, problems = KINDS[settings["peft_type"]], []
    for name in sorted(set(settings) - kind.understood - kind.training - WITHOUT_EFFECT):
        if name == "bias" and settings[name] == "none":
            continue
        if settings[name] not in (None, False) and settings[name] != {} and settings[name] != []:
            problems.append(f"{name} = {settings[name]!r} is not supported; train without it.")
    start = settings.get("init_lora_weights", True)
    if "init_lora_weights" in kind.training and str(start) not in {str(value) for value in INITS_OF_A_AND_B}:
        problems.append(
            f"init_lora_weights = {start!r} changed the base weights as well; convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), or give the changed base as the model and "
            "set init_lora_weights to true."
        )
    if settings.get("use_qalora") and (settings.get("use_dora") or not _whole(settings.get("qalora_group_size", 16))):
        problems.append("use_qalora: expected a whole qalora_group_size and no use_dora, which PEFT has not together.")
    if settings.get("use_dora") and settings.get("lora_bias"):
        problems.append("use_dora with lora_bias: PEFT leaves that bias out, so it says two things; train with one.")
    return problems + _number_problems(settings)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number_problems(settings: Mapping[str, Any]) -> list[str]:
    """Check ranks, alpha and their two patterns."""
    problems = []
    ranks, alphas = ([name for name in names if name in settings] for names in (RANKS, ALPHAS))
    patterns = (("rank_pattern", ranks), ("alpha_pattern", alphas)) if settings["peft_type"] != "ADALORA" else ()
    for name in {*ranks, *alphas}:
        problems += _not_above_zero(name, settings[name], settings["peft_type"] == "ADALORA")
    for pattern, _ in patterns:
        table = settings.get(pattern) or {}
        if not isinstance(table, dict):
            return [f"{pattern} should be an object, found {table!r}."]
        for key, value in table.items():
            problems += _not_above_zero(key, value)
            try:
                re.compile(key)
            except re.error as error:
                problems.append(f"{pattern} key {key!r} is no regular expression: {error}.")
    return problems


def _not_above_zero(name: str, value: Any, zero: bool = False) -> list[str]:
    number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    fine = number and (value > 0 or (zero and value >= 0))
    return [] if fine else [f"{name} should be a number above 0, found {value!r}."]


def _saved(inner: str, settings: Mapping[str, Any]) -> bool:
    """Tell whether a tensor below the prefix belongs to a module of modules_to_save, which PEFT finds by its ending."""
    return any(f"{name}." in inner for name in settings.get("modules_to_save") or ())


def _tensor_problems(adapter: Adapter) -> list[str]:
    """Each tensor belongs to a module, to a head or is a bias; all are finite floats; modules are complete."""
    settings, kind = adapter.settings, adapter.kind
    with_bias = settings.get("bias", "none") != "none"
    common = {f"base_model.{name}" for name in kind.common}
    strange, broken = [], []
    for name, value in sorted(adapter.tensors.items()):
        inner = name.removeprefix(PREFIX)
        biased = with_bias and inner.endswith(".bias")
        if not (kind.match(inner) or name in common or _saved(inner, settings) or biased):
            strange.append(name)
        if value.dtype.kind != "f" or not np.isfinite(value).all():
            broken.append(f"{name} ({value.dtype})")
    problems = _incomplete(adapter)
    if strange:
        problems.append(f"{len(strange)} tensors belong to nothing that is supported: {some(strange)}.")
    if broken:
        problems.append(f"{len(broken)} tensors hold NaN, infinity or no floats: {some(broken)}. Train again.")
    if not adapter.modules and not adapter.whole and not kind.prompt:
        problems.append(f"no {settings['peft_type']} tensors: it would load and do nothing.")
    return problems


def _incomplete(adapter: Adapter) -> list[str]:
    """Return what modules lack, and which of their tensors the settings do not mention."""
    problems = []
    for name in adapter.modules:
        tensors = adapter.module(name).tensors
        if missing := adapter.kind.missing(tensors):
            problems.append(f"{name}: {missing} is missing.")
        for flag, ending in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
            told = bool(adapter.settings.get(flag)) and adapter.kind.peft_type == "LORA"
            if told and flag == "use_dora" and "lora_embedding_A" in tensors:
                problems.append(f"{name}: DoRA on an embedding is not supported; leave it out of target_modules.")
            elif told != (ending in tensors):
                problems.append(f"{name}: {ending} belongs to {flag} = true, which is {told} here.")
    return problems


def _head_problems(adapter: Adapter, heads: Iterable[str]) -> list[str]:
    missing = [head for head in heads if f"{PREFIX}{head}.weight" not in adapter.tensors]
    return [f"the trained head {head!r} is missing; train with modules_to_save=[{head!r}]." for head in missing]


def _with_common(adapter: Adapter, shapes: Mapping[str, tuple[int, int]] | None) -> Adapter:
    """Return a VeRA with its shared matrices, drawn anew where the file leaves them out."""
    if adapter.kind.peft_type != "VERA" or "base_model.vera_A" in adapter.tensors or shapes is None:
        return adapter
    largest = [max((shapes[name][axis] for name in adapter.modules if name in shapes), default=1) for axis in (0, 1)]
    drawn = {f"base_model.{name}": value for name, value in vera_projections(adapter.settings, *largest).items()}
    return dataclasses.replace(adapter, tensors={**adapter.tensors, **drawn})


def _shape_problems(adapter: Adapter, shapes: Mapping[str, tuple[int, int]] | None) -> list[str]:
    """Compare the shapes of a module's tensors with the settings' rank and the base's modules."""
    problems = []
    for name in adapter.modules:
        tensors = {ending: list(value.shape) for ending, value in adapter.module(name).tensors.items()}
        if adapter.settings.get("use_qalora") and len(tensors.get("lora_A.weight", ())) == 2:
            tensors["lora_A.weight"][1] *= lora_group(adapter.settings)
        if shapes is not None and name not in shapes:
            problems.append(f"{name}: the base has no such linear.")
        elif wrong := _wrong_shape(adapter, name, tensors, shapes):
            problems.append(f"{name}: {wrong}")
    return problems


def _wrong_shape(
    adapter: Adapter, name: str, tensors: Mapping[str, list[int]], shapes: Mapping[str, tuple[int, int]] | None
) -> str:
    """Return what is wrong with a module's shapes, or nothing."""
    wanted = None if shapes is None else list(shapes[name])
    turned = "lora_embedding_A" in tensors
    if "lora_A.weight" in tensors or turned:
        sides = ("lora_embedding_A", "lora_embedding_B") if turned else ("lora_A.weight", "lora_B.weight")
        a, b = (tensors[side] for side in sides)
        rank = adapter.rank(name)
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            return f"expected lora_A [{rank}, K], lora_B [N, {rank}], found {a}, {b}."
    found = _implied_shape(adapter.kind.peft_type, tensors)
    if found is None:
        return f"its tensors do not go together: {tensors}."
    if wanted is not None and any(f and f != w for f, w in zip(found, wanted[::-1] if turned else wanted, strict=True)):
        return f"the base's linear is {wanted}, the adapter's {found}."
    vectors = [e for e in ("lora_magnitude_vector", "lora_B.bias") if e in tensors and tensors[e] != [found[0]]]
    return f"{vectors[0]} is {tensors[vectors[0]]}, expected [{found[0]}]." if vectors else ""


def _implied_shape(peft_type: str, shapes: Mapping[str, list[int]]) -> list[int] | None:
    """Return [N, K] of the linear that a module's tensors fit, 0 where they do not say, or None when they clash."""
    try:
        if peft_type in ("LORA", "EXPERTS"):
            names = sorted(name for name in shapes if name.startswith(("lora_A", "lora_B.w", "lora_emb")))
            a, b = (shapes[name] for name in names)
            experts, width = shapes.get(ROUTER, [1, a[1]])
            split = experts > 0 and a[0] % experts == 0 and width == a[1]
            return [b[0], a[1]] if a[0] == b[1] and split else None
        if peft_type in ("BOTTLENECK", "PARALLEL"):
            endings = BOTTLENECK if peft_type == "BOTTLENECK" else PARALLEL
            down, d, up, u = (shapes[name] for name in endings)
            return [up[0], 0] if down == up[::-1] and d == down[:1] and u == up[:1] else None
        if peft_type == "ADALORA":
            a, b, e = shapes["lora_A"], shapes["lora_B"], shapes["lora_E"]
            return [b[0], a[1]] if a[0] == b[1] == e[0] and e[1] == 1 else None
        if peft_type == "VERA":
            return [shapes["vera_lambda_b"][0], 0]
        if peft_type == "IA3":
            rows, columns = shapes["ia3_l"]
            return [0, columns] if rows == 1 else ([rows, 0] if columns == 1 else None)
        if peft_type == "LOHA":
            (n, _), (_, k) = shapes["hada_w1_a"], shapes["hada_w1_b"]
            same = shapes["hada_w2_a"][0] == n and shapes["hada_w2_b"][1] == k
            return [n, k] if same else None
        sides = [_product_shape(shapes, name) for name in ("lokr_w1", "lokr_w2")]
        return [sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]]
    except (ValueError, IndexError, KeyError):
        return None


def _product_shape(shapes: Mapping[str, list[int]], name: str) -> list[int]:
    return shapes[name] if name in shapes else [shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]]


def _whole_problems(adapter: Adapter, base: Base) -> list[str]:
    """Each whole tensor has a place: a head's, a bias of a linear, or a tensor that the base holds in float."""
    floats, problems = base.floats(), []
    tied = {base.stored(name) for name in base.linears if base.stored(name) != name}
    for name, value in adapter.whole.items():
        module = name.rpartition(".")[0]
        linear = name.endswith(".bias") and module in base.linears
        if name.split(".")[0] in base.heads or (linear and value.shape == base.linears[module][:1]):
            continue
        if module in tied:
            problems.append(f"{name} replaces an embedding that is the head too, which would change; adapt it by LoRA.")
        elif name not in floats:
            problems.append(
                f"{name} is packed in the base, so a whole new one cannot take its place; adapt it by LoRA "
                "(target_modules in place of modules_to_save), or quantize with it kept in float."
            )
        elif value.shape != floats[name]:
            problems.append(f"{name}: expected {list(floats[name])}, found {list(value.shape)}.")
    return problems


def _copy_problems(copies: Mapping[str, np.ndarray], base: Base) -> list[str]:
    """PEFT saves an adapted embedding's own weight too; it has to be the base's, as far as a packed one can tell.

    A float weight is the one that was packed when its distance from the packed one is the one measured at packing.
    """
    problems = []
    for name, value in copies.items():
        module, _, part = name.removeprefix(PREFIX).partition(".base_layer.")
        if module not in {**base.linears, **base.embeddings}:
            same = False
        elif part != "weight":
            same = np.array_equal(base.tensors[f"{base.stored(module)}.{part}"], value)
        else:
            wanted, measured = base.weight(module), base.relative_error(module)
            found = np.linalg.norm(value - wanted) / np.linalg.norm(value) if value.shape == wanted.shape else np.inf
            same = abs(float(found) - measured) <= SAME_ERROR * max(measured, SAME_ERROR)
        if not same:
            problems.append(
                f"{name} is not the base's own: the vocabulary was resized or the embedding trained. Give the model "
                "with that embedding as the base."
            )
    return problems


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
