"""The tasks a model can be tuned for: one row each.

A row names the transformers class that puts the head on the backbone (which modules those are is the family's matter),
PEFT's name for it, and the functions that make batches, the loss and the metrics; `answer` names how the device turns
logits into an answer. The command line reads the names, so nothing heavy is imported at the top.

Left out until needed: tasks with labels per token or per span.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

Example = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    collate(examples, pad_id) -> padded batch of int64 tensors [M, S], labels [M].
    loss(logits, labels) -> scalar tensor, mean over the batch.
    metrics(logits, labels) -> {name: float}; `select` names the one by which the best checkpoint is chosen.
    """

    tag: str
    auto_class: str
    peft_type: str
    select: str
    answer: str
    collate: Callable[[Sequence[Example], int], dict[str, torch.Tensor]]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]]


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


TASKS: dict[str, Task] = {
    row.tag: row
    for row in (
        Task(
            tag="text-classification", auto_class="AutoModelForSequenceClassification", peft_type="SEQ_CLS",
            select="accuracy", answer="softmax", collate=pad, loss=cross_entropy, metrics=classification_metrics,
        ),
    )
}  # fmt: skip
