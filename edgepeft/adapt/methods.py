"""The adapter methods that can be trained: one row each, and how Hugging Face PEFT is told to train it.

A method exists only until its training ends: what it saved is a PEFT folder of some kind (`kinds`), and every later
stage knows the terms of the one equation alone (`terms`):

    y = s_out ⊙ ( W·(s_in ⊙ x) + B·( gate ⊙ (A·x) ) ) + bias

A row builds the PEFT configuration and may say more: what is done to the model before PEFT sees it (`prepare`) and
after (`attach`), with which optimizer (`optimizer`), what happens when training begins, goes on from a checkpoint, and
after each of its steps (`begin`, `resume`, `step`), and what a checkpoint holds beside what PEFT puts into it (`save`,
`restore`); those live in `training`. A method whose effect is not on a
linear (prompts, prefixes, bottlenecks) is a row as well: its hooks put it into the model.

The table is named by the command line, so this module imports neither numpy, torch nor peft at its top.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from edgepeft.adapt import prompts
from edgepeft.adapt.terms import PREFIX, Terms
from edgepeft.backbone.families import FAMILIES

if TYPE_CHECKING:
    from edgepeft.config import Config

__all__ = ["METHODS", "PREFIX", "Method", "Terms"]

BRANCHES = ("EXPERTS", "BOTTLENECK", "PARALLEL")


@dataclasses.dataclass(frozen=True)
class Method:
    """One adapter method.

    peft_type: how adapter_config.json names what is saved.  words: what it is, for the documentation.
    hooks: {moment: name of a function in `edgepeft.adapt.training`}; moments are "prepare", "attach", "optimizer",
    "begin", "resume", "step", "save" and "restore".  trains_base: it trains tensors of the base that stay in float.
    """

    tag: str
    peft_type: str
    words: str
    _peft_config: Callable[..., Any]
    hooks: dict[str, str] = dataclasses.field(default_factory=dict)
    trains_base: bool = False

    @property
    def prompt(self) -> bool:
        """Tell whether it stands before the text, which takes a row of its own then."""
        return self.peft_type in prompts.TYPES

    @property
    def apart(self) -> bool:
        """Tell whether it stands before the text or beside the weights, and so goes into none of them."""
        return self.prompt or self.peft_type in BRANCHES

    @property
    def lora_everywhere(self) -> bool:
        """Tell whether each linear gets an A and a B of its own, of the rank that is asked for."""
        return self.peft_type == "LORA" and not {"attach", "begin"} & set(self.hooks)

    def peft_config(self, config: Config, modules: Iterable[str], heads: Iterable[str], task_type: str) -> Any:
        """Return the PEFT configuration that adapts the linears `modules` and trains the modules `heads` in full."""
        return self._peft_config(config, sorted(modules), sorted(heads), task_type)

    def at(self, moment: str, *arguments: Any) -> Any:
        """Do what the row has for a moment of training; None where it has nothing."""
        if moment not in self.hooks:
            return None
        return getattr(importlib.import_module("edgepeft.adapt.training"), self.hooks[moment])(*arguments)


def _lora(*given: Any, **more: Any) -> Any:
    from edgepeft.adapt import fused

    return fused.in_one(_any_lora(*given, **more))


def _any_lora(config: Config, modules: list[str], heads: list[str], task_type: str, **more: Any) -> Any:
    from peft import LoraConfig

    # PEFT takes any real alpha; its annotation says int.
    alpha: Any = config.alpha
    return LoraConfig(
        **{
            "r": config.rank, "lora_alpha": alpha, "lora_dropout": config.dropout, "target_modules": modules,
            "modules_to_save": heads, "bias": "none", "task_type": task_type, **more,
        }
    )  # fmt: skip


def _rslora(*given: Any) -> Any:
    return _lora(*given, use_rslora=True)


def _dora(*given: Any) -> Any:
    return _lora(*given, use_dora=True)


def _qalora(config: Config, *given: Any) -> Any:
    from edgepeft.adapt import layers
    from edgepeft.quant.formats import FORMATS

    return layers.pooled(_any_lora(config, *given, use_qalora=True, qalora_group_size=FORMATS[config.format].group))


def _bitfit(config: Config, modules: list[str], heads: list[str], task_type: str) -> Any:
    """Train biases; PEFT knows them only beside a LoRA, so one linear carries the smallest one, frozen at zero."""
    return _lora(config, modules[:1], heads, task_type, r=1, lora_alpha=1, lora_dropout=0.0, bias="all")


def _adalora(config: Config, modules: list[str], heads: list[str], task_type: str) -> Any:
    from peft import AdaLoraConfig

    # Half as many ranks again to choose from. The steps become known when training begins.
    start, alpha = config.rank + (config.rank + 1) // 2, config.alpha
    return AdaLoraConfig(
        init_r=start, target_r=config.rank, lora_alpha=alpha * start / config.rank,  # type: ignore[arg-type]  # it says int
        lora_dropout=config.dropout, target_modules=modules, modules_to_save=heads, total_step=3, tinit=0, tfinal=1,
        task_type=task_type,
    )  # fmt: skip


def _vera(config: Config, modules: list[str], heads: list[str], task_type: str) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        r=config.rank, target_modules=modules, modules_to_save=heads, vera_dropout=config.dropout,
        projection_prng_key=config.seed, save_projection=True, task_type=task_type,
    )  # fmt: skip


def _in_roles(modules: list[str], *roles: str) -> list[str]:
    """Return the modules that play one of these roles in a family of models."""
    names = {family.linears[role] for family in FAMILIES.values() for role in roles if role in family.linears}
    ends = re.compile(r"(.*\.)?(" + "|".join(re.escape(name).replace(r"\{i\}", r"\d+") for name in names) + ")")
    return [module for module in modules if ends.fullmatch(module)]


def _ia3(config: Config, modules: list[str], heads: list[str], task_type: str) -> Any:
    from peft import IA3Config

    # The paper's places: the keys, the values, and what goes into the second linear of the feed-forward.
    down, scaled = _in_roles(modules, "down"), _in_roles(modules, "k", "v", "qkv")
    return IA3Config(
        target_modules=sorted([*down, *scaled]), feedforward_modules=down, modules_to_save=heads, task_type=task_type
    )


def _lycoris(name: str, config: Config, modules: list[str], heads: list[str], task_type: str) -> Any:
    import peft

    return getattr(peft, name)(
        r=config.rank, alpha=config.alpha, target_modules=modules, modules_to_save=heads, rank_dropout=config.dropout,
        task_type=task_type,
    )  # fmt: skip


def _ours(kind: str, config: Config, modules: list[str], heads: list[str], task_type: str, **more: Any) -> Any:
    from edgepeft.adapt.layers import OwnConfig

    given = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, **more}
    return OwnConfig(kind=kind, target_modules=modules, modules_to_save=heads, task_type=task_type, **given)


def _experts(config: Config, *given: Any) -> Any:
    experts = config.experts
    return _ours("EXPERTS", config, *given, experts=experts, r=config.rank * experts, lora_alpha=config.alpha * experts)


def _bottleneck(peft_type: str, roles: tuple[str, ...], config: Config, modules: list[str], *given: Any) -> Any:
    return _ours(peft_type, config, _in_roles(modules, *roles), *given)


def _prompt(name: str, config: Config, modules: list[str], heads: list[str], task_type: str) -> Any:
    import peft

    return getattr(peft, name)(
        num_virtual_tokens=config.prompt_tokens, modules_to_save=heads or None, task_type=task_type
    )


ROWS = (
    Method("lora", "LORA", "B·A beside each linear", _lora),
    Method("rslora", "LORA", "LoRA scaled by alpha/√rank", _rslora),
    Method("loraplus", "LORA", "LoRA whose B learns faster (--lora-plus-ratio)", _lora, {"optimizer": "loraplus"}),
    Method("dora", "LORA", "LoRA beside a magnitude for each row of W", _dora),
    Method(
        "qalora", "LORA", "LoRA on sums of x over blocks, whose merge is exact", _qalora, {"prepare": "whole_blocks"}
    ),
    Method(
        "adalora", "ADALORA", "ranks given, while training, to the linears that need them", _adalora,
        {"attach": "adalora_apart", "begin": "adalora_begin", "resume": "adalora_keep", "step": "adalora_step"},
    ),
    Method("vera", "VERA", "two random matrices for all linears, vectors of each", _vera, {"attach": "vera_halves"}),
    Method("share-layers", "LORA", "one A, B for a role in all layers", _lora, {"attach": "share_layers"}),
    Method(
        "share-groups", "LORA", "one A, B for a role in a group of layers (--share-groups)", _lora,
        {"attach": "share_groups"},
    ),
    Method("ia3", "IA3", "scales of keys, values and the feed-forward", _ia3),
    Method(
        "loha", "LOHA", "the product, number by number, of two low-rank matrices",
        functools.partial(_lycoris, "LoHaConfig"),
    ),
    Method("lokr", "LOKR", "a Kronecker product of two small matrices", functools.partial(_lycoris, "LoKrConfig")),
    Method(
        "bitfit", "LORA", "the biases and nothing else", _bitfit, {"prepare": "free_biases", "attach": "only_biases"},
        trains_base=True,
    ),
    Method("experts", "EXPERTS", "LoRA experts, mixed anew for each token (--experts)", _experts),
    Method(
        "houlsby", "BOTTLENECK", "bottlenecks behind attention and feed-forward",
        functools.partial(_bottleneck, "BOTTLENECK", ("o", "down")),
    ),
    Method(
        "pfeiffer", "BOTTLENECK", "bottlenecks behind the feed-forward",
        functools.partial(_bottleneck, "BOTTLENECK", ("down",)),
    ),
    Method(
        "parallel", "PARALLEL", "bottlenecks beside the feed-forward",
        functools.partial(_bottleneck, "PARALLEL", ("down",)), {"attach": "connect"},
    ),
    Method(
        "prompt", "PROMPT_TUNING", "learned rows before the tokens' embeddings (--prompt-tokens)",
        functools.partial(_prompt, "PromptTuningConfig"), {"prepare": "prompt_prepare", "attach": "prompt_begin"},
    ),
    Method(
        "p-tuning", "P_TUNING", "such rows, made by a small network while they are trained",
        functools.partial(_prompt, "PromptEncoderConfig"),
        {
            "prepare": "prompt_prepare", "attach": "network_begin", "save": "network_save",
            "restore": "network_restore",
        },
    ),
    Method(
        "prefix", "PREFIX_TUNING", "learned keys and values of every layer before the text",
        functools.partial(_prompt, "PrefixTuningConfig"), {"prepare": "prompt_prepare", "attach": "prefix_begin"},
    ),
)  # fmt: skip
METHODS: dict[str, Method] = {row.tag: row for row in ROWS}
