"""The tasks a model can be tuned for: one row each.

A row names the transformers class that puts the head on the backbone (which modules those are is the family's matter),
PEFT's name for it, the settings that are its own, and the functions that read data and make batches, the loss and the
metrics; `answer` names how the device turns logits into an answer. What a model answers is the first of its outputs:
logits [M, labels], or per row of tokens the three figures of `losses`. The command line reads the names, so nothing
heavy is imported at the top.

Left out until needed: tasks with labels per token or per span.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgepeft.config import Config
    from edgepeft.train.data import Splits
    from edgepeft.train.lesson import Lesson

Example = Mapping[str, Any]
LARGEST_EXPONENT = 100.0


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    defaults: settings whose value 0 means the task's own.
    read(config) -> checked splits, whose parts turn themselves into tokens (`encode`).
    collate(examples, pad_id) -> padded batch of int64 tensors [M, S], and labels [M] or [M, S].
    answering(model) -> a context in which the model's first output is what loss and metrics take.
    taught(model, lesson) -> a context in which a model that is given its rows' part of the lesson learns it too.
    loss(answers, labels) -> scalar tensor, mean over the labels of the batch.
    scores(answers, labels) -> [M, 2], per row what adds up to the metric `select`, and how many labels it has.
    metrics(answers, labels) -> {name: float}; `select` names the one by which the best checkpoint is chosen: the
    highest, or the lowest where `lower`.
    classes: whether a row has one of the data's labels.  packs: whether several examples may share a row.
     eval_batch: rows to evaluate at a time, 0 as many as to train.
    """

    tag: str
    auto_class: str
    peft_type: str
    select: str
    answer: str
    defaults: Mapping[str, Any]
    read: Callable[[Config], Splits[Any]]
    collate: Callable[[Sequence[Example], int], dict[str, torch.Tensor]]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray]
    taught: Callable[[Any, Lesson], contextlib.AbstractContextManager[None]]
    answering: Callable[[Any], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    classes: bool = False
    lower: bool = False
    packs: bool = False
    eval_batch: int = 0

    def drop(self, before: float, after: float) -> float:
        """Return by how much `after` is worse than `before` in the metric `select`."""
        return after - before if self.lower else before - after


# --- classes of texts --------------------------------------------------------------------------------------------


def read_labelled(config: Config) -> Splits[Any]:
    """Return the splits of texts and labels."""
    from edgepeft.train.data import labelled_splits

    return labelled_splits(config)


def pad(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad token rows on the right to the longest of the batch; `labels` holds one number per row."""
    import torch

    longest = max(len(row["input_ids"]) for row in examples)
    batch = {}
    for name in examples[0]:
        if name == "labels":
            batch[name] = torch.tensor([row[name] for row in examples], dtype=torch.int64)
            continue
        fill = pad_id if name == "input_ids" else 0
        padded = [[*row[name], *[fill] * (longest - len(row[name]))] for row in examples]
        batch[name] = torch.tensor(padded, dtype=torch.int64)
    return batch


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log softmax(logits)[label]."""
    import torch

    return torch.nn.functional.cross_entropy(logits.float(), labels)


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1 over the labels that occur or are predicted, and the mean cross-entropy (loss)."""
    import numpy as np

    found = logits.argmax(-1)
    scores = []
    for label in np.union1d(labels, found):
        hits = np.sum((found == label) & (labels == label))
        scores.append(2 * hits / (np.sum(found == label) + np.sum(labels == label)))
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    loss = -log_p[np.arange(len(labels)), labels].mean()
    return {"accuracy": float(np.mean(found == labels)), "macro_f1": float(np.mean(scores)), "loss": float(loss)}


def right_answers(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return [M, 2]: whether the likeliest label is the right one, and 1."""
    import numpy as np

    return np.stack([logits.argmax(-1) == labels, np.ones(len(logits))], axis=1).astype(np.float64)


def learn_classes(model: Any, lesson: Lesson) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a classifier learns from a teacher."""
    from edgepeft.train.lesson import taught_classes

    return taught_classes(model, lesson)


# --- texts to write ----------------------------------------------------------------------------------------------


def read_chats(config: Config) -> Splits[Any]:
    """Return the splits of conversations, prompts or texts."""
    from edgepeft.train.chats import chat_splits

    return chat_splits(config)


def pad_tokens(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad token rows on the right; add shift_labels, the target of each position.

    No token sees what comes after it, so padding needs no mask; in packed rows each padding is a row by itself.
    """
    import torch

    from edgepeft.train.chats import IGNORED

    longest = max(len(row["input_ids"]) for row in examples)
    fills = {"input_ids": pad_id, "labels": IGNORED, "position_ids": 0}
    batch = {}
    for name in examples[0]:
        padded = [[*row[name], *[fills[name]] * (longest - len(row[name]))] for row in examples]
        batch[name] = torch.tensor(padded, dtype=torch.int64)
    batch["shift_labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return batch


def answer_without_logits(model: Any) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a causal language model answers with the figures of its loss."""
    from edgepeft.train.losses import without_logits

    return without_logits(model)


def learn_tokens(model: Any, lesson: Lesson) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a causal language model learns from a teacher."""
    from edgepeft.train.lesson import taught_tokens

    return taught_tokens(model, lesson)


def token_loss(figures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss of all targets, from (sum of losses, targets, hits) per row."""
    return figures[:, 0].sum() / figures[:, 1].sum()


def losses_and_targets(figures: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return [M, 2]: the sum of the losses of a row, and its targets."""
    return figures[:, :2].astype("float64")


def token_metrics(figures: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean loss per target, its perplexity e^loss, and the share of targets that were the likeliest token."""
    import math

    losses, targets, hits = figures.astype("float64").sum(0)
    loss = float(losses / targets)
    accuracy = float(hits / targets)
    return {"loss": loss, "perplexity": math.exp(min(loss, LARGEST_EXPONENT)), "token_accuracy": accuracy}


TASKS: dict[str, Task] = {
    row.tag: row
    for row in (
        Task(
            tag="text-classification", auto_class="AutoModelForSequenceClassification", peft_type="SEQ_CLS",
            select="accuracy", answer="softmax", read=read_labelled, collate=pad, loss=cross_entropy,
            metrics=classification_metrics, scores=right_answers, taught=learn_classes, classes=True, eval_batch=64,
            defaults={"epochs": 8, "batch_size": 32, "learning_rate": 2e-3, "max_length": 64},
        ),
        Task(
            tag="text-generation", auto_class="AutoModelForCausalLM", peft_type="CAUSAL_LM", select="loss", lower=True,
            answer="generate", read=read_chats, collate=pad_tokens, loss=token_loss, metrics=token_metrics,
            scores=losses_and_targets, taught=learn_tokens, answering=answer_without_logits, packs=True,
            defaults={"epochs": 3, "batch_size": 4, "learning_rate": 2e-4, "max_length": 512},
        ),
    )
}  # fmt: skip
