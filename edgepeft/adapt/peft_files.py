"""PEFT adapter folders: adapter_config.json + adapter_model.safetensors, read exactly or refused, written for both.

Reading checks everything at once: each setting that changes the result is understood or off, each tensor belongs to a
module, shapes agree with rank and base, values are finite, and the base is the one the adapter was trained on.
Settings understood: r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, modules_to_save. Any other setting that is
switched on is refused, also one this version has never heard of: a converter that skips it would be wrong silently.

Writing gives equal bytes for equal content. The device form has its scale folded into lora_B and alpha == r (through
rank_pattern too), so PEFT, which multiplies by alpha / r = 1, and the device compute the same from one file.

The safetensors metadata names the base: {"format": "pt", "edgepeft.base": sha256, "edgepeft.format": tag}.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.adapt.methods import METHODS, PREFIX
from edgepeft.artifact import read_json, read_tensor, tensor_header, write_json, write_tensors
from edgepeft.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
UNDERSTOOD = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "peft_type"}
WITHOUT_EFFECT = {  # where and how it was trained; the tensors carry the outcome
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core", "eva_config",
    "qalora_group_size", "runtime_config", "peft_version", "init_lora_weights", "bias",
}  # fmt: skip
INITS_OF_A_AND_B = {True, False, "gaussian", "orthogonal", "eva"}  # the others change the base weights too
LORA_TENSOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter folder that passed all checks: settings, {PEFT name: array}, safetensors metadata."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]

    @property
    def modules(self) -> list[str]:
        """The adapted modules, under the base model's own names, sorted."""
        return sorted({match["module"] for name in self.tensors if (match := LORA_TENSOR.match(name))})

    @property
    def heads(self) -> dict[str, np.ndarray]:
        """The tensors trained in full, float32, under PEFT's names."""
        return {n: t.astype("float32") for n, t in self.tensors.items() if not LORA_TENSOR.match(n)}

    def rank(self, module: str) -> int:
        """Return R as the settings state it."""
        return _by_pattern(self.settings.get("rank_pattern"), module, self.settings.get("r", 8))

    def scale(self, module: str) -> float:
        """Return what lora_B·lora_A is multiplied by."""
        alpha = _by_pattern(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha", 8))
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that ends the module's name, as PEFT resolves it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read(
    folder: Path,
    base_digest: str | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    heads: Iterable[str] = (),
) -> Adapter:
    """Read and check an adapter folder.

    base_digest: the base it has to belong to.  shapes: {module: (N, K)} of the base's linears.  heads: modules whose
    trained weights it has to hold. Raises ArtifactError that lists every reason against using it.
    """
    settings = read_json(folder / SETTINGS)
    if not isinstance(settings, dict):
        raise ArtifactError(f"{folder / SETTINGS}: expected a JSON object, found {type(settings).__name__}.")
    header, metadata, base = tensor_header(folder / TENSORS)
    tensors = {name: read_tensor(folder / TENSORS, entry, base) for name, entry in header.items()}
    adapter = Adapter(settings, tensors, metadata)
    problems = _base_problems(metadata, base_digest) + _setting_problems(settings)
    problems += _tensor_problems(tensors, settings) + _head_problems(adapter, heads)
    if not problems:
        problems = _shape_problems(adapter, shapes)
    if problems:
        raise ArtifactError("\n".join(f"{folder}: {problem}" for problem in problems))
    return adapter


def _base_problems(metadata: Mapping[str, str], base_digest: str | None) -> list[str]:
    if base_digest is None or (found := metadata.get("edgepeft.base")) == base_digest:
        return []
    if found is None:
        return [f"does not say which base it was trained on (metadata edgepeft.base); expected {base_digest[:12]}…"]
    return [f"trained on another base: expected {base_digest[:12]}…, found {found[:12]}…. Train it on this base."]


