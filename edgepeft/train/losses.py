"""The loss of a causal language model, without its logits: [tokens, vocabulary] never exists.

    z = softcap(h Wᵀ)    loss = log Σ exp z - z[target]    dh = ((softmax z - onehot) ⊙ softcap'(z)) W    W: frozen head

Only positions that have a target pass the head, CHUNK_BYTES of logits at a time. The head is frozen, so all that
backward needs is dh, which is as small as h: it is computed while the logits of a chunk are there, and nothing is
computed twice. A packed head is dequantized piece by piece, twice per chunk. What is asked of a chunk of logits is a
`Score`: their labels here, a teacher in `lesson`.

`without_logits` lets a model answer with three figures per row in place of its logits: the sum of the losses, the
number of targets and how many of them were the likeliest token. The method is replaced on the instance alone, so
whatever wraps the model (PEFT, DDP) still calls it as ever.

Left out: heads with a bias or of their own adapter, gradients of second order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.utils import ModelOutput

from edgepeft.backbone.decoder import describe
from edgepeft.train.chats import IGNORED

CHUNK_BYTES = 128 << 20
FLOAT_BYTES = 4
# (logits [T, V], targets [T], which of all positions these are) -> loss [T], hits [T], d loss / d logits [T, V], which
# may use up the logits.
Score = Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclasses.dataclass
class Figures(ModelOutput):
    """figures: float32 [M, 3], per row the sum of its losses, its targets, and those that were the likeliest token."""

    figures: torch.Tensor | None = None


def _pieces(head: Any) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, weight of these rows) of a packed head, or of a float one the whole."""
    if hasattr(head, "pieces"):
        yield from head.pieces()
    else:
        yield slice(0, head.out_features), head.weight.detach()


class _TokenLosses(torch.autograd.Function):
    """(loss [T], whether the target was the likeliest token [T]) of hidden states h [T, K] and targets [T]."""

    @staticmethod
    def forward(
        ctx: Any, h_tk: torch.Tensor, head: Any, target_t: torch.Tensor, softcap: float, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss_t = h_tk.new_empty(len(h_tk), dtype=torch.float32)
        hit_t = torch.empty_like(target_t, dtype=torch.bool)
        dh_tk = torch.empty_like(h_tk) if ctx.needs_input_grad[0] else None
        for part in chunks(len(h_tk), head.out_features):
            z_tv, slope_tv = head_logits(h_tk[part], head, softcap, dh_tk is not None)
            loss_t[part], hit_t[part], dz_tv = score(z_tv, target_t[part], part)
            if dh_tk is not None:
                dh_tk[part] = _gradient(dz_tv, slope_tv, head)
        ctx.save_for_backward(dh_tk)
        ctx.mark_non_differentiable(hit_t)
        return loss_t, hit_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_t: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None, None]:
        (dh_tk,) = ctx.saved_tensors
        return dh_tk * dloss_t[:, None].to(dh_tk.dtype), None, None, None, None


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Yield the positions whose logits exist at a time."""
    step = max(1, CHUNK_BYTES // (FLOAT_BYTES * vocabulary))
    return (slice(start, start + step) for start in range(0, tokens, step))


def head_logits(
    h_tk: torch.Tensor, head: Any, softcap: float, slope: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return float32 logits [T, V], and the slope of their softcap where one is asked for."""
    if getattr(head, "activation", "float") == "int8" and h_tk.device.type == "cpu":
        z_tv = head.int8_product(h_tk).float()
    else:
        z_tv = h_tk.new_empty(len(h_tk), head.out_features, dtype=torch.float32)
        for rows, w_vk in _pieces(head):
            z_tv[:, rows] = h_tk @ w_vk.to(h_tk).T
    if not softcap:
        return z_tv, None
    tanh_tv = z_tv.div_(softcap).tanh_()
    slope_tv = 1 - tanh_tv.square() if slope else None
    return tanh_tv.mul_(softcap), slope_tv


def label_score(
    z_tv: torch.Tensor, target_t: torch.Tensor, part: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of the targets: loss [T], hits [T] and the gradient, which takes the place of the logits."""
    hit_t = z_tv.argmax(-1) == target_t
    z_tv -= z_tv.logsumexp(-1, keepdim=True)
    loss_t = -z_tv.gather(1, target_t[:, None])[:, 0]
    dz_tv = z_tv.exp_()
    dz_tv[torch.arange(len(dz_tv), device=dz_tv.device), target_t] -= 1
    return loss_t, hit_t, dz_tv


def _gradient(dz_tv: torch.Tensor, slope_tv: torch.Tensor | None, head: Any) -> torch.Tensor:
    """Return dh [T, K] of dz [T, V], which is used up."""
    if slope_tv is not None:
        dz_tv *= slope_tv
    dh_tk = dz_tv.new_zeros(len(dz_tv), head.in_features)
    for rows, w_vk in _pieces(head):
        dh_tk += dz_tv[:, rows] @ w_vk.to(dz_tv.dtype)
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


@contextlib.contextmanager
def without_logits(model: Any) -> Iterator[None]:
    """Let a causal language model, or a PEFT model of one, answer with `Figures` as long as the block lasts.

    It then takes input_ids and shift_labels [M, S] (the target of each position, IGNORED for none), and position_ids.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    softcap = describe(causal.config.to_dict()).logits_softcap

    def forward(input_ids: Any, shift_labels: Any, position_ids: Any = None, **_: Any) -> Figures:
        hidden = causal.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        wanted = shift_labels != IGNORED
        return row_figures(wanted, *token_losses(hidden[wanted], causal.lm_head, shift_labels[wanted], softcap))

    causal.forward = forward
    try:
        yield
    finally:
        del causal.forward
