"""What a student learns from a teacher, beside or in place of the labels.

    loss = (1 - w) · CE(z, label)  +  w · T² · KL( softmax(t / T) ‖ softmax(z / T) )  +  v · mean ‖h - h'‖² / ‖h'‖²

z, t: logits of student and teacher; w: --lesson-weight; T: --lesson-temperature (T² keeps the gradient's size: Hinton
et al., 2015); h, h': hidden states of student and teacher after matching layers, token by token; v: --lesson-hidden.
Each term is a mean over the labels of a step as the loss without a teacher is (`watch.GuardedLoss`): a text's hidden
term is the mean over its tokens; of a language model only positions with a target count. While hidden states are
taught the backbone drops nothing: dropout moves those of MiniLM's last layer by 0.21 of themselves in this measure,
rounding to i4b128 by 0.09, and the student would learn to make up for the wrong one.

A `Lesson` is what the teacher said about every training row, mapped from disk (`teacher` writes it), so the teacher is
gone when the student trains. Of a classifier that is its logits. Of a language model it is what goes into its head,
float16 [K] per target: the logits over the whole vocabulary are computed from it, all of them and a chunk at a time as
the student's own (`losses`), and are never stored. Its head stays mapped from disk. A chunk takes four times the memory
that it takes without a teacher.

Left out: teaching by what the student itself writes (Agarwal et al., 2024), projections between unequal hidden sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import ModelOutput

from edgepeft.adapt.prompts import columns
from edgepeft.artifact import read_json
from edgepeft.backbone.decoder import describe
from edgepeft.train.chats import IGNORED
from edgepeft.train.losses import Score, backbone, head_logits, label_score, row_figures, targeted, token_losses
from edgepeft.train.tasks import TASKS, Task

if TYPE_CHECKING:
    from edgepeft.config import Config

ABOUT, ANSWERS, HIDDEN, HEAD, STARTS = "lesson.json", "answers.npy", "hidden.npy", "head.npy", "starts.npy"
ROW = "row"


@dataclasses.dataclass
class Taught(ModelOutput):
    """logits [M, labels] of a classifier, and lesson [M]: per row what the teacher adds to the loss."""

    logits: torch.Tensor | None = None
    lesson: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A teacher's answers to the training rows, by the row's number.

    task: the student's, which makes batches.
    weight, temperature, hidden_weight: w, T, v of the equation.  layers: the student's that match the teacher's stored.
    answers: logits [M, labels], or [T, K] before the head where there is one.  hidden [T, layers, K].
    starts [M + 1]: where the positions of a row begin.
    """

    task: Task
    weight: float
    temperature: float
    hidden_weight: float
    layers: tuple[int, ...]
    starts: np.ndarray
    answers: np.ndarray | None
    hidden: np.ndarray | None
    head: Any = None
    softcap: float = 0.0

    @classmethod
    def open(cls, folder: Path, config: Config) -> Lesson:
        """Map what `teacher` wrote; the weights are the configured ones."""
        about = read_json(folder / ABOUT)
        answers, hidden, head = (_mapped(folder / name) for name in (ANSWERS, HIDDEN, HEAD))
        return cls(
            TASKS[config.task], config.lesson_weight if answers is not None else 0.0, config.lesson_temperature,
            config.lesson_hidden, tuple(about["layers"]), np.load(folder / STARTS), answers, hidden,
            None if head is None else _head(head), about["softcap"],
        )  # fmt: skip

    def numbered(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the training rows with the numbers by which `collate` finds what was said about them."""
        return [{**row, ROW: i} for i, row in enumerate(rows)]

    def collate(self, rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Any]:
        """Return the batch of some rows, with `lesson` where they are numbered: those to evaluate are not."""
        batch: dict[str, Any] = self.task.collate([{n: v for n, v in row.items() if n != ROW} for row in rows], pad_id)
        return {**batch, "lesson": self.batch([row[ROW] for row in rows])} if ROW in rows[0] else batch

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return what was said about some rows: answers and hidden of their positions, one row after the other."""
        places = np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows])
        found = {}
        if self.answers is not None and self.weight:
            found["answers"] = torch.from_numpy(self.answers[places if self.head is not None else list(rows)])
        if self.hidden is not None:
            found["hidden"] = torch.from_numpy(self.hidden[places])
        return found

    def mixed(self, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        """Return a classifier's loss with the teacher's share; of language models it is in the loss already."""
        return loss if not isinstance(outputs, Taught) else (1 - self.weight) * loss + outputs["lesson"].mean()


def _mapped(file: Path) -> np.ndarray | None:
    return np.load(file, mmap_mode="c") if file.exists() else None  # written to, it would leave the disk alone


def _head(w_vk: np.ndarray) -> torch.nn.Linear:
    head = torch.nn.Linear(w_vk.shape[1], w_vk.shape[0], bias=False, device="meta")
    head.weight = torch.nn.Parameter(torch.from_numpy(w_vk), requires_grad=False)
    return head


# --- the terms -----------------------------------------------------------------------------------------------------


def divergence(z: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T² KL(teacher ‖ student) of logits [M, C] each, [M]."""
    logq, logp = (torch.log_softmax(logits.float() / temperature, -1) for logits in (z, taught))
    return temperature**2 * (logp.exp() * (logp - logq)).sum(-1)


def taught_score(lesson: Lesson, answers_tk: torch.Tensor) -> Score:
    """Return the score of `losses` by labels and teacher; answers [T, K] is what goes into the teacher's head."""

    def score(
        z_tv: torch.Tensor, target_t: torch.Tensor, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logp_tv, _ = head_logits(answers_tk[part].float(), lesson.head, lesson.softcap)
        logp_tv.div_(lesson.temperature).sub_(logp_tv.logsumexp(-1, keepdim=True))
        z_tv = z_tv.float()
        q_tv = z_tv / lesson.temperature
        q_tv -= q_tv.logsumexp(-1, keepdim=True)
        p_tv = logp_tv.exp()
        kl_t = lesson.temperature**2 * logp_tv.sub_(q_tv).mul_(p_tv).sum(-1)
        apart_tv = q_tv.exp_().sub_(p_tv).mul_(lesson.temperature)
        loss_t, hit_t, dz_tv = label_score(z_tv, target_t, part)
        return torch.lerp(loss_t, kl_t, lesson.weight), hit_t, dz_tv.lerp_(apart_tv, lesson.weight)

    return score


def hidden_error(lesson: Lesson, states: Sequence[torch.Tensor], wanted: torch.Tensor, taught: Any) -> torch.Tensor:
    """Return ‖h - h'‖² / ‖h'‖² of every wanted position, the mean over the layers, [T].

    states: the student's hidden states, [M, S, K] each, a prompt's before them.  wanted [M, S].  taught [T, layers, K].
    """
    own = torch.stack([targeted(states[layer], wanted) for layer in lesson.layers], dim=1).float()
    taught = taught.float()
    return ((own - taught).square().sum(-1) / taught.square().sum(-1).clamp_min(1e-12)).mean(-1)


# --- the models ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _answering(base: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a model answer by another forward as long as the block lasts, on the instance alone."""
    before = vars(base).get("forward")
    base.forward = forward
    try:
        yield
    finally:
        if before is None:
            del base.forward
        else:
            base.forward = before


@contextlib.contextmanager
def _undropped(model: Any, lesson: Lesson) -> Iterator[None]:
    """Let the backbone drop nothing while hidden states are taught; adapters and heads keep their dropout."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = list(model.get_base_model().base_model.modules()) if lesson.hidden is not None else []
    adapters = {id(part) for module in modules for part in module.modules() if isinstance(module, BaseTunerLayer)}
    dropped = [m for m in modules if isinstance(m, torch.nn.Dropout) and id(m) not in adapters]
    before = [module.p for module in dropped]
    try:
        for module in dropped:
            module.p = 0.0
        yield
    finally:
        for module, p in zip(dropped, before, strict=True):
            module.p = p


@contextlib.contextmanager
def taught_classes(model: Any, lesson: Lesson) -> Iterator[None]:
    """Let a classifier that is given the `lesson` of its rows answer with `Taught`."""
    base, about = model.get_base_model(), lesson
    plain = base.forward

    def forward(lesson: Any = None, **inputs: Any) -> Any:
        if lesson is None:
            return plain(**inputs)
        found = plain(**{**inputs, "output_hidden_states": "hidden" in lesson, "return_dict": True})
        extra = found.logits.new_zeros(len(found.logits))
        if "answers" in lesson:
            extra = extra + about.weight * divergence(found.logits, lesson["answers"], about.temperature)
        if "hidden" in lesson:
            wanted = inputs["attention_mask"][:, columns(model) :].bool()
            error_t = hidden_error(about, found.hidden_states, wanted, lesson["hidden"])
            sums = extra.new_zeros(len(extra)).index_add(0, wanted.nonzero()[:, 0], error_t)
            extra = extra + about.hidden_weight * sums / wanted.sum(1)
        return Taught(found.logits, extra)

    with _answering(base, forward), _undropped(model, about):
        yield


@contextlib.contextmanager
def taught_tokens(model: Any, lesson: Lesson) -> Iterator[None]:
    """Let a causal language model that is given the `lesson` of its rows answer with figures of the taught loss.

    For a model inside `losses.without_logits`.
    """
    base = model.get_base_model()
    plain, softcap = base.forward, describe(base.config.to_dict()).logits_softcap
    about = lesson

    def forward(shift_labels: Any = None, lesson: Any = None, **given: Any) -> Any:
        if lesson is None:
            return plain(shift_labels=shift_labels, **given)
        found = backbone(base, given, output_hidden_states="hidden" in lesson)
        wanted = shift_labels != IGNORED
        score = taught_score(about, lesson["answers"]) if "answers" in lesson else label_score
        hidden, target_t = targeted(found.last_hidden_state, wanted), shift_labels[wanted]
        loss_t, hit_t = token_losses(hidden, base.lm_head, target_t, softcap, score)
        if "hidden" in lesson:
            loss_t = loss_t + about.hidden_weight * hidden_error(about, found.hidden_states, wanted, lesson["hidden"])
        return row_figures(wanted, loss_t, hit_t)

    with _answering(base, forward), _undropped(model, about):
        yield
