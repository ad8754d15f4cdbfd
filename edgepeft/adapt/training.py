"""What methods do to a model besides their PEFT configuration: the hooks that rows of METHODS name.

`model` is the transformers model before injection, `peft` the PEFT model after it.

Sharing makes several adapters one: the modules hold the same `Parameter`, so its gradient is the sum of theirs, the
optimizer sees it once, and a saved file repeats it, as PEFT expects.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from edgepeft.adapt import layers, prompts
from edgepeft.backbone.families import family_of
from edgepeft.errors import ConfigError
from edgepeft.quant.formats import FORMATS

if TYPE_CHECKING:
    from edgepeft.config import Config

NETWORK = "prompt_encoder.safetensors"
LAYER = re.compile(r"\.(\d+)\.")


# --- parameter sharing -------------------------------------------------------------------------------------------


def _pairs(peft: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of every LoRA layer."""
    for name, module in peft.named_modules():
        if getattr(module, "lora_A", None) and "default" in module.lora_A:
            yield name, module


def _share(peft: Any, group_size: int) -> None:
    """Let layers of one role hold one A and one B, in groups of `group_size` neighbours."""
    first: dict[tuple[str, int, tuple[int, ...]], Any] = {}
    for name, layer in _pairs(peft):
        number = LAYER.search(name)
        shape = (layer.in_features, layer.out_features)
        key = (LAYER.sub(".*.", name, count=1), int(number[1]) // group_size if number else 0, shape)
        source = first.setdefault(key, layer)
        for side in ("lora_A", "lora_B"):
            getattr(layer, side)["default"].weight = getattr(source, side)["default"].weight


def share_layers(peft: Any, config: Config) -> None:
    """One A, B for each role."""
    _share(peft, peft.config.num_hidden_layers)


def share_groups(peft: Any, config: Config) -> None:
    """One A, B for each role in each of --share-groups groups of layers."""
    layers = peft.config.num_hidden_layers
    if not 1 <= config.share_groups <= layers:
        raise ConfigError(f"--share-groups: expected 1 to {layers}, the model's layers, found {config.share_groups}.")
    _share(peft, -(-layers // config.share_groups))


# --- QA-LoRA -------------------------------------------------------------------------------------------------------


def whole_blocks(model: Any, config: Config) -> None:
    """Raise ConfigError for a linear whose inputs the format's blocks do not cut into equal parts."""
    group = FORMATS[config.format].group
    linears = [(name, m.in_features) for name, m in model.base_model.named_modules() if isinstance(m, torch.nn.Linear)]
    if odd := [f"{name} (K={k})" for name, k in linears if k % group]:
        raise ConfigError(
            f"--method qalora: expected inputs in blocks of {group}, those of --format {config.format}; found "
            f"{', '.join(odd)}. Take --method lora, or a format of smaller blocks."
        )


# --- VeRA ----------------------------------------------------------------------------------------------------------


def vera_halves(peft: Any, config: Config) -> None:
    """Round the shared A to values of float16, so that the device has the very matrix that was trained with."""
    with torch.no_grad():
        shared = peft.base_model.vera_A["default"]
        shared.copy_(shared.half().float())


# --- LoRA+ ---------------------------------------------------------------------------------------------------------


def loraplus(peft: Any, config: Config, weight_decay: float) -> Any:
    """Return AdamW whose learning rate for B is --lora-plus-ratio times that of everything else."""
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        peft, torch.optim.AdamW, lr=config.learning_rate, loraplus_lr_ratio=config.lora_plus_ratio,
        loraplus_weight_decay=weight_decay,
    )  # fmt: skip


# --- AdaLoRA -------------------------------------------------------------------------------------------------------


def adalora_apart(peft: Any, config: Config) -> None:
    """Give PEFT outputs it may add to in place, which autograd forbids for those of a packed linear."""
    for name, module in peft.named_modules():
        if name.endswith(".base_layer"):
            module.register_forward_hook(lambda _module, _inputs, output: output.clone())


def adalora_begin(peft: Any, steps: int, epochs: int) -> None:
    """Plan the allocation: a sixth of the first epoch as it is, ranks given away until its end, then fixed.

    So every checkpoint, whichever is the best, keeps to the ranks asked for, and none needs what the allocation goes by
    (averages over the steps), as it is over. steps: of one epoch; a training of one
    epoch keeps its last third for the ranks that are left.
    """
    settings = peft.peft_config["default"]
    end = steps if epochs > 1 else max(1, steps - steps // 3)
    settings.total_step, settings.tinit = steps * epochs, end // 6
    settings.tfinal = settings.total_step - end
    settings.deltaT = max(1, end // 50)


def adalora_step(peft: Any, step: int) -> None:
    """Move ranks after an optimizer's step, while its gradients are there.

    The chosen ranks stay a mask (their singular values are zero elsewhere), so that sizes never change under the
    optimizer, and a checkpoint goes on as it was; what the device gets leaves the empty ones out.
    """
    tuner, settings = peft.base_model, peft.peft_config["default"]
    last = settings.total_step - settings.tfinal
    if step <= last:
        tuner.update_and_allocate(step)
        settings.rank_pattern = None
    if step == last:
        adalora_keep(peft)
    with torch.no_grad():
        for name, values in _singular_values(peft) if step > last else ():
            values.mul_(vars(tuner)["_kept_ranks"][name])


def adalora_keep(peft: Any) -> None:
    """Fix the ranks that are not empty now: where allocation ends, and of a checkpoint, which is always later."""
    vars(peft.base_model)["_kept_ranks"] = {name: values != 0 for name, values in _singular_values(peft)}


def _singular_values(peft: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in peft.named_parameters():
        if ".lora_E." in name:
            yield name, parameter


# --- BitFit --------------------------------------------------------------------------------------------------------


def free_biases(model: Any, config: Config) -> None:
    """Make the packed linears' biases parameters, as every other bias is one."""
    from edgepeft.quant.linear import QuantLinear

    for module in model.modules():
        if isinstance(module, QuantLinear) and (bias := module._buffers.get("bias")) is not None:
            del module._buffers["bias"]
            module.register_parameter("bias", torch.nn.Parameter(bias.clone(), requires_grad=False))
    if not any(name.endswith(".bias") and not name.startswith("classifier") for name, _ in model.named_parameters()):
        raise ConfigError("--method bitfit: this model has no biases to train. Take --method ia3 or lora.")


def only_biases(peft: Any, config: Config) -> None:
    """Freeze the LoRA that carries the biases; its B is zero and stays so."""
    for _, layer in _pairs(peft):
        for side in (layer.lora_A, layer.lora_B):
            side["default"].weight.requires_grad_(False)


# --- prompts -------------------------------------------------------------------------------------------------------


def prompt_prepare(model: Any, config: Config) -> None:
    """Refuse what would train without a prefix, or without its teacher."""
    if config.method != "prefix":
        return
    if config.checkpointing:  # layers that are computed twice forget their cache
        raise ConfigError("--checkpointing: layers that are computed twice take no prefix. Leave it out.")
    if config.teacher != "none" and not decodes(model):  # PEFT then goes past the model's own forward
        raise ConfigError("--method prefix: a classifier with a prefix takes no teacher. Take --method prompt.")


def prompt_begin(peft: Any, config: Config) -> None:
    """Begin with rows of the vocabulary, drawn by the seed: a prompt that could be a text."""
    with torch.no_grad():
        peft.prompt_encoder["default"].embedding.weight.copy_(_words(peft, config))


def _words(peft: Any, config: Config) -> torch.Tensor:
    words, chance = prompts.embeds(peft).word_embeddings, torch.Generator().manual_seed(config.seed)
    return words(torch.randint(words.num_embeddings, (config.prompt_tokens,), generator=chance))


def network_begin(peft: Any, config: Config) -> None:
    """Leave the start to PEFT: a network drawn by the seed makes the rows."""
    prompts.embeds(peft)


def network_save(peft: Any, folder: Path) -> None:
    """Write the network into a checkpoint, where PEFT has but the rows that it makes."""
    save_file(peft.prompt_encoder["default"].state_dict(), folder / NETWORK)


def network_restore(peft: Any, folder: Path) -> None:
    """Put back the network of a checkpoint."""
    peft.prompt_encoder["default"].load_state_dict(load_file(folder / NETWORK))


def prefix_begin(peft: Any, config: Config) -> None:
    """Begin with what the model makes of such rows."""
    with torch.no_grad():
        base, rows = peft.get_base_model(), _words(peft, config)[None]
        parts = _cached(base, rows) if decodes(base) else _keys_and_values(base, rows)
        peft.prompt_encoder["default"].embedding.weight.copy_(torch.cat(parts, -1))


def decodes(model: Any) -> bool:
    """Tell whether a model is a causal language model."""
    return family_of(model.config.to_dict(), "the model").kind == "decoder"


def _cached(model: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    """Return what a language model's cache holds of rows, [V, kv_heads * head_dim] each."""
    layers = prompts.cached(model, rows).layers
    return [part[0].transpose(0, 1).flatten(1) for layer in layers for part in (layer.keys, layer.values)]


def _keys_and_values(model: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    """Return what an encoder's k and v make of rows, layer by layer, [V, hidden] each."""
    family, found = family_of(model.config.to_dict(), "the model"), []
    backbone = model.get_submodule(family.prefix)
    modules = [family.linears[role].format(i=i) for i in range(model.config.num_hidden_layers) for role in "kv"]
    keep = lambda _module, _inputs, output: found.append(output[0])  # noqa: E731 - one line
    hooks = [backbone.get_submodule(name).register_forward_hook(keep) for name in modules]
    backbone(inputs_embeds=rows)
    for hook in hooks:
        hook.remove()
    return found


# --- bottlenecks ---------------------------------------------------------------------------------------------------


def connect(peft: Any, config: Config) -> None:
    """Let bottlenecks beside a feed-forward read what goes into it."""
    layers.connect(peft)
