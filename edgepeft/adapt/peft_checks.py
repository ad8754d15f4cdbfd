"""What speaks against an adapter folder: its settings, tensors, shapes and base, each problem in words.

Every function returns all it finds, and of what others have found unfit it says nothing more, so that
`peft_files.read` can name everything at once. What is said of many modules names the first few. Nothing is let through
that the kind's row (`kinds`) does not understand.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.adapt.foreign import some
from edgepeft.adapt.kinds import KINDS, WITHOUT_EFFECT, lora_group
from edgepeft.adapt.terms import BOTTLENECK, PARALLEL, PREFIX, ROUTER

if TYPE_CHECKING:
    from edgepeft.adapt.base import Base
    from edgepeft.adapt.peft_files import Adapter

INITS_OF_A_AND_B = {True, False, "gaussian", "orthogonal", "eva", "mica"}  # the others change the base weights too
CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")  # what they begin with is what they took from the base
SAME_ERROR = 1e-3
SHOWN = 4  # modules that a problem is told of one by one
OWN_MODEL = "save the model with that tensor in it, give that as --model, and leave it out of the adapter"
HEAD = "lm_head"
RANKS = ("r", "init_r")
ALPHAS = ("lora_alpha", "alpha")


def base_problems(metadata: Mapping[str, str], base_digest: str | None) -> list[str]:
    """Return what speaks against the base that the metadata name."""
    if base_digest is None or (found := metadata.get("edgepeft.base")) == base_digest:
        return []
    if found is None:
        return [f"does not say which base it was trained on (metadata edgepeft.base); expected {base_digest[:12]}…"]
    return [f"trained on another base: expected {base_digest[:12]}…, found {found[:12]}…. Train it on this base."]


def setting_problems(settings: Mapping[str, Any]) -> list[str]:
    """Name each setting that would change the result in a way the kind's row does not carry out."""
    kind, problems = KINDS[settings["peft_type"]], []
    for name in sorted(set(settings) - kind.understood - kind.training - WITHOUT_EFFECT):
        if name == "bias" and settings[name] == "none":
            continue
        if settings[name] not in (None, False) and settings[name] != {} and settings[name] != []:
            problems.append(f"{name} = {settings[name]!r} is not supported; train without it.")
    start = settings.get("init_lora_weights", True)
    if "init_lora_weights" in kind.training and str(start) not in {str(value) for value in INITS_OF_A_AND_B}:
        convert = "convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), or "
        problems.append(
            f"init_lora_weights = {start!r} changed the base weights as well; "
            f"{convert if str(start).startswith(CONVERTIBLE) else ''}give the changed base as the model and set "
            "init_lora_weights to true."
        )
    if settings.get("use_qalora") and (settings.get("use_dora") or not _whole(settings.get("qalora_group_size", 16))):
        problems.append("use_qalora: expected a whole qalora_group_size and no use_dora, which PEFT has not together.")
    if settings.get("use_dora") and settings.get("lora_bias"):
        problems.append("use_dora with lora_bias: PEFT leaves that bias out, so it says two things; train with one.")
    return problems + number_problems(settings)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def number_problems(settings: Mapping[str, Any]) -> list[str]:
    """Check ranks, alpha and their two patterns, without which no rank can be told."""
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


def tensor_problems(adapter: Adapter) -> list[str]:
    """Each tensor belongs to a module, to a head or is a bias; all are finite floats; modules are complete."""
    settings, kind = adapter.settings, adapter.kind
    strange = sorted(name for name in adapter.tensors if not _known(adapter, name))
    broken = [
        f"{name} ({value.dtype})"
        for name, value in sorted(adapter.tensors.items())
        if value.dtype.kind != "f" or not np.isfinite(value).all()
    ]
    problems = few(_incomplete(adapter))
    if left_out := [name for name in adapter.modules if not _targeted(name, settings)]:
        problems.append(
            f"{some(left_out)}: target_modules does not name them ({len(left_out)} of {len(adapter.modules)} modules), "
            "so PEFT leaves their tensors out. Name them there, or save the adapter again."
        )
    if strange:
        problems.append(f"{len(strange)} tensors belong to nothing that is supported: {some(strange)}.")
    if broken:
        problems.append(f"{len(broken)} tensors hold NaN, infinity or no floats: {some(broken)}. Train again.")
    if not adapter.modules and not adapter.whole and not kind.prompt:
        problems.append(f"no {settings['peft_type']} tensors: it would load and do nothing.")
    return problems


def _known(adapter: Adapter, name: str) -> bool:
    """Tell whether a tensor belongs to a module, to all of them, to a head, or is a bias that was trained."""
    settings, inner = adapter.settings, name.removeprefix(PREFIX)
    biased = settings.get("bias", "none") != "none" and inner.endswith(".bias")
    common = {f"base_model.{name}" for name in adapter.kind.common}
    return bool(adapter.kind.match(inner)) or name in common or _saved(inner, settings) or biased


def _targeted(module: str, settings: Mapping[str, Any]) -> bool:
    """Tell whether target_modules names a module as PEFT reads it; what it looks up in the model is believed."""
    targets = settings.get("target_modules")
    tied = settings.get("ensure_weight_tying") and module.rpartition(".")[2] == HEAD
    if tied or settings.get("target_parameters"):
        return True
    if isinstance(targets, str) and targets != "all-linear":
        try:
            return re.fullmatch(targets, module) is not None
        except re.error:
            return False
    return not isinstance(targets, list) or any(f".{module}".endswith(f".{name}") for name in targets)


def few(problems: list[str]) -> list[str]:
    """Return the first of what is said of one module each, and how many more there are."""
    more = len(problems) - SHOWN
    return problems if more <= 0 else [*problems[:SHOWN], f"{more} more modules likewise."]


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


