"""The adapter methods: one row each. A method is its place in the one equation of an adapted linear layer,

    y = s_out ⊙ ( W·(s_in ⊙ x) + B·( gate ⊙ (A·x) ) ) + bias          A: R x K;  B: N x R

A row says how training builds the Hugging Face PEFT configuration, and how a saved PEFT folder becomes `Terms` per
module: the arrays a, b, gate, s_in, s_out, each absent when neutral. Everything after training (what the device
receives, what a merge adds to W) follows from the terms alone, so no later stage knows a method by name.

New rows and where they enter: DoRA sets s_out = magnitude / ‖W + BA‖ (its reader needs the row norms of W); VeRA sets
gate and s_out around a shared a and b; IA3 sets s_out or s_in and has no a, b; a mixture of LoRAs stacks its experts'
a and b along R and gates per token. What cannot be written in these terms gets no row.

The table is named by the command line, so this module imports neither numpy, torch nor peft at its top.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

    from edgepeft.adapt.peft_files import Adapter
    from edgepeft.config import Config

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of one adapted module, float32, scale folded into b; None is neutral.

    a_rk [R, K], b_nr [N, R], gate [R], s_in [K], s_out [N].
    """

    a_rk: np.ndarray | None = None
    b_nr: np.ndarray | None = None
    gate: np.ndarray | None = None
    s_in: np.ndarray | None = None
    s_out: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One adapter method.

    peft_type: how adapter_config.json names it.  tensors: term -> what follows the module's name in a PEFT file.
    """

    tag: str
    peft_type: str
    tensors: Mapping[str, str]
    _peft_config: Callable[..., Any]
    _terms: Callable[[Adapter, str], Terms]

    def peft_config(self, config: Config, modules: Iterable[str], heads: Iterable[str], task_type: str) -> Any:
        """Return the PEFT configuration that adapts the linears `modules` and trains the modules `heads` in full."""
        return self._peft_config(config, sorted(modules), sorted(heads), task_type)

    def terms(self, folder: Path, **expected: Any) -> dict[str, Terms]:
        """Return {module: Terms} of a PEFT folder, sorted by module; `expected` goes to `peft_files.read`."""
        from edgepeft.adapt.peft_files import read

        adapter = read(folder, **expected)
        return {module: self._terms(adapter, module) for module in adapter.modules}

    def half_terms(self, adapter: Adapter) -> dict[str, np.ndarray]:
        """Return the terms of an adapter that was read, as float16 under PEFT's names."""
        result = {}
        for module in adapter.modules:
            terms = self._terms(adapter, module)
            for term, ending in self.tensors.items():
                if (value := getattr(terms, term)) is not None:
                    result[f"{PREFIX}{module}.{ending}"] = _half(value, module, term)
        return result

    def deltas(self, folder: Path, **expected: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return {module: (b_nr with the scale folded in, a_rk)}: W + b @ a is the merged weight.

        Raises ArtifactError for a module that has other terms than a and b, which a sum cannot hold.
        """
        return {module: _low_rank(terms, module) for module, terms in self.terms(folder, **expected).items()}


def _half(value: np.ndarray, module: str, term: str) -> np.ndarray:
    """Round to float16; refuse what would become infinite."""
    import numpy as np

    largest = float(np.abs(value).max(initial=0.0))
    if largest > float(np.finfo(np.float16).max):
        raise ArtifactError(
            f"{module}: {term} reaches {largest:.3g}; float16 ends at 65504. Train with a lower learning rate or alpha."
        )
    return value.astype(np.float16)


def _low_rank(terms: Terms, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (b, a) of a module whose other terms are neutral."""
    others = [name for name in ("gate", "s_in", "s_out") if getattr(terms, name) is not None]
    if others or terms.a_rk is None or terms.b_nr is None:
        raise ArtifactError(f"{module}: {', '.join(others) or 'no a and b'}: not a sum W + BA. Ship it unmerged.")
    return terms.b_nr, terms.a_rk


# --- LoRA: a = lora_A, b = scale * lora_B, scale = alpha / r (rsLoRA: alpha / sqrt(r)), per module by the patterns ----


def _lora_config(config: Config, modules: list[str], heads: list[str], task_type: str) -> Any:
    from peft import LoraConfig

    # PEFT takes any real alpha; its annotation says int.
    alpha: Any = config.alpha
    return LoraConfig(
        r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=modules,
        modules_to_save=heads, bias="none", task_type=task_type,
    )  # fmt: skip


def _lora_terms(adapter: Adapter, module: str) -> Terms:
    import numpy as np

    a_rk = adapter.tensors[f"{PREFIX}{module}.lora_A.weight"].astype(np.float32)
    b_nr = adapter.tensors[f"{PREFIX}{module}.lora_B.weight"].astype(np.float32)
    return Terms(a_rk=a_rk, b_nr=b_nr * np.float32(adapter.scale(module)))


LORA = Method("lora", "LORA", {"a_rk": "lora_A.weight", "b_nr": "lora_B.weight"}, _lora_config, _lora_terms)

METHODS: dict[str, Method] = {row.tag: row for row in (LORA,)}
