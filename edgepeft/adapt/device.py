"""The device form of an adapter: a folder that PEFT loads, and where PEFT's tensors are not the terms, the terms.

    adapter (any kind) ─► effect, rounded ─┬─► adapter_config.json + adapter_model.safetensors   LoRA, or IA3
                                           └─► terms.safetensors                                 what the graph reads

Whatever trained it, an effect of sums is written as a LoRA: the scale folded into lora_B and alpha == r (through
rank_pattern too), so that PEFT, which multiplies by alpha / r = 1, and the device compute the same from the same
numbers. s_out beside a and b is a DoRA whose magnitude is s_out·‖W + BA‖; s_in, or s_out alone, an IA3; biases are a
LoRA with bias "all". Rounding to float16 happens once, before either file is written.

A prompt keeps PEFT's rows, in float32, and the device its own form of them (`prompts`).

A kind of our own (experts, bottlenecks) stays what it is: PEFT does not load it, `layers.load` does.

terms.safetensors is there when the graph's tensors are others than PEFT's (s_in, s_out, embeddings, biases), or when
several modules share one, which PEFT's file repeats. Left out: sums beside s_in, which PEFT has no name for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.adapt import peft_files, prompts
from edgepeft.adapt.kinds import NEEDS_WEIGHTS, row_norms
from edgepeft.adapt.terms import ALIAS, BESIDE, ENDINGS, PREFIX, TERMS_FILE, Effect, Terms, shared
from edgepeft.artifact import write_tensors
from edgepeft.errors import ArtifactError

if TYPE_CHECKING:
    from edgepeft.adapt.base import Base

HALVES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
KEPT_SETTINGS = ("base_model_name_or_path", "revision", "task_type", "peft_version")
OWN_SETTINGS = ("peft_type", "experts")  # of the kinds that PEFT does not load


def write_form(folder: Path, adapter: peft_files.Adapter, base: Base | None, exact: bool = False) -> peft_files.Adapter:
    """Write the device form of an adapter below `folder` and return what PEFT reads of it.

    exact: keep float32, as a check of the rounded form needs it. Raises ArtifactError for what has no such form.
    """
    effect = adapter.effect(base)
    effect = effect if exact else effect.rounded()
    ours = any(terms.beside for terms in effect.modules.values())
    if effect.prompt:
        settings, tensors = prompt_form(adapter)
    else:
        source = adapter.settings
        settings, tensors = own_form(effect, source) if ours else peft_form(effect, source, base, adapter.tables)
    if not exact:
        halves = [name for name in tensors if name.endswith(HALVES)]
        tensors.update({name: tensors[name].astype(np.float16) for name in halves})
    digest, tag = (adapter.metadata.get(key, "") for key in ("edgepeft.base", "edgepeft.format"))
    if base is not None:
        digest, tag = base.digest, base.about["format"]
    peft_files.write(folder, settings, tensors, digest, tag)
    terms = effect.tensors()
    stored, alias = shared(terms)
    if not exact and (alias or sorted(terms) != sorted(tensors)):
        metadata = {"format": "pt", "edgepeft.base": digest, "edgepeft.format": tag}
        write_tensors(folder / TERMS_FILE, stored, {**metadata, ALIAS: json.dumps(alias, sort_keys=True)})
    return peft_files.Adapter(settings, tensors, adapter.metadata)


def prompt_form(adapter: peft_files.Adapter) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the settings and tensors (float32) of a prompt as PEFT loads it, whatever network made it."""
    names = ("peft_type", *KEPT_SETTINGS, *prompts.SETTINGS, "modules_to_save")
    kept = {name: adapter.settings[name] for name in names if adapter.settings.get(name) is not None}
    return {**kept, "inference_mode": True}, {n: value.astype(np.float32) for n, value in adapter.tensors.items()}


