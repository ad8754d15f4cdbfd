"""Checkpoints one can trust after a kill at any moment, and the choice of the best one.

The Trainer writes `checkpoint-<step>` file by file. When all of it is there, `seal` adds complete.json with the digest
of every file and the step of the best checkpoint so far, as the last act; only then are older ones removed. A folder
without a seal, or that does not match it, was interrupted or damaged and is removed. So is one whose best checkpoint is
gone: training goes on from the newest whole one, and since it is deterministic it ends with the same bytes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepeft.artifact import digests, write_json

SEAL = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)$")


def best_step(log_history: Sequence[Mapping[str, Any]], select: str, lower: bool = False) -> int:
    """Return the step of the evaluation with the highest `select`, or the lowest where `lower`.

    Ties go to the lower loss, then the earlier one.
    """
    rows, sign = [row for row in log_history if f"eval_{select}" in row], -1 if lower else 1
    best = max(rows, key=lambda row: (sign * row[f"eval_{select}"], -row["eval_loss"], -row["step"]))
    return int(best["step"])


def place(work: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return work / f"checkpoint-{step}"


def seal(work: Path, step: int, best: int) -> None:
    """Declare the checkpoint of a step whole, then remove all but it and the best one."""
    folder = place(work, step)
    write_json(folder / SEAL, {"files": digests(folder), "best": best})
    for other in _steps(work):
        if other not in (step, best):
            shutil.rmtree(place(work, other))


def newest(work: Path) -> int | None:
    """Remove checkpoints that cannot be trusted and return the newest step left, or None when training starts anew."""
    steps = sorted(_steps(work), reverse=True)
    best = {step: named for step in steps if (named := _best_if_whole(place(work, step))) is not None}
    kept = next((step for step in steps if step in best and best[step] in best), None)
    for step in steps:
        if kept is None or step > kept or step not in best:
            shutil.rmtree(place(work, step))
    return kept


def _steps(work: Path) -> list[int]:
    return [int(match[1]) for path in work.iterdir() if path.is_dir() and (match := NAME.match(path.name))]


def _best_if_whole(folder: Path) -> int | None:
    """Return the best step that a checkpoint names, or None when it is not whole."""
    try:
        sealed = json.loads((folder / SEAL).read_text())
        files = {name: digest for name, digest in digests(folder).items() if name != SEAL}
        return int(sealed["best"]) if files == sealed["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
