"""The loss of a causal language model, without its logits: [tokens, vocabulary] never exists.

    z = softcap(h Wᵀ)    loss = log Σ exp z - z[target]    dh = ((softmax z - onehot) ⊙ softcap'(z)) W    W: frozen head

Only positions that have a target pass the head, CHUNK_BYTES of logits at a time. The head is frozen, so all that
backward needs is dh, which is as small as h: it is computed while the logits of a chunk are there, and nothing is
computed twice. A packed head is dequantized piece by piece, twice per chunk. Products are made in autocast's dtype
where it is on, and logits and their gradients kept in it, as the products leave and take them; what is between is
float32. What is asked of a chunk of logits is a `Score`: their labels here, a teacher
in `lesson`. Labels ask a few rows after the other, which stay in the cache meanwhile.

`without_logits` lets a model answer with three figures per row in place of its logits: the sum of the losses, the
number of targets and how many of them were the likeliest token. The method is replaced on the instance alone, so
whatever wraps the model (PEFT, DDP) still calls it as ever.

A head with an adapter of its own, as other tools train them, is called as a whole: it can be judged and not be trained
through. Left out: heads with a bias, gradients of second order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.utils import ModelOutput

from edgepeft.backbone.decoder import describe
from edgepeft.quant.multiply import product_dtype
from edgepeft.train.chats import IGNORED

CHUNK_BYTES, CACHED_BYTES = 160 << 20, 2 << 20
FLOAT_BYTES = 4
INPUTS = ("input_ids", "inputs_embeds", "past_key_values", "position_ids")
# (logits [T, V], targets [T], which of all positions these are) -> loss [T], hits [T], d loss / d logits [T, V], which
# may use up the logits.
Score = Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclasses.dataclass
class Figures(ModelOutput):
    """figures: float32 [M, 3], per row the sum of its losses, its targets, and those that were the likeliest token."""

    figures: torch.Tensor | None = None


def _pieces(head: Any, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, weight of these rows) of a packed head, or of a float one the whole."""
    if hasattr(head, "pieces"):
        yield from head.pieces(dtype)
    else:
        yield slice(0, head.out_features), head.weight.detach().to(dtype)


class _TokenLosses(torch.autograd.Function):
    """(loss [T], whether the target was the likeliest token [T]) of hidden states h [T, K] and targets [T]."""

    @staticmethod
    def forward(
        ctx: Any, h_tk: torch.Tensor, head: Any, target_t: torch.Tensor, softcap: float, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss_t = h_tk.new_empty(len(h_tk), dtype=torch.float32)
        hit_t = torch.empty_like(target_t, dtype=torch.bool)
        dh_tk = torch.empty_like(h_tk) if ctx.needs_input_grad[0] else None
        z_tv: torch.Tensor | None = None
        for part in chunks(len(h_tk), head.out_features, each_bytes=_logits_dtype(h_tk, softcap).itemsize):
            z_tv, slope_tv = head_logits(h_tk[part], head, softcap, dh_tk is not None, z_tv)
            loss_t[part], hit_t[part], dz_tv = score(z_tv, target_t[part], part)
            if dh_tk is not None:
                dh_tk[part] = _gradient(dz_tv, slope_tv, head, product_dtype(h_tk))
        ctx.save_for_backward(dh_tk)
        ctx.mark_non_differentiable(hit_t)
        return loss_t, hit_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_t: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None, None]:
        (dh_tk,) = ctx.saved_tensors
        return dh_tk * dloss_t[:, None].to(dh_tk.dtype), None, None, None, None


