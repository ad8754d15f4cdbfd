"""The kinds of adapters that Hugging Face PEFT saves: one row each, from the tensors of a module to its terms.

| peft_type | what PEFT adds to a linear (x -> y)              | terms                                                 |
|---|---|---|
| LORA      | scale·B·A x, scale = alpha/r or alpha/√r         | a = A, b = scale·B                                    |
|  lora_bias| + scale·c                                        | bias = the base's + scale·c                           |
|  use_qalora| scale·B·A (J·x̄), x̄ means of x over J blocks     | a = A·J/G, each column for the G of a block           |
|  use_dora | y = m ⊙ (W + scale·BA) x / ‖W + scale·BA‖ + bias | s_out = m / ‖W + scale·BA‖, row by row                |
| ADALORA   | B·diag(E)·A x · alpha/(init_r + 1e-5)            | a = A, b = B·E·scale, less the ranks whose E is zero  |
| VERA      | λb ⊙ B(λd ⊙ (A x)), A and B shared, cut to size  | a = A[:, :K], b = λb ⊙ B[:N] ⊙ λd                     |
| IA3       | l ⊙ (W x + bias), or W (l ⊙ x) + bias            | s_out = l and bias = l ⊙ bias, or s_in = l            |
| LOHA      | scale·((w1a w1b) ⊙ (w2a w2b)) x                  | a, b of rank r²: products of rows (Khatri-Rao)        |
| LOKR      | scale·(w1 ⊗ w2) x, either of them factored       | b = P1 ⊗ P2, a = Q1 ⊗ Q2 for w1 = P1 Q1, w2 = P2 Q2   |

Kinds of our own, which PEFT does not load (`layers`):

| EXPERTS   | Σ_e p_e·scale·B_e A_e x, p = softmax(router x)  | a = A, b = scale·B of all experts, router beside      |
| BOTTLENECK, PARALLEL | scale·(U·gelu(D·h + d) + u)          | D, d, scale·U, scale·u beside                         |

Kinds without modules, whose rows or keys and values stand before the text (`prompts`): PROMPT_TUNING, P_TUNING,
PREFIX_TUNING.

A rank above min(N, K) is written as the matrix itself and an identity, which is the smaller form of the same. Products
are balanced between a and b by powers of two, which changes nothing but what float16 can hold.

λb cannot stay apart from B: s_out would scale W x too. So VeRA's b is each module's own, its a is shared.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.adapt import prompts
from edgepeft.adapt.terms import BOTTLENECK, PARALLEL, ROUTER, Terms
from edgepeft.errors import ArtifactError

if TYPE_CHECKING:
    from edgepeft.adapt.base import Base

Tensors = Mapping[str, np.ndarray]
ADALORA_EPSILON = 1e-5
# Where and how it was trained, and which modules were to be adapted; the tensors carry the outcome. fan_in_fan_out
# tells how the base keeps its weight, and no base here keeps it turned.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "peft_version", "runtime_config",
}  # fmt: skip
UNDERSTOOD = {"peft_type", "modules_to_save"}
LORA_TRAINING = {
    "lora_dropout", "megatron_core", "eva_config", "qalora_group_size", "init_lora_weights", "loftq_config",
    "corda_config", "lora_ga_config",
}  # fmt: skip
PROMPT_TRAINING = {
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "init_weights",
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
    "prefix_projection",
}  # fmt: skip
LYCORIS_TRAINING = {"rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "use_effective_conv2d"}


@dataclasses.dataclass(frozen=True)
class Module:
    """One adapted module of a PEFT folder: its tensors by what follows its name, and the folder's settings.

    shape: (N, K) of the linear, where it is known.
    """

    name: str
    tensors: Tensors
    settings: Mapping[str, Any]
    common: Tensors
    shape: tuple[int, int] | None = None

    def number(self, name: str, pattern: str, default: float) -> float:
        """Return a setting, or what the first pattern that ends the module's name says, as PEFT resolves it."""
        for key, value in (self.settings.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", self.name):
                return value
        found = self.settings.get(name)
        return default if found is None else found

    def __getitem__(self, ending: str) -> np.ndarray:
        return self.tensors[ending].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind. understood: settings that the row reads.  training: settings without effect on what was trained.

    endings: what follows a module's name in the file, those that a module must have in groups of alternatives.
    terms(module, base) -> Terms; `base` is needed where the row says so.  prompt: it has no modules (`prompts`).
    """

    peft_type: str
    understood: frozenset[str]
    training: frozenset[str]
    endings: tuple[str, ...]
    required: tuple[tuple[str, ...], ...]
    terms: Callable[[Module, Base | None], Terms]
    common: tuple[str, ...] = ()
    prompt: bool = False

    def match(self, name: str) -> tuple[str, str] | None:
        """Return (module, ending) of a tensor's name below the prefix, or None."""
        for ending in self.endings:
            if name.endswith(f".{ending}"):
                return name[: -len(ending) - 1], ending
        return None

    def missing(self, tensors: Mapping[str, Any]) -> str:
        """Return what a module lacks, in words, or nothing."""
        if any(set(group) <= set(tensors) for group in self.required):
            return ""
        near = min(self.required, key=lambda group: len(set(group) - set(tensors)))
        return " and ".join(name.removesuffix(".weight") for name in near if name not in tensors)


NEEDS_WEIGHTS = (
    "depend on the packed weights, which a bundle does not give. Attach the adapter in a build of the same model and "
    "format (edgepeft build --adapter-from FOLDER --output OUTPUT) and add that: edgepeft adapters add BUNDLE OUTPUT."
)


def needed(base: Base | None, module: Module) -> Base:
    """Return the base. Raises ArtifactError where none was given to a kind whose terms depend on it."""
    if base is None:
        raise ArtifactError(f"{module.name}: its terms {NEEDS_WEIGHTS}")
    return base


def balanced(b_nr: np.ndarray, a_rk: np.ndarray) -> Terms:
    """Return b·a with each rank's column and row brought to like size by a power of two."""
    large = [np.abs(part).max(axis=axis, initial=0.0) for part, axis in ((b_nr, 0), (a_rk, 1))]
    usable = (large[0] > 0) & (large[1] > 0)
    ratio = np.divide(large[0], large[1], out=np.ones_like(large[0]), where=usable)
    shift = np.exp2(np.round(np.log2(ratio) / 2)).astype(np.float32)
    return Terms(a_rk=a_rk * shift[:, None], b_nr=b_nr / shift)


def smallest(b_nr: np.ndarray, a_rk: np.ndarray) -> Terms:
    """Return b·a in the form with fewer numbers: as it is, or the matrix beside an identity."""
    n, k = len(b_nr), a_rk.shape[1]
    if a_rk.shape[0] <= min(n, k):
        return balanced(b_nr, a_rk)
    whole = (b_nr.astype(np.float64) @ a_rk.astype(np.float64)).astype(np.float32)
    one = np.eye(min(n, k), dtype=np.float32)
    return Terms(a_rk=whole, b_nr=one) if n <= k else Terms(a_rk=one, b_nr=whole)


# --- LoRA and its relatives --------------------------------------------------------------------------------------


def lora_rank(module: Module) -> int:
    """Return R as the settings state it."""
    return int(module.number("r", "rank_pattern", 8))


def lora_scale(module: Module) -> float:
    """Return what lora_B·lora_A is multiplied by."""
    rank = module.number("r", "rank_pattern", 8)
    return module.number("lora_alpha", "alpha_pattern", 8) / (
        math.sqrt(rank) if module.settings.get("use_rslora") else rank
    )


def _lora(module: Module, base: Base | None) -> Terms:
    scale = np.float32(lora_scale(module))
    if "lora_embedding_A" in module.tensors:
        return Terms(a_rk=module["lora_embedding_A"], b_nr=module["lora_embedding_B"] * scale)
    found = Terms(a_rk=module["lora_A.weight"], b_nr=module["lora_B.weight"] * scale)
    if module.settings.get("use_qalora"):
        found = _spread(found, lora_group(module.settings))
    if "lora_B.bias" in module.tensors:
        own = needed(base, module).bias(module.name)
        shift = module["lora_B.bias"] * scale
        found = dataclasses.replace(found, bias=shift if own is None else own + shift)
    if "lora_magnitude_vector" in module.tensors:
        norms = row_norms(needed(base, module), module.name, found)
        found = dataclasses.replace(found, s_out=module["lora_magnitude_vector"] / norms)
    return found


def lora_group(settings: Mapping[str, Any]) -> int:
    """Return how many inputs of a linear a column of A stands for: one, or those that QA-LoRA takes the mean of."""
    size = settings.get("qalora_group_size", 16)
    return size if settings.get("use_qalora") and isinstance(size, int) else 1


def _spread(terms: Terms, group: int) -> Terms:
    """Return the terms of A [R, J] over means of blocks, times J as PEFT has it, as those of A [R, K]."""
    a_rj, b_nr = terms.low_rank
    return Terms(a_rk=np.repeat(a_rj * np.float32(a_rj.shape[1] / group), group, axis=1), b_nr=b_nr, group=group)


def row_norms(base: Base, module: str, terms: Terms) -> np.ndarray:
    """Return ‖W + BA‖ row by row, [N]."""
    w_nk = base.weight(module)
    if terms.b_nr is not None and terms.a_rk is not None:
        w_nk = w_nk + terms.b_nr @ terms.a_rk
    return np.linalg.norm(w_nk, axis=1)


def _adalora(module: Module, base: Base | None) -> Terms:
    values = module["lora_E"][:, 0]
    kept = values != 0
    alpha = float(module.settings.get("lora_alpha") or 0)
    scale = (alpha if alpha > 0 else len(values)) / (module.settings.get("init_r", 12) + ADALORA_EPSILON)
    return balanced(module["lora_B"][:, kept] * (values[kept] * np.float32(scale)), module["lora_A"][kept])


def _vera(module: Module, base: Base | None) -> Terms:
    outer, inner = module["vera_lambda_b"], module["vera_lambda_d"]
    n = len(outer)
    _, k = module.shape or needed(base, module).linears[module.name]
    a_rk, b_nr = (module.common[name].astype(np.float32) for name in ("vera_A", "vera_B"))
    return Terms(a_rk=a_rk[:, :k], b_nr=outer[:, None] * b_nr[:n] * inner)


def vera_projections(settings: Mapping[str, Any], n: int, k: int) -> dict[str, np.ndarray]:
    """Return VeRA's shared matrices as PEFT draws them from their key: A [R, K], B [N, R] for the largest linears."""
    import torch

    def draw(*shape: int) -> np.ndarray:
        bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator).numpy()

    generator = torch.Generator(device="cpu").manual_seed(settings.get("projection_prng_key", 0))
    rank = settings.get("r", 256)
    return {"vera_A": draw(rank, k), "vera_B": draw(n, rank)}


