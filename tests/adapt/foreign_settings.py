"""Adapters as Hugging Face PEFT makes and saves them, one for each setting, with random values that all matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgepeft.adapt.methods import METHODS
from edgepeft.config import Config

ATTENTION = {"bert": ["query", "key", "value"], "llama": ["q_proj", "k_proj", "v_proj"]}
MLP = {"bert": "output.dense", "llama": "down_proj"}
NORM = {"bert": "LayerNorm", "llama": "input_layernorm"}
WORD = {"bert": "word_embeddings", "llama": "embed_tokens"}
FIRST = {"bert": r".*\.layer\.0\..*\.(query|dense)", "llama": r".*\.layers\.0\..*\.(q_proj|up_proj)"}


def _lora(kind: str, **more: Any) -> Any:
    from peft import LoraConfig

    given = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION[kind], **more}
    return LoraConfig(init_lora_weights=False, **given)


# name -> (kind of model -> PEFT configuration)
LORA_SETTINGS: dict[str, Callable[[str], Any]] = {
    "rslora": lambda kind: _lora(kind, use_rslora=True),
    "patterns": lambda kind: _lora(
        kind, rank_pattern={ATTENTION[kind][0]: 2, ATTENTION[kind][2]: 8}, alpha_pattern={ATTENTION[kind][1]: 3}
    ),
    "patterns and rslora": lambda kind: _lora(kind, rank_pattern={ATTENTION[kind][0]: 2}, use_rslora=True),
    "one module": lambda kind: _lora(kind, target_modules=[ATTENTION[kind][1]]),
    "regex": lambda kind: _lora(kind, target_modules=FIRST[kind]),
    "all-linear": lambda kind: _lora(kind, target_modules="all-linear"),
    "one layer": lambda kind: _lora(kind, layers_to_transform=[1]),
    "fan_in_fan_out": lambda kind: _lora(kind, fan_in_fan_out=True),
    "bias all": lambda kind: _lora(kind, bias="all"),
    "bias lora_only": lambda kind: _lora(kind, bias="lora_only"),
    "lora_bias": lambda kind: _lora(kind, lora_bias=True),
    "norms saved": lambda kind: _lora(kind, modules_to_save=[NORM[kind]]),
    "dora": lambda kind: _lora(kind, use_dora=True),
    "dora and patterns": lambda kind: _lora(kind, use_dora=True, rank_pattern={ATTENTION[kind][0]: 2}),
    "dora and bias": lambda kind: _lora(kind, use_dora=True, bias="all"),
    "embeddings": lambda kind: _lora(kind, target_modules=[*ATTENTION[kind], WORD[kind]]),
}
DECODER_SETTINGS: dict[str, Callable[[str], Any]] = {
    "lm_head": lambda kind: _lora(kind, target_modules=[*ATTENTION[kind], "lm_head"]),
    "lm_head and embeddings": lambda kind: _lora(kind, target_modules=["lm_head", WORD[kind]]),
}


def randomize(peft: Any, seed: int = 0) -> None:
    """Give every trained tensor random values around what it is."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in {id(p): p for p in peft.parameters() if p.requires_grad}.values():
            spread = 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)


def setting(name: str, kind: str, model: Any, heads: list[str], config: Config) -> Any:
    """Return a PEFT model of a packed one with a setting's random adapter; a name of METHODS is that method."""
    import torch
    from peft import get_peft_model

    from edgepeft.adapt.training import free_biases
    from edgepeft.train.loop import adapted

    torch.manual_seed(0)
    if name in METHODS:
        peft = adapted(model, config.replace(method=name, rank=4, alpha=8.0, dropout=0.0))
    else:
        made = {**LORA_SETTINGS, **DECODER_SETTINGS}[name](kind)
        made.task_type = "SEQ_CLS" if heads else "CAUSAL_LM"
        made.modules_to_save = [*(made.modules_to_save or []), *heads]
        if made.bias != "none" and kind == "bert":
            free_biases(model, config)
        peft = get_peft_model(model, made)
    randomize(peft)
    return peft.eval()


def save(peft: Any, folder: Path) -> Path:
    """Save an adapter as PEFT does."""
    peft.save_pretrained(str(folder))
    return folder
