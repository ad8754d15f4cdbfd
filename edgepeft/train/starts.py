"""Where an adapter begins: better starts than B = 0, taken from the float weights that were quantized.

| --start | A, B | the model before the first step |
|---|---|---|
| default | A drawn, B = 0 | the packed one |
| loftq | B·A = the best rank-R approximation of W - Ŵ | nearer to the float one |
| pissa | B·A = that of W itself, taken off the packed weight again: y = Ŵ·x + (B·A - B₀·A₀)·x | the packed one |

W: the float weight; Ŵ: the packed one. LoftQ (Li et al., 2023) begins where quantization lost most; this is one of its
steps, without the alternation with quantizing W - B·A anew. PiSSA (Meng et al., 2024) trains the principal directions
of W instead of drawn ones; the constant -B₀·A₀ is shipped beside B·A, an adapter of rank 2R, exactly what was trained.

Neither changes a packed bit. So the base stays the base: adapters of other starts and tasks go on fitting it, and with
the adapter off it is the quantized model as ever. (Both papers put a residue into the base instead, which then fits
that one adapter.) The split between A and B is even, √S each, and B is divided by what PEFT multiplies it by.

Weights are read one at a time; the singular value decomposition is a randomized one (Halko et al., 2011), seeded.
A linear that was kept in float has nothing to give back, so `loftq` leaves it with B = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepeft.adapt.methods import METHODS, PREFIX
from edgepeft.backbone.checkpoint import backbone_names, iter_tensors
from edgepeft.backbone.families import family_of
from edgepeft.backbone.load import resolve_model
from edgepeft.console import progress
from edgepeft.errors import ConfigError

if TYPE_CHECKING:
    from edgepeft.config import Config

OVERSAMPLED, ROUNDS = 8, 8  # the decomposition: more columns than asked for, and how often they are refined
DEFAULT = "default"


def begin(model: Any, config: Config) -> None:
    """Give the adapter of a PEFT model the configured start. Raises ConfigError for a method that cannot have it."""
    for _, layer, w_nk in progress(_adapted(model, config), "start"):
        STARTS[config.start](layer, w_nk, config.seed)


def _adapted(model: Any, config: Config) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """Yield (name in the task model, adapted linear, its float weight [N, K])."""
    source = resolve_model(config)
    names, layers = backbone_names(source, family_of(source.settings, str(source.path))), _layers(model, config)
    for old, w_nk in iter_tensors(source):
        module = names.get(old, "").removesuffix(".weight")
        if module in layers:
            yield module, layers[module], torch.from_numpy(np.array(w_nk))


def _layers(model: Any, config: Config) -> dict[str, Any]:
    """Return {name in the task model: adapted linear}."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = model.get_base_model().named_modules()
    layers = {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}
    method = METHODS[config.method]
    own = method.peft_type == "LORA" and not {"prepare", "attach"} & method.hooks.keys()
    if not own or not all(_adds_alone(layer) for layer in layers.values()):
        raise ConfigError(
            f"--start {config.start}: expected a method that adds B·A to the weight and does nothing else, as lora "
            f"does; found --method {config.method}. Take --start default."
        )
    return layers


def _adds_alone(layer: Any) -> bool:
    magnitude = getattr(layer, "lora_magnitude_vector", {})
    return isinstance(getattr(layer, "lora_B", None), torch.nn.ModuleDict) and DEFAULT not in magnitude


def principal(w_nk: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B [N, R], A [R, K]) whose product is the best approximation of W [N, K], its size shared evenly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        q = min(rank + OVERSAMPLED, *w_nk.shape)
        u_nq, s_q, v_kq = torch.svd_lowrank(w_nk, q=q, niter=ROUNDS)
    root_r = s_q[:rank].sqrt()
    return u_nq[:, :rank] * root_r, (v_kq[:, :rank] * root_r).T


def _put(layer: Any, b_nr: torch.Tensor, a_rk: torch.Tensor) -> None:
    """Let a layer begin with B·A; a rank above what W has is filled with zeros in B, drawn rows in A."""
    with torch.no_grad():
        rank = a_rk.shape[0]
        layer.lora_A[DEFAULT].weight[:rank] = a_rk
        layer.lora_B[DEFAULT].weight[:, :rank] = b_nr / layer.scaling[DEFAULT]


def _loftq(layer: Any, w_nk: torch.Tensor, seed: int) -> None:
    base = layer.get_base_layer()
    if hasattr(base, "get_weight"):
        _put(layer, *principal(w_nk - base.get_weight(), layer.r[DEFAULT], seed))


def _pissa(layer: Any, w_nk: torch.Tensor, seed: int) -> None:
    b_nr, a_rk = principal(w_nk, layer.r[DEFAULT], seed)
    _put(layer, b_nr, a_rk)
    layer.begun = b_nr, a_rk
    layer.get_base_layer().register_forward_hook(lambda _, given, y: y - (given[0] @ a_rk.T.to(y)) @ b_nr.T.to(y))


STARTS: dict[str, Callable[[Any, torch.Tensor, int], None]] = {"loftq": _loftq, "pissa": _pissa}


# --- what is shipped -----------------------------------------------------------------------------------------------


def shipped(
    model: Any, config: Config, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the settings and tensors of an adapter that needs no such model: of `pissa` one of rank 2R.

    With A₀ below A and -B₀ beside B, scaled as B is.
    """
    if config.start != "pissa":
        return dict(settings), dict(tensors)
    result = dict(tensors)
    for module, layer in _layers(model, config).items():
        b_nr, a_rk = layer.begun
        a, b = (f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")
        result[a] = np.concatenate([tensors[a], a_rk.numpy()])
        result[b] = np.concatenate([tensors[b], -b_nr.numpy() / layer.scaling[DEFAULT]], axis=1)
    wider = math.sqrt(2) if settings.get("use_rslora") else 2
    return {**settings, "r": 2 * config.rank, "lora_alpha": wider * config.alpha}, result
