"""Layers of methods that Hugging Face PEFT does not have here, injected and saved by it like its own LoRA layers.

    experts      y = W x + Σ_e p_e · scale · B_e (A_e x)              p = softmax(router x), one p for each token
    bottleneck   z = y + scale · ( U·gelu(D·y + d) + u )              y = W x + bias, what the linear gives
    parallel     z = y + scale · ( U·gelu(D·h + d) + u )              h: what goes into the feed-forward
    pooled       y = W x + scale · B ( A (J · x̄) )                    x̄ [J]: means of x over J blocks of its K numbers

A layer wraps a linear, packed or not, through PEFT's registry of custom LoRA modules, so its parameters are named,
saved, switched and frozen as a LoRA's are. The experts' A [E R, K] and B [N, E R] are stacked along the rank; D [R, N],
U [N, R], as h is as wide as y. U starts at zero, so training starts from the base.

What is saved says `peft_type` EXPERTS, BOTTLENECK or PARALLEL, which PEFT itself refuses: as a LoRA it would load
without the router, or do nothing. `load` reads it, and every folder that PEFT reads. The arithmetic of `pooled` is
PEFT's own, which uses it on GPTQ's linears alone; so it is saved as PEFT saves it.

Sources: mixtures of LoRA experts as in MoLE (Wu et al. 2024) and LoRAMoE (Dou et al. 2023), dense, since few experts
of small rank cost little; adapters by Houlsby et al. 2019 (behind both halves of a layer), Pfeiffer et al. 2021
(behind the feed-forward alone) and He et al. 2022 (beside the feed-forward); QA-LoRA by Xu et al. 2023. Left out:
sparse routing, a loss that balances it.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import QALoraLinearVariant

from edgepeft.adapt import prompts
from edgepeft.artifact import read_json, read_tensors
from edgepeft.backbone.families import family_of


def _size(features: int | None) -> int:
    assert features is not None, "layers stand on linears"
    return features


class Experts(LoraLinear):
    """A linear beside E LoRA experts and their router; see the module's docstring."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_router")

    def __init__(self, *given: Any, experts: int, **named: Any) -> None:
        self._experts = experts
        super().__init__(*given, **named)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter: PEFT's A and B, and a router that starts with equal shares."""
        if "lora_router" not in self._modules:
            self.lora_router = torch.nn.ModuleDict()
        router = torch.nn.Linear(_size(self.in_features), self._experts, bias=False)
        self.lora_router[adapter_name] = router
        torch.nn.init.zeros_(router.weight)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        """Return [..., N] of x [..., K]."""
        y = self.base_layer(x, *given, **named)
        for name in self.active_adapters:
            if self.disable_adapters or name not in self.lora_A:
                continue
            a, b, h = self.lora_A[name], self.lora_B[name], x.to(torch.float32)
            low = a(self.lora_dropout[name](h))
            share = torch.softmax(self.lora_router[name](h), dim=-1)
            gate = share.repeat_interleave(low.shape[-1] // share.shape[-1], dim=-1)
            y = y + (b(gate * low) * self.scaling[name]).to(y.dtype)
        return y


class Bottleneck(LoraLinear):
    """A linear with a bottleneck behind it; see the module's docstring."""

    parts = ("lora_down", "lora_up")
    adapter_layer_names = (*LoraLayer.adapter_layer_names, *parts)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter of width r, whose second half starts at zero."""
        for part in self.parts:
            if part not in self._modules:
                self.add_module(part, torch.nn.ModuleDict())
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = torch.nn.Dropout(config.lora_dropout)
        width = _size(self.out_features)
        down, up = torch.nn.Linear(width, r), torch.nn.Linear(r, width)
        for parameter in up.parameters():
            torch.nn.init.zeros_(parameter)
        for part, layer in zip(self.parts, (down, up), strict=True):
            self._part(part)[adapter_name] = layer
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _part(self, name: str) -> Any:
        return self._modules[name]

    def source(self, y: torch.Tensor) -> torch.Tensor:
        """Return what the bottleneck reads: the linear's output [..., N]."""
        return y

    def forward(self, x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        """Return [..., N] of x [..., K]."""
        y = self.base_layer(x, *given, **named)
        downs, ups = (self._part(part) for part in self.parts)
        h = self.source(y).to(torch.float32)
        for name in self.active_adapters:
            if not self.disable_adapters and name in downs:
                low = torch.nn.functional.gelu(downs[name](self.lora_dropout[name](h)))
                y = y + (ups[name](low) * self.scaling[name]).to(y.dtype)
        return y


class Beside(Bottleneck):
    """A linear with a bottleneck beside the feed-forward that it ends: it reads the input of the feed-forward."""

    parts = ("lora_beside_down", "lora_beside_up")
    adapter_layer_names = (*LoraLayer.adapter_layer_names, *parts)

    def tap(self, first: torch.nn.Module) -> None:
        """Read what goes into `first`, the linear that the feed-forward begins with."""
        first.register_forward_pre_hook(lambda _, given: self._caches.update(h=given[0]))

    def source(self, y: torch.Tensor) -> torch.Tensor:
        """Return the input of the feed-forward, [..., N]."""
        return self._caches.pop("h")


class Pooled(LoraLinear):
    """A linear beside a LoRA of block means; see the module's docstring."""

    def resolve_lora_variant(self, *, config: LoraConfig, **named: Any) -> QALoraLinearVariant:
        """Return what PEFT has for GPTQ's linears."""
        return QALoraLinearVariant()


def pooled(config: Any) -> Any:
    """Let a LoRA's settings that say `use_qalora` inject `Pooled` into any linear; return them."""
    config._register_custom_module({torch.nn.Linear: Pooled})
    return config


LAYERS: dict[str, type[LoraLinear]] = {"EXPERTS": Experts, "BOTTLENECK": Bottleneck, "PARALLEL": Beside}
READ = ("r", "lora_alpha", "target_modules", "modules_to_save", "task_type", "inference_mode", "experts")


@dataclasses.dataclass
class OwnConfig(LoraConfig):
    """A LoRA's settings that inject the layers of one of our kinds. What is saved names the kind as peft_type."""

    kind: str = "BOTTLENECK"
    experts: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        layer: Any = LAYERS[self.kind]
        layer = functools.partial(layer, experts=self.experts) if layer is Experts else layer
        self._register_custom_module({torch.nn.Linear: layer})

    def to_dict(self) -> dict[str, Any]:
        """Return what adapter_config.json holds."""
        found = super().to_dict()
        found["peft_type"] = found.pop("kind")
        return found if found["experts"] else {name: value for name, value in found.items() if name != "experts"}


def connect(peft: Any) -> None:
    """Connect every `Beside` with the linear that its feed-forward begins with."""
    model = peft.base_model.model
    family = family_of(model.config.to_dict(), "the model")
    for i in range(getattr(model.config, family.layers_setting)):
        first, last = (f"{family.prefix}.{name.format(i=i)}" for name in family.feedforward)
        layer = model.get_submodule(last)
        if isinstance(layer, Beside):
            layer.tap(model.get_submodule(first))


def load(model: Any, folder: Path) -> Any:
    """Return `model` with the adapter of a folder: as PEFT loads it, or one of our types."""
    from peft import PeftModel, get_peft_model, set_peft_model_state_dict

    settings = read_json(folder / "adapter_config.json")
    kind = settings.get("peft_type")
    if settings.get("use_qalora"):
        return PeftModel.from_pretrained(model, str(folder), config=pooled(LoraConfig.from_pretrained(str(folder))))
    if kind not in LAYERS:
        return prompts.embeds(PeftModel.from_pretrained(model, str(folder)))
    given = {name: settings[name] for name in READ if settings.get(name) is not None}
    peft = get_peft_model(model, OwnConfig(kind=kind, **given))
    connect(peft)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    found = {name: torch.from_numpy(value.astype("float32")) for name, value in tensors.items()}
    set_peft_model_state_dict(peft, found)
    return peft
