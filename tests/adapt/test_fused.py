"""A LoRA multiplied in one go is PEFT's LoRA: outputs, gradients, names, and whatever it leaves to PEFT."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from edgepeft.adapt import fused
from edgepeft.adapt.methods import METHODS
from edgepeft.config import Config
from edgepeft.quant.linear import QuantLinear, multiply_int8

K, N = 128, 48


class Net(torch.nn.Module):
    def __init__(self, tag: str = "i4b32", bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = QuantLinear.from_float(torch.nn.Linear(K, N, bias), tag)
        self.norm = torch.nn.LayerNorm(N)  # PEFT asks a model's first parameter where it is

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def pair(net: Net, **settings) -> tuple:
    """Return the same adapter on the same layer, by our layer and by PEFT's, B not zero."""
    models = []
    for ours in (True, False):
        config = LoraConfig(target_modules=["first"], **{"r": 4, "lora_alpha": 10, **settings})
        if ours:
            config = fused.in_one(config)
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(net), config).train()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
        models.append(model)
    assert type(models[0].base_model.model.first) is fused.PackedLora
    return tuple(models)


def results(model, x, autocast=False) -> dict:
    x = x.clone().requires_grad_(True)
    torch.manual_seed(2)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach().float(), "x": x.grad, **grads}


def same(ours, peft, x, rtol=2e-5, **more):
    found, wanted = results(ours, x, **more), results(peft, x, **more)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).abs().max() <= rtol * value.abs().max(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tag", ["i4b32", "nf4b64", "i8c"])
def test_outputs_and_gradients_are_peft_s(tag, bias, dropout):
    ours, peft = pair(Net(tag, bias), lora_dropout=dropout)
    same(ours, peft, torch.randn(2, 7, K))
    same(ours.eval(), peft.eval(), torch.randn(5, K))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_multiplies_as_peft_does(dropout):
    ours, peft = pair(Net(), lora_dropout=dropout)
    same(ours, peft, torch.randn(2, 7, K), rtol=2e-2, autocast=True)


def test_what_layers_share_is_cast_once_and_anew_when_it_changed():
    x, casts = torch.randn(3, K), []
    ours, _ = pair(Net())
    with torch.autocast("cpu", torch.bfloat16):
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: casts.append(t) or t, lambda t: t)
        with hooks:
            kept = [ours(x), ours(x)]
            before = kept[0].clone()
            x.mul_(2)
            after = ours(x)
    sources = {t.data_ptr() for t in casts if t.shape == (3, K)}
    assert (len(sources), {t.dtype for t in casts if t.shape == (3, K)}) == (2, {torch.bfloat16})
    assert not torch.equal(after, before)


def test_int8_activations_reach_the_linear_alone():
    ours, peft = pair(Net())
    plain = results(ours, torch.ones(3, K))["y"]
    for model in (ours, peft):
        multiply_int8(model)
    x = torch.randn(3, K)
    same(ours, peft, x)
    assert not torch.equal(results(ours, x)["y"], plain)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_what_is_more_than_a_lora_is_peft_s(settings):
    same(*pair(Net(), **settings), torch.randn(3, K))


def test_an_adapter_that_is_off_or_one_of_two_is_peft_s():
    models, x = pair(Net()), torch.randn(3, K)
    for model in models:
        torch.manual_seed(3)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    for chosen in (["default", "second"], ["second"]):
        for model in models:
            model.base_model.set_adapter(chosen)
        same(*models, x)
    for model in models:
        with model.disable_adapter():
            torch.testing.assert_close(model(x), model.base_model.model.first.base_layer(x))


def test_what_hangs_on_the_linear_is_heard():
    models = pair(Net())
    for model in models:
        model.base_model.model.first.base_layer.register_forward_hook(lambda _, given, y: y + given[0][..., :N])
    same(*models, torch.randn(3, K))


def test_a_frozen_input_and_frozen_halves_get_no_gradient():
    ours, _ = pair(Net())
    layer = ours.base_model.model.first
    layer.lora_A["default"].weight.requires_grad_(False)
    ours(torch.randn(3, K)).sum().backward()
    assert layer.lora_A["default"].weight.grad is None
    assert layer.lora_B["default"].weight.grad.abs().max() > 0


def test_nothing_as_large_as_the_output_is_kept():
    ours, _ = pair(Net())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        ours(torch.randn(200, K, requires_grad=True))
    assert sorted(kept) == [(4, K), (N, 4), (200, 4), (200, K)]


@pytest.mark.parametrize("method", ["lora", "rslora", "loraplus", "dora"])
def test_methods_train_the_layer_and_save_plain_loras(method):
    config = METHODS[method].peft_config(Config(), ["first"], [], None)
    model = get_peft_model(Net(), config)
    assert isinstance(model.base_model.model.first, fused.PackedLora)
    assert config.to_dict()["peft_type"] == "LORA"
    assert not [name for name in config.to_dict() if "custom" in name]