def tie_problems(adapter: Adapter) -> list[str]:
    """With ensure_weight_tying an adapted embedding and its head have the same two matrices, and both are saved."""
    if adapter.kind.peft_type != "LORA" or not adapter.settings.get("ensure_weight_tying"):
        return []
    parts = {name: adapter.module(name).tensors for name in adapter.modules}
    tables = {name: part for name, part in parts.items() if {"lora_embedding_A", "lora_embedding_B"} <= set(part)}
    heads = {name: part for name, part in parts.items() if name.rpartition(".")[2] == HEAD and name not in tables}
    alone = {*tables, *heads}
    for (table, one), (head, other) in itertools.product(tables.items(), heads.items()):
        turned = {"lora_A.weight": one["lora_embedding_B"].T, "lora_B.weight": one["lora_embedding_A"].T}
        if all(ending in other and np.array_equal(other[ending], array) for ending, array in turned.items()):
            alone -= {table, head}
    if not alone:
        return []
    return [
        f"ensure_weight_tying = True gives an embedding and its head the same two matrices; {some(sorted(alone))} has "
        "none of the same here. Save the adapter again with PEFT, or set it to false where the model ties nothing."
    ]


def head_problems(adapter: Adapter, heads: Iterable[str]) -> list[str]:
    """Return which trained heads are missing."""
    missing = [head for head in heads if f"{PREFIX}{head}.weight" not in adapter.tensors]
    return [f"the trained head {head!r} is missing; train with modules_to_save=[{head!r}]." for head in missing]


def shape_problems(adapter: Adapter, shapes: Mapping[str, tuple[int, int]] | None) -> list[str]:
    """Compare the shapes of a module's tensors with the settings' rank and the base's modules.

    Modules that lack a tensor are left out, and ranks where the settings' numbers are wrong: both are said elsewhere.
    """
    problems, strange = [], [name for name in adapter.modules if shapes is not None and name not in shapes]
    ranked = not number_problems(adapter.settings)
    for name in adapter.modules:
        tensors = {ending: list(value.shape) for ending, value in adapter.module(name).tensors.items()}
        if len(tensors.get("lora_A.weight", ())) == 2:
            tensors["lora_A.weight"][1] *= lora_group(adapter.settings)
        whole = ranked and name not in strange and not adapter.kind.missing(tensors)
        if whole and (wrong := _wrong_shape(adapter, name, tensors, shapes)):
            problems.append(f"{name}: {wrong}")
    return [*_strangers(strange, len(adapter.modules)), *few(problems)]


def _strangers(names: list[str], count: int) -> list[str]:
    """Say once which modules the base has not."""
    if not names:
        return []
    return [
        f"{some(names)}: the base has no such linear or embedding ({len(names)} of {count} modules). It is for another "
        "model, or its names differ: `edgepeft doctor ADAPTER BASE` compares them."
    ]


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


def whole_problems(adapter: Adapter, base: Base) -> list[str]:
    """Each whole tensor has a place: a head's, a bias of a linear, or a tensor that the base holds in float."""
    floats, packed, problems, lost = base.floats(), {**base.linears, **base.embeddings}, [], []
    tied = {base.stored(name) for name in base.linears if base.stored(name) != name}
    for name, value in adapter.whole.items():
        module = name.rpartition(".")[0]
        linear = name.endswith(".bias") and module in base.linears
        if not _known(adapter, f"{PREFIX}{name}"):
            continue
        if name.split(".")[0] in base.heads or (linear and value.shape == base.linears[module][:1]):
            continue
        if module in tied:
            problems.append(
                f"{name} replaces an embedding that is the head too, which would change; adapt it by LoRA, or "
                f"{OWN_MODEL}."
            )
        elif name not in floats and not (name.endswith(".weight") and module in packed):
            lost.append(name)
        elif name not in floats:
            problems.append(
                f"{name} is packed in the base, so a whole new one cannot take its place; adapt it by LoRA "
                f"(target_modules in place of modules_to_save){_or_float(module, base)}, or {OWN_MODEL}."
            )
        elif value.shape != floats[name]:
            problems.append(f"{name}: expected {list(floats[name])}, found {list(value.shape)}.")
    if lost:
        problems.append(f"{some(lost)}: the base has no such tensor. Is the adapter for another model, or task?")
    return problems


def _or_float(module: str, base: Base) -> str:
    return ", or build with --embedding-format float" if module in base.embeddings else ""


def copy_problems(copies: Mapping[str, np.ndarray], base: Base) -> list[str]:
    """PEFT saves an adapted embedding's own weight too; it has to be the base's, as far as a packed one can tell.

    A float weight is the one that was packed when its distance from the packed one is the one measured at packing.
    """
    problems = []
    for name, value in copies.items():
        module, _, part = name.removeprefix(PREFIX).partition(".base_layer.")
        if module not in {**base.linears, **base.embeddings}:
            same = False
        elif part != "weight":  # of packed bits, which are not there yet where the base is still to be packed
            held = base.tensors.get(f"{base.stored(module)}.{part}")
            same = base.unpacked is not None or (held is not None and np.array_equal(held, value))
        else:
            wanted, measured = base.weight(module), base.relative_error(module)
            found = np.linalg.norm(value - wanted) / np.linalg.norm(value) if value.shape == wanted.shape else np.inf
            same = abs(float(found) - measured) <= SAME_ERROR * (measured or 1)
        if not same:
            problems.append(
                f"{name} is not the base's own: the vocabulary was resized or the embedding trained. Give the model "
                "with that embedding as the base."
            )
    return problems
