"""What an adapter is once it has left training: terms of linears, and tensors that take the place of the base's own.

    y = s_out ⊙ ( W·(s_in ⊙ x) + B·( gate ⊙ (A·x) ) ) + bias          A: R x K;  B: N x R

`bias` is the whole bias of the linear, the base's included; every term that is absent is neutral. An embedding has a
and b alone: its row i is E[i] + B·A[:, i]. `replaced` holds whole tensors by the base's names: trained heads, norms.

What stands beside a linear and is no term of it is in `beside`, by the ending of its name: a router, whose shares are
the gate of its experts, token by token, and bottlenecks (`layers` has their equations).

Terms have one name each, whatever the method: that of the graph's input that takes them (`ENDINGS`). A tensor that is
the same for several modules is stored once; the file's metadata tell under which names it is needed:

    edgepeft.alias = {"name of an input": "name it is stored under"}       as JSON

This module is named by the command line through the table of methods, so it imports nothing heavy at its top.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgepeft.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

PREFIX = "base_model.model."
ALIAS = "edgepeft.alias"
TERMS_FILE = "terms.safetensors"
BASE_FILE = "base.safetensors"  # beside the adapters' folders: the base's own of what they replace
LARGEST_HALF = 65504.0
# term -> what follows the module's name
ENDINGS = {
    "a_rk": "lora_A.weight", "b_nr": "lora_B.weight", "gate": "gate", "s_in": "s_in", "s_out": "s_out", "bias": "bias",
}  # fmt: skip
HALVES = ("a_rk", "b_nr")  # kept as float16, the others as float32
ROUTER = "lora_router.weight"
BOTTLENECK = ("lora_down.weight", "lora_down.bias", "lora_up.weight", "lora_up.bias")
PARALLEL = tuple(ending.replace("lora_", "lora_beside_") for ending in BOTTLENECK)
PROMPT, STATES = "prompt", "prefix"  # rows before the words' of an encoder, before the outputs of its k and v
BESIDE = (ROUTER, *BOTTLENECK, *PARALLEL, f".{PROMPT}", f".{STATES}")  # neutral: zeros, of one expert or of width 0


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of one adapted module, float32, scale folded into b; None is neutral.

    a_rk [R, K], b_nr [N, R], gate [R], s_in [K], s_out [N], bias [N].  beside: {ending: array}.
    group: how many columns of a in turn are the same by construction; 0: one.
    """

    a_rk: np.ndarray | None = None
    b_nr: np.ndarray | None = None
    gate: np.ndarray | None = None
    s_in: np.ndarray | None = None
    s_out: np.ndarray | None = None
    bias: np.ndarray | None = None
    beside: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    group: int = 0

    @property
    def present(self) -> list[str]:
        """The names of the terms that are not neutral."""
        return [name for name in ENDINGS if getattr(self, name) is not None]

    @property
    def low_rank(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a [R, K] and b [N, R] of a module that has them."""
        if self.a_rk is None or self.b_nr is None:
            raise ValueError("a module without a and b has no rank")
        return self.a_rk, self.b_nr

    def rounded(self, module: str) -> Terms:
        """Return the terms as a device holds them: the gate in b, a and b of float16's values.

        Raises ArtifactError for what float16 cannot hold.
        """
        b_nr = self.b_nr if self.gate is None or self.b_nr is None else self.b_nr * self.gate
        a_rk, b_nr = (
            None if value is None else half(value, module, name)
            for name, value in (("a_rk", self.a_rk), ("b_nr", b_nr))
        )
        return dataclasses.replace(self, gate=None, a_rk=a_rk, b_nr=b_nr)

    def delta(self, w_nk: np.ndarray) -> np.ndarray:
        """Return what the terms add to the weight [N, K]; `bias` is apart. Nothing `beside` can be in it."""
        total = w_nk if self.s_in is None else w_nk * self.s_in
        if self.a_rk is not None and self.b_nr is not None:
            total = total + (self.b_nr if self.gate is None else self.b_nr * self.gate) @ self.a_rk
        return (total if self.s_out is None else total * self.s_out[:, None]) - w_nk


@dataclasses.dataclass(frozen=True)
class Effect:
    """All that an adapter does.

    modules: {linear or embedding: its terms}.  replaced: {name of a tensor of the base: array}.
    prompt: {input of the graph: array} of what it puts before every text (`prompts`), float32.
    """

    modules: Mapping[str, Terms]
    replaced: Mapping[str, np.ndarray]
    prompt: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def rounded(self) -> Effect:
        """Return the effect in the values that a device holds."""
        modules = {name: terms.rounded(name) for name, terms in self.modules.items()}
        return dataclasses.replace(self, modules=modules)

    def tensors(self, half_type: str = "float16") -> dict[str, np.ndarray]:
        """Return {input of the graph: array}: a and b of `half_type`, the rest float32."""
        found = {f"{PREFIX}{name}": value.astype("float32") for name, value in self.replaced.items()}
        found |= self.prompt
        for module, terms in self.modules.items():
            for term in terms.present:
                kind = half_type if term in HALVES else "float32"
                found[f"{PREFIX}{module}.{ENDINGS[term]}"] = getattr(terms, term).astype(kind)
            found |= {f"{PREFIX}{module}.{ending}": value.astype("float32") for ending, value in terms.beside.items()}
        return found


def half(value: np.ndarray, module: str, term: str) -> np.ndarray:
    """Round to values of float16, kept as float32; refuse what would become infinite."""
    import numpy as np

    largest = float(np.abs(value).max(initial=0.0))
    if largest > LARGEST_HALF:
        raise ArtifactError(
            f"{module}: {term} reaches {largest:.3g}; float16 ends at 65504. Train with a lower learning rate or alpha."
        )
    return value.astype(np.float16).astype(np.float32)


def shared(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors without repetitions, and {name left out: name of its equal}."""
    stored: dict[str, np.ndarray] = {}
    first: dict[tuple, str] = {}
    alias = {}
    for name, value in sorted(tensors.items()):
        key = (value.dtype.str, value.shape, value.tobytes())
        if value.size and key in first:
            alias[name] = first[key]
        else:
            first[key] = name
            stored[name] = value
    return stored, alias


def aliases(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return {input of the graph: name it is stored under} of a file's metadata."""
    return json.loads(metadata.get(ALIAS, "{}"))