def chunks(
    tokens: int, vocabulary: int, most_bytes: int | None = None, each_bytes: int = FLOAT_BYTES
) -> Iterator[slice]:
    """Yield the positions whose logits are used at a time: CHUNK_BYTES of them unless told otherwise."""
    most = max(1, (most_bytes or CHUNK_BYTES) // (each_bytes * vocabulary))
    step = -(-tokens // max(1, -(-tokens // most))) or 1
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def head_logits(
    h_tk: torch.Tensor, head: Any, softcap: float, slope: bool = False, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return logits [T, V], and the slope of their softcap where one is asked for.

    out: logits of as many positions or more that are done with; their memory is taken.
    """
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):  # PEFT's wrappers
        z_tv = head(h_tk).float()
    elif getattr(head, "activation", "float") == "int8" and h_tk.device.type == "cpu":
        z_tv = head.int8_product(h_tk).float()
    else:
        if out is None or len(out) < len(h_tk):
            out = h_tk.new_empty(len(h_tk), head.out_features, dtype=_logits_dtype(h_tk, softcap))
        z_tv = out[: len(h_tk)]
        _multiply(h_tk, head, z_tv)
    if not softcap:
        return z_tv, None
    tanh_tv = z_tv.div_(softcap).tanh_()
    slope_tv = 1 - tanh_tv.square() if slope else None
    return tanh_tv.mul_(softcap), slope_tv


def _logits_dtype(h_tk: torch.Tensor, softcap: float) -> torch.dtype:
    """Return the dtype in which logits are kept: the product's, unless a softcap bends them."""
    return torch.float32 if softcap else product_dtype(h_tk)


def _multiply(h_tk: torch.Tensor, head: Any, z_tv: torch.Tensor) -> None:
    """Write h Wᵀ into z [T, V]."""
    dtype = product_dtype(h_tk)
    h_tk = h_tk.to(dtype)
    for rows, w_vk in _pieces(head, dtype):
        if dtype == z_tv.dtype:
            torch.mm(h_tk, w_vk.T, out=z_tv[:, rows])
        else:
            z_tv[:, rows] = h_tk @ w_vk.T


def label_score(
    z_tv: torch.Tensor, target_t: torch.Tensor, part: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of the targets: loss [T], hits [T] and the gradient, which takes the place of the logits."""
    loss_t, hit_t = z_tv.new_empty(len(z_tv), dtype=torch.float32), torch.empty_like(target_t, dtype=torch.bool)
    for rows in chunks(len(z_tv), z_tv.shape[1], CACHED_BYTES):
        z, at = z_tv[rows].float(), target_t[rows, None]
        top, chosen = z.amax(-1, keepdim=True), z.gather(1, at)
        hit_t[rows] = _likeliest(z, at, (chosen == top)[:, 0])
        z -= top
        total = z.exp_().sum(-1, keepdim=True)
        loss_t[rows] = (total.log() - (chosen - top))[:, 0]
        z /= total
        z.scatter_add_(1, at, torch.full_like(chosen, -1))
        if z_tv.dtype != z.dtype:
            z_tv[rows] = z
    return loss_t, hit_t, z_tv


def _likeliest(z: torch.Tensor, at: torch.Tensor, hit_t: torch.Tensor) -> torch.Tensor:
    """Tell of each row of z [T, V] whether the token `at` [T, 1] is its likeliest, the first of several that are.

    hit_t: whether it is as likely as any.
    """
    if hit_t.any():  # finding where a largest value is takes far longer than finding it
        hit_t[hit_t.clone()] = z[hit_t].argmax(-1) == at[hit_t, 0]
    return hit_t


def _gradient(dz_tv: torch.Tensor, slope_tv: torch.Tensor | None, head: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return float32 dh [T, K] of dz [T, V], which is used up, by products in `dtype`."""
    if slope_tv is not None:
        dz_tv *= slope_tv
    dh_tk = dz_tv.new_zeros(len(dz_tv), head.in_features, dtype=torch.float32)
    for rows, w_vk in _pieces(head, dtype):
        dz = dz_tv[:, rows]
        if dtype == torch.float32:
            dh_tk.addmm_(dz, w_vk)
        else:
            dh_tk += dz.to(dtype) @ w_vk
    return dh_tk


def token_losses(
    h_tk: torch.Tensor, head: Any, target_t: torch.Tensor, softcap: float = 0.0, score: Score = label_score
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss [T] and hits [T] of hidden states [T, K] through a frozen head [V, K]."""
    return _TokenLosses.apply(h_tk, head, target_t, softcap, score)


def row_figures(wanted: torch.Tensor, loss_t: torch.Tensor, hit_t: torch.Tensor) -> Figures:
    """Return the figures of rows whose positions `wanted` [M, S] have these losses and hits, in reading order."""
    row_t = wanted.nonzero()[:, 0]
    zeros = loss_t.new_zeros(len(wanted))
    columns = (loss_t, torch.ones_like(loss_t), hit_t.to(loss_t.dtype))
    return Figures(torch.stack([zeros.index_add(0, row_t, column) for column in columns], dim=1))


def backbone(causal: Any, given: Mapping[str, Any], **options: Any) -> Any:
    """Return what a causal model's backbone gives for those of `given` that go into it."""
    inputs = {name: given[name] for name in INPUTS if given.get(name) is not None}
    return causal.model(**inputs, use_cache=False, **options)


def targeted(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the states [T, K] of the wanted [M, S] of the last S positions; a prompt of the adapter is before them."""
    return states[:, -wanted.shape[1] :][wanted]


@contextlib.contextmanager
def without_logits(model: Any) -> Iterator[None]:
    """Let a causal language model, or a PEFT model of one, answer with `Figures` as long as the block lasts.

    It then takes shift_labels [M, S] (the target of each of the last S positions, IGNORED for none) beside INPUTS.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    softcap = describe(causal.config.to_dict()).logits_softcap

    def forward(shift_labels: Any, **given: Any) -> Figures:
        wanted = shift_labels != IGNORED
        hidden = targeted(backbone(causal, given).last_hidden_state, wanted)
        return row_figures(wanted, *token_losses(hidden, causal.lm_head, shift_labels[wanted], softcap))

    causal.forward = forward
    try:
        yield
    finally:
        del causal.forward
