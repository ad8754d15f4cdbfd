"""A LoRA on a packed linear, in one product forward and one backward.

    y = x Ŵᵀ + bias + c z Bᵀ       z = h Aᵀ             h = dropout(x), or x itself
    dx = dy Ŵ + dz A               dz = c dy B          dA = dzᵀ h          dB = c dyᵀ z

Hugging Face PEFT's own layer makes y three times (the linear's, the adapter's, the adapter's scaled) before it adds
two of them, and under autocast turns x into float32 and back; on a processor that is a tenth of a step. The
layer here adds in place and keeps x and z. It is PEFT's LoRA layer in everything else: parameters, names, files; and
whatever is more than one plain LoRA (DoRA, several adapters, none, hooks on the linear, a GPU) it leaves to PEFT's
forward.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.autograd.function import once_differentiable

from edgepeft.quant import multiply
from edgepeft.quant.linear import QuantLinear

Tensor = torch.Tensor


class _Adapted(torch.autograd.Function):
    """The product; see the module's docstring. h is None where it is x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor | None, a_rk: Tensor, b_nr: Tensor, bias_n: Tensor | None, scale: float,
        layer: QuantLinear,
    ) -> Tensor:  # fmt: skip
        """Return y [..., N] of x and h [..., K]."""
        dtype = multiply.product_dtype(x)
        source = multiply.cast(x if h is None else h, dtype)
        y = multiply.forward(x, layer, bias_n)
        z_mr = source.reshape(-1, layer.in_features) @ a_rk.to(dtype).T
        y.view(-1, layer.out_features).addmm_(z_mr, b_nr.to(dtype).T, alpha=scale)
        ctx.layer, ctx.scale, ctx.x_dtype = layer, scale, x.dtype
        ctx.h_dtype = None if h is None else h.dtype
        ctx.save_for_backward(source, z_mr, a_rk, b_nr)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, h, A, B and the bias."""
        source, z_mr, a_rk, b_nr = ctx.saved_tensors
        needs_x, needs_h, needs_a, needs_b, needs_bias = ctx.needs_input_grad[:5]
        dtype, shape, dy_mn = dy.dtype, source.shape, dy.reshape(-1, ctx.layer.out_features)
        dz_mr = (dy_mn @ b_nr.to(dtype)).mul_(ctx.scale)
        da = dz_mr.T @ source.reshape(-1, ctx.layer.in_features) if needs_a else None
        db = (z_mr.T @ dy_mn).mul_(ctx.scale).T if needs_b else None
        dx = multiply.backward(dy_mn, ctx.layer) if needs_x else None
        dh = None
        if ctx.h_dtype is not None and needs_h:
            dh = (dz_mr @ a_rk.to(dtype)).view(shape).to(ctx.h_dtype)
        elif dx is not None and ctx.h_dtype is None:
            dx.addmm_(dz_mr, a_rk.to(dtype))
        return (
            None if dx is None else dx.view(shape).to(ctx.x_dtype), dh, None if da is None else da.to(a_rk.dtype),
            None if db is None else db.to(b_nr.dtype), multiply.bias_gradient(dy_mn) if needs_bias else None,
            None, None,
        )  # fmt: skip


class PackedLora(LoraLinear):
    """PEFT's LoRA layer on a packed linear; see the module's docstring."""

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """Return [..., N] of x [..., K]."""
        if given or named or not self._plain(x):
            return super().forward(x, *given, **named)
        (name,), layer = self.active_adapters, self.base_layer
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        h = dropout(x) if isinstance(dropout, torch.nn.Dropout) and self.training else None
        return _Adapted.apply(x, h, a.weight, b.weight, layer.bias, self.scaling[name], layer)

    def _plain(self, x: Tensor) -> bool:
        """Tell whether this is one LoRA and nothing more, in the dtype that its product would have."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or x.device.type != "cpu":
            return False
        name, base = self.active_adapters[0], self.base_layer
        if base._forward_hooks or base._forward_pre_hooks:
            return False
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return False
        return torch.is_autocast_enabled("cpu") or x.dtype == self.lora_A[name].weight.dtype


def in_one(config: Any) -> Any:
    """Let a LoRA's settings inject `PackedLora` into packed linears, PEFT's own layers into others; return them."""
    config._register_custom_module({QuantLinear: PackedLora})
    return config
