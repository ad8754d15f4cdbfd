"""Adapters as other tools lay them out, brought into one form: PEFT's names, orientation and settings.

    PEFT      …<module>.lora_A.weight [R, K], lora_B.weight [N, R]; alpha and r in adapter_config.json
    MLX       <module>.lora_a [K, R], lora_b [R, N]; scale in adapter_config.json          alpha = scale · R
    GGUF      <name in llama.cpp>.weight.lora_a [R, K], .lora_b [N, R]; alpha in the header; q and k rows turned
    ONNX      a graph's inputs: ours as in PEFT; GenAI's <module>.lora_A.MatMul.weight [K, R]; scale lies in B

Nothing is computed but transposes and the order of rows, so a converted adapter is the same adapter. A file is known by
its first bytes, not by its name, and checked before anything in it is believed. Pickles are never opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.adapt.terms import PREFIX

if TYPE_CHECKING:
    import numpy as np

PAIR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
ADAPTED = re.compile(  # a tensor of a module's adapter, of any kind that PEFT saves
    re.escape(PREFIX)
    + r"(?P<module>.+?)\.(?:lora_\w+|ia3_l|vera_lambda_\w|hada_\w+|lokr_\w+|gate|s_in|s_out)(?:\.\w+)?$"
)


@dataclasses.dataclass(frozen=True)
class Foreign:
    """An adapter in PEFT's form, wherever it came from.

    tensors: {PEFT's name: array}.  settings: what adapter_config.json says, or would say.  metadata: the file's own.
    changes: what had to be done to bring it into this form; nothing for what PEFT wrote.
    turned: modules whose rows of B are in llama.cpp's order, and whose heads they follow ("q" or "k").
    strange: tensors that nothing is known about.  unread: why there are no tensors at all.
    """

    tool: str
    layout: str
    path: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    changes: tuple[str, ...] = ()
    turned: Mapping[str, str] = dataclasses.field(default_factory=dict)
    strange: tuple[str, ...] = ()
    unread: str = ""

    @property
    def pairs(self) -> dict[str, dict[str, np.ndarray]]:
        """Return {module: {"A": a_rk, "B": b_nr}}, sorted; a side may be missing."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, array in self.tensors.items():
            if match := PAIR.match(name):
                found.setdefault(match["module"], {})[match["side"]] = array
        return dict(sorted(found.items()))

    @property
    def others(self) -> dict[str, np.ndarray]:
        """Return the tensors that are no side of a pair, under PEFT's names."""
        return {name: array for name, array in self.tensors.items() if not PAIR.match(name)}

    def unturned(self, heads: Mapping[str, int]) -> Foreign:
        """Return it with the rows of q and k as Hugging Face has them; heads: {"q": count, "k": count}.

        llama.cpp keeps a head's rows pairwise, [d/2, 2], where the checkpoint has its halves one after the other.
        """
        tensors = dict(self.tensors)
        for module, role in self.turned.items():
            name = f"{PREFIX}{module}.lora_B.weight"
            b_nr = tensors[name]
            pairs = b_nr.reshape(heads[role], -1, 2, b_nr.shape[1])
            tensors[name] = pairs.swapaxes(1, 2).reshape(b_nr.shape)
        return dataclasses.replace(self, tensors=tensors, turned={})

    def renamed(self, names: Mapping[str, str]) -> Foreign:
        """Return it with modules under other names."""

        def new(name: str) -> str:
            bare = name.removeprefix(PREFIX)
            module = next((m for m in names if bare.startswith(f"{m}.")), None)
            return name if module is None else PREFIX + names[module] + bare[len(module) :]

        tensors = {new(name): array for name, array in self.tensors.items()}
        settings = {**self.settings}
        if isinstance(settings.get("target_modules"), (list, tuple)):
            settings["target_modules"] = sorted({names.get(name, name) for name in settings["target_modules"]})
        for pattern in ("rank_pattern", "alpha_pattern"):
            if isinstance(table := settings.get(pattern), dict):
                settings[pattern] = _moved(table, names)
        turned = {names.get(module, module): role for module, role in self.turned.items()}
        return dataclasses.replace(self, tensors=tensors, settings=settings, turned=turned)


def _moved(table: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a pattern of PEFT's that says of modules under their new names what it said under the old ones."""
    found = {}
    for key, value in reversed(table.items()):  # the first that matches counts
        with contextlib.suppress(re.error):
            found.update({new: value for old, new in names.items() if re.match(rf"(.*\.)?({key})$", old)})
    return {**found, **table}


def lora_settings(pairs: Mapping[str, int], alpha: float | None, base: str | None, **more: Any) -> dict[str, Any]:
    """Return PEFT's settings of plain LoRA; pairs: {module: rank}, alpha: None where B holds the scale already."""
    rank = Counter(pairs.values()).most_common(1)[0][0] if pairs else 8
    ranks = {module: r for module, r in pairs.items() if r != rank}
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank if alpha is None else _short(alpha), "rank_pattern": ranks,
        "alpha_pattern": ranks if alpha is None else {}, "target_modules": sorted(pairs), "bias": "none",
        "base_model_name_or_path": base, "inference_mode": True, **more,
    }  # fmt: skip


def _short(number: float) -> float:
    """Return a whole number as an int, as PEFT writes it."""
    return int(number) if float(number).is_integer() else float(number)


def ranks(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return {module: rank} of tensors under PEFT's names."""
    found = ((PAIR.match(name), array) for name, array in tensors.items())
    return {match["module"]: array.shape[0] for match, array in found if match and match["side"] == "A" and array.ndim}


def some(names: Iterable[str], limit: int = 4) -> str:
    """Return a few names and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