def _ia3(module: Module, base: Base | None) -> Terms:
    scale = module["ia3_l"]
    if scale.shape[0] == 1:
        return Terms(s_in=scale[0])
    own = needed(base, module).bias(module.name)
    return Terms(s_out=scale[:, 0], bias=None if own is None else own * scale[:, 0])


# --- products ----------------------------------------------------------------------------------------------------


def _lycoris_scale(module: Module) -> np.float32:
    return np.float32(module.number("alpha", "alpha_pattern", 8) / module.number("r", "rank_pattern", 8))


def _loha(module: Module, base: Base | None) -> Terms:
    w1a, w1b, w2a, w2b = (module[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ab")
    b_nr = (w1a[:, :, None] * w2a[:, None, :]).reshape(len(w1a), -1) * _lycoris_scale(module)
    a_rk = (w1b[:, None, :] * w2b[None, :, :]).reshape(-1, w1b.shape[1])
    return smallest(b_nr, a_rk)


def _factors(module: Module, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return P and Q with w = P Q of the fewest columns that need no arithmetic."""
    if f"{name}_a" in module.tensors:
        return module[f"{name}_a"], module[f"{name}_b"]
    w = module[name]
    one = np.eye(min(w.shape), dtype=np.float32)
    return (one, w) if w.shape[0] <= w.shape[1] else (w, one)


def _lokr(module: Module, base: Base | None) -> Terms:
    (p1, q1), (p2, q2) = (_factors(module, name) for name in ("lokr_w1", "lokr_w2"))
    return smallest(np.kron(p1, p2) * _lycoris_scale(module), np.kron(q1, q2))


# --- beside the linear -----------------------------------------------------------------------------------------------


def _experts(module: Module, base: Base | None) -> Terms:
    return dataclasses.replace(_lora(module, base), beside={ROUTER: module[ROUTER]})


def _bottleneck(module: Module, base: Base | None) -> Terms:
    scale = np.float32(lora_scale(module))
    return Terms(beside={e: module[e] * scale if "_up." in e else module[e] for e in module.tensors})


def _row(peft_type: str, understood: str, training: set[str], required: list[str], terms: Any, **more: Any) -> Kind:
    """Make a row; each of `required` is one complete set of a module's tensors, the optional ones come by keyword."""
    groups = tuple(tuple(group.split()) for group in required)
    optional = tuple(more.pop("optional", "").split())
    endings = tuple(dict.fromkeys([*optional, *(name for group in groups for name in group)]))
    known = frozenset({*UNDERSTOOD, *understood.split()})
    return Kind(peft_type, known, frozenset(training), endings, groups, terms, **more)


def _prompt(peft_type: str) -> Kind:
    known = frozenset({*UNDERSTOOD, *prompts.SETTINGS})
    return Kind(peft_type, known, frozenset(PROMPT_TRAINING), (), (), _no_terms, (prompts.ROWS,), prompt=True)


def _no_terms(module: Module, base: Base | None) -> Terms:
    raise NotImplementedError("a prompt adapts no module")


LORA_SETTINGS = (
    "r lora_alpha use_rslora rank_pattern alpha_pattern bias use_dora lora_bias use_qalora ensure_weight_tying"
)
KINDS: dict[str, Kind] = {
    row.peft_type: row
    for row in (
        _row(
            "LORA", LORA_SETTINGS, LORA_TRAINING, ["lora_A.weight lora_B.weight", "lora_embedding_A lora_embedding_B"],
            _lora, optional="lora_B.bias lora_magnitude_vector",
        ),
        _row(
            "ADALORA", "r lora_alpha init_r bias",
            {
                *LORA_TRAINING, "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
                "total_step", "rank_pattern",
            },
            ["lora_A lora_B lora_E"], _adalora,
        ),
        _row(
            "VERA", "r projection_prng_key save_projection bias", {"d_initial", "vera_dropout", "init_weights"},
            ["vera_lambda_b vera_lambda_d"], _vera, common=("vera_A", "vera_B"),
        ),
        _row("IA3", "", {"feedforward_modules", "init_ia3_weights"}, ["ia3_l"], _ia3),
        _row(
            "LOHA", "r alpha rank_pattern alpha_pattern", LYCORIS_TRAINING,
            ["hada_w1_a hada_w1_b hada_w2_a hada_w2_b"], _loha,
        ),
        _row(
            "LOKR", "r alpha rank_pattern alpha_pattern",
            {*LYCORIS_TRAINING, "decompose_both", "decompose_factor"},
            ["lokr_w1 lokr_w2", "lokr_w1_a lokr_w1_b lokr_w2", "lokr_w1 lokr_w2_a lokr_w2_b",
             "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b"],
            _lokr,
        ),
        _row(
            "EXPERTS", "r lora_alpha experts bias", LORA_TRAINING, [f"lora_A.weight lora_B.weight {ROUTER}"],
            _experts,
        ),
        *(
            _row(kind, "r lora_alpha bias", LORA_TRAINING, [" ".join(endings)], _bottleneck)
            for kind, endings in (("BOTTLENECK", BOTTLENECK), ("PARALLEL", PARALLEL))
        ),
        *(_prompt(kind) for kind in prompts.TYPES),
    )
}  # fmt: skip