def own_form(effect: Effect, source: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the settings and tensors (float32) of a kind of our own: what it was, with the scale folded in."""
    kept = {name: source[name] for name in (*KEPT_SETTINGS, *OWN_SETTINGS) if source.get(name) is not None}
    whole = sorted({name.rpartition(".")[0] for name in effect.replaced})
    given = {"r": source["r"], "lora_alpha": source["r"], "modules_to_save": whole or None, "inference_mode": True}
    settings = {**kept, **given, "target_modules": sorted(effect.modules), "bias": "none"}
    return settings, effect.tensors("float32")


def peft_form(
    effect: Effect, source: Mapping[str, Any], base: Base | None, tables: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the settings and tensors (float32) under which PEFT computes an effect; `source` names base and task.

    tables: the modules that are embeddings.
    """
    sums = {name: terms for name, terms in effect.modules.items() if terms.a_rk is not None}
    scaled = [name for name, t in effect.modules.items() if t.s_in is not None or t.s_out is not None]
    scales = {name: effect.modules[name] for name in scaled if name not in sums}
    biases = {name: t.bias for name, t in effect.modules.items() if t.bias is not None and name not in scales}
    if (sums and scales) or any(terms.s_in is not None for terms in sums.values()):
        raise ArtifactError("sums and scales of inputs together have no form that PEFT loads. Train them apart.")
    tensors = {f"{PREFIX}{name}": value for name, value in effect.replaced.items()}
    whole = sorted({name.rpartition(".")[0] for name in effect.replaced if not name.endswith(".bias")})
    loose = {name for name in effect.replaced if name.endswith(".bias") and name.rpartition(".")[0] not in whole}
    kept = {name: source[name] for name in KEPT_SETTINGS if source.get(name) is not None}
    kept |= {"inference_mode": True, "modules_to_save": whole or None}
    if scales and (loose or biases):
        raise ArtifactError("IA3 beside trained biases has no form that PEFT loads. Train them apart.")
    if scales:
        return {**kept, **_ia3(scales, tensors, base)}, tensors
    settings = _lora(sums, biases, tensors, base, source, tables)
    return {**kept, **settings, "bias": "all" if biases or loose else "none"}, tensors


def _ia3(scales: Mapping[str, Terms], tensors: dict[str, np.ndarray], base: Base | None) -> dict[str, Any]:
    """Add an IA3's tensors and return its settings. It scales a bias with the output, so the bias has to say so."""
    for name, terms in scales.items():
        if terms.s_in is not None and terms.s_out is not None:
            raise ArtifactError(f"{name}: scales of input and output together have no form that PEFT loads.")
        own = None if base is None or terms.s_out is None else base.bias(name)
        if own is not None and (terms.bias is None or not np.allclose(terms.bias, own * terms.s_out, atol=1e-6)):
            raise ArtifactError(f"{name}: a scale that leaves the bias out has no form that PEFT loads.")
        one = terms.s_in if terms.s_out is None else terms.s_out
        assert one is not None, "one of them is there"
        tensors[f"{PREFIX}{name}.ia3_l"] = one[None] if terms.s_out is None else one[:, None]
    inputs = sorted(name for name, terms in scales.items() if terms.s_in is not None)
    return {"peft_type": "IA3", "target_modules": sorted(scales), "feedforward_modules": inputs}


def _lora(
    sums: Mapping[str, Terms], biases: Mapping[str, np.ndarray], tensors: dict[str, np.ndarray], base: Base | None,
    source: Mapping[str, Any], tables: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    """Add a LoRA's tensors and return the settings under which PEFT scales by exactly 1 everywhere."""
    sums = dict(sums) or _idle(base)
    dora = any(terms.s_out is not None for terms in sums.values())
    for name, terms in sums.items():
        a_rk, b_nr = terms.low_rank
        embedding = name in tables
        a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{name}.{a_name}": a_rk, f"{PREFIX}{name}.{b_name}": b_nr}
        if dora and embedding:
            raise ArtifactError(f"{name}: an embedding beside DoRA has no form that PEFT loads. Train them apart.")
        if dora:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = _magnitude(name, terms, base)
    shifted = _biases(sums, biases, tensors, base)
    if shifted and dora:
        raise ArtifactError("DoRA beside biases of linears without one has no form that PEFT loads. Train them apart.")
    ranks = {name: len(terms.low_rank[0]) for name, terms in sums.items()}
    rank = source.get("r") if source.get("r") in ranks.values() else Counter(ranks.values()).most_common(1)[0][0]
    others = {name: own for name, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others,
        "target_modules": sorted(sums), "use_dora": dora, "lora_bias": shifted, "use_rslora": False,
        "lora_dropout": 0.0, "init_lora_weights": True,
    }  # fmt: skip


def _biases(
    sums: Mapping[str, Terms], biases: Mapping[str, np.ndarray], tensors: dict[str, np.ndarray], base: Base | None
) -> bool:
    """Add biases under PEFT's names; tell whether some are of linears that have none, and so lora_B's of all."""
    new = {name for name in biases if base is not None and base.bias(name) is None}
    if strange := sorted(new - set(sums)):
        raise ArtifactError(f"{strange[0]}: a bias alone, where the base has none, has no form that PEFT loads.")
    for name, bias in biases.items():
        if name not in new:
            tensors[f"{PREFIX}{name}.base_layer.bias" if name in sums else f"{PREFIX}{name}.bias"] = bias
    for name, terms in sums.items() if new else ():
        zero = np.zeros(len(terms.low_rank[1]), np.float32)
        tensors[f"{PREFIX}{name}.lora_B.bias"] = biases[name] if name in new else zero
    return bool(new)


def _idle(base: Base | None) -> dict[str, Terms]:
    """Return a LoRA that adds nothing, as PEFT wants one to carry biases."""
    if base is None:
        raise ArtifactError("an adapter of biases alone needs the base to be written.")
    name, (n, k) = next(iter(base.linears.items()))
    return {name: Terms(a_rk=np.zeros((1, k), np.float32), b_nr=np.zeros((n, 1), np.float32))}


def _magnitude(name: str, terms: Terms, base: Base | None) -> np.ndarray:
    if base is None:
        raise ArtifactError(f"{name}: DoRA's magnitudes {NEEDS_WEIGHTS}")
    norms = row_norms(base, name, terms)
    return norms if terms.s_out is None else norms * terms.s_out


def neutral_values(inputs: Mapping[str, tuple[int, ...]], base: Base) -> dict[str, np.ndarray]:
    """Return {input of the graph: the base's own tensor} of those that an adapter replaces and another one may not.

    inputs: {input of the graph: shape}. Scales are neutral at 1, a prompt with none of its rows, and heads have no
    value of the base, so they are not among them.
    """
    low = tuple(f".{ENDINGS[term]}" for term in ("a_rk", "b_nr", "gate", "s_in", "s_out")) + BESIDE
    found = {}
    for name, shape in inputs.items():
        inner = name.removeprefix(PREFIX)
        if not name.startswith(PREFIX) or inner.endswith(low) or inner.split(".")[0] in base.heads:
            continue
        own = base.tensors.get(inner)
        found[name] = np.zeros(shape, np.float32) if own is None else np.asarray(own, np.float32)[: shape[0]]
    return found