def _setting_problems(settings: Mapping[str, Any]) -> list[str]:
    """Name each setting that would change the result in a way the equation's row does not carry out."""
    kinds = {row.peft_type for row in METHODS.values()}
    problems = []
    if settings.get("peft_type") not in kinds:
        problems.append(f"peft_type {settings.get('peft_type')!r} is not supported; known: {', '.join(sorted(kinds))}.")
    for name in sorted(set(settings) - UNDERSTOOD - WITHOUT_EFFECT):
        if settings[name] not in (None, False) and settings[name] != {} and settings[name] != []:
            problems.append(f"{name} = {settings[name]!r} is not supported; train without it.")
    if settings.get("bias", "none") != "none":
        problems.append(f"bias = {settings['bias']!r}: trained biases are not supported; train with bias 'none'.")
    if str(settings.get("init_lora_weights", True)) not in {str(value) for value in INITS_OF_A_AND_B}:
        problems.append(
            f"init_lora_weights = {settings['init_lora_weights']!r} changed the base weights as well; convert it with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    return problems + _number_problems(settings)


def _number_problems(settings: Mapping[str, Any]) -> list[str]:
    """Check r, lora_alpha and the two patterns."""
    problems = []
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        table = settings.get(pattern) or {}
        if not isinstance(table, dict):
            return [f"{pattern} should be an object, found {table!r}."]
        for key, value in {name: settings.get(name, 8), **table}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0 or not math.isfinite(value):
                problems.append(f"{key} should be a number above 0, found {value!r}.")
        for key in table:
            try:
                re.compile(key)
            except re.error as error:
                problems.append(f"{pattern} key {key!r} is no regular expression: {error}.")
    return problems


def _tensor_problems(tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> list[str]:
    """Each tensor is one side of a pair or belongs to a head; all are finite floats; pairs are complete."""
    import numpy as np

    saved = tuple(f"{PREFIX}{name}." for name in settings.get("modules_to_save") or ())
    sides: dict[str, set[str]] = {}
    strange, broken = [], []
    for name, value in sorted(tensors.items()):
        if match := LORA_TENSOR.match(name):
            sides.setdefault(match["module"], set()).add(match["side"])
        elif not (saved and name.startswith(saved)):
            strange.append(name)
        if value.dtype.kind != "f" or not np.isfinite(value).all():
            broken.append(f"{name} ({value.dtype})")
    half = {module: "B" if side == {"A"} else "A" for module, side in sides.items() if len(side) < 2}
    problems = [f"{module}: lora_{side} is missing." for module, side in half.items()]
    if strange:
        problems.append(f"{len(strange)} tensors belong to nothing that is supported: {_some(strange)}.")
    if broken:
        problems.append(f"{len(broken)} tensors hold NaN, infinity or no floats: {_some(broken)}. Train again.")
    if not sides:
        problems.append("no LoRA tensors: it would load and do nothing.")
    return problems


def _head_problems(adapter: Adapter, heads: Iterable[str]) -> list[str]:
    missing = [head for head in heads if f"{PREFIX}{head}.weight" not in adapter.tensors]
    return [f"the trained head {head!r} is missing; train with modules_to_save=[{head!r}]." for head in missing]


def _shape_problems(adapter: Adapter, shapes: Mapping[str, tuple[int, int]] | None) -> list[str]:
    """Compare A [R, K] and B [N, R] with the settings' rank and the base's linears."""
    problems = []
    for module in adapter.modules:
        a, b = (adapter.tensors[f"{PREFIX}{module}.lora_{side}.weight"].shape for side in "AB")
        rank = adapter.rank(module)
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            problems.append(f"{module}: expected lora_A [{rank}, K], lora_B [N, {rank}], found {list(a)}, {list(b)}.")
        elif shapes is not None and module not in shapes:
            problems.append(f"{module}: the base has no such linear.")
        elif shapes is not None and (b[0], a[1]) != tuple(shapes[module]):
            problems.append(f"{module}: the base's linear is {list(shapes[module])}, the adapter's {[b[0], a[1]]}.")
    return problems


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# --- writing -----------------------------------------------------------------------------------------------------


def write(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], base_digest: str, weight_format: str
) -> None:
    """Write an adapter folder's two files; equal content gives equal bytes."""
    metadata = {"format": "pt", "edgepeft.base": base_digest, "edgepeft.format": weight_format}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, {key: _plain(value) for key, value in settings.items()})
    write_tensors(folder / TENSORS, tensors, metadata)


def _plain(value: Any) -> Any:
    """Turn what PEFT's configuration holds into JSON of one spelling: sets and name lists sorted."""
    if isinstance(value, (set, frozenset)) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return sorted(value)
    return getattr(value, "value", value)


def write_device(folder: Path, source: Path, **expected: Any) -> Adapter:
    """Write the device form of the PEFT folder `source`: float16, scale in lora_B, alpha == r; return what was written.

    `expected` (base_digest, shapes, heads) goes to `read`.
    """
    adapter = read(source, **expected)
    row = next(row for row in METHODS.values() if row.peft_type == adapter.settings["peft_type"])
    settings = device_settings(adapter)
    tensors = {**row.half_terms(adapter), **adapter.heads}
    digest, tag = (adapter.metadata.get(key, "") for key in ("edgepeft.base", "edgepeft.format"))
    write(folder, settings, tensors, digest, tag)
    return Adapter(settings, tensors, adapter.metadata)


def device_settings(adapter: Adapter) -> dict[str, Any]:
    """Return the settings under which PEFT scales by exactly 1 everywhere; patterns become one entry per module."""
    rank = adapter.settings.get("r", 8)
    ranks = {module: adapter.rank(module) for module in adapter.modules if adapter.rank(module) != rank}
    own = {"lora_alpha": rank, "rank_pattern": ranks, "alpha_pattern": ranks, "use_rslora": False}
    return {**adapter.settings, **own, "r": rank, "inference_mode": True, "lora_dropout": 0.0}
