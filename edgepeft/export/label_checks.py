"""What a classifier must still do after export: give the same labels, and keep its figure.

| check | what runs | against | allowed |
|---|---|---|---|
| answers | the model as it will ship, `LABELLED` examples | PyTorch in float | 99 % the same label |
| metric | the model as it will ship, the whole test split | the figure measured after training | a drop of 0.01 |
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgepeft.artifact import read_json
from edgepeft.errors import VerifyError
from edgepeft.export import parity
from edgepeft.export.parity import LOGITS, Figures
from edgepeft.export.subject import Labelled
from edgepeft.train.tasks import TASKS

AGREEMENT = 0.99
METRIC_DROP = 0.01
LABELLED = 512


def check_answers(work: Labelled) -> Figures:
    """The model as it ships gives PyTorch's labels."""
    work.adapter("exported")
    wanted = work.predict(lambda batch: parity.torch_trace(work.model, batch, ())[LOGITS], LABELLED)
    found = work.predict(work.shipped.logits, LABELLED)
    same = found.argmax(-1) == wanted.argmax(-1)
    if (~same).sum() > max(1, round((1 - AGREEMENT) * len(same))):
        text = work.split.texts[int(np.flatnonzero(~same)[0])]
        raise VerifyError(
            f"answers: {work.shipped.name} gives PyTorch's label for {same.mean():.2%} of {len(same)} examples, "
            f"expected {AGREEMENT:.0%}; the first that differs: {text!r}. Try --activation float or a finer --format."
        )
    return {"agreement": float(same.mean()), "examples": len(same), "logits_error": parity.largest_error(found, wanted)}


def check_metric(work: Labelled) -> Figures:
    """The model as it ships keeps the figure measured after training."""
    task, split = TASKS[work.config.task], work.split
    training = read_json(work.run.path("adapter") / "training.json")
    found = task.metrics(work.predict(work.shipped.logits), np.asarray(split.labels))[task.select]
    wanted = training[work.split_name][task.select]
    allowed = max(work.config.max_metric_drop if work.merged else 0.0, METRIC_DROP, 1.01 / len(split))
    if not found >= wanted - allowed:
        raise VerifyError(
            f"{task.select} on the {work.split_name} split: expected at least {wanted - allowed:.4f} ({wanted:.4f} "
            f"after training less {allowed:.4f}), found {found:.4f} in the exported model. Try --activation float or a "
            "finer --format."
        )
    figures = {"metric": task.select, "exported": found, "trained": wanted}
    return {**figures, "split": work.split_name, "examples": len(split)}


CHECKS: dict[str, Callable[[Labelled], Figures]] = {"answers": check_answers, "metric": check_metric}
