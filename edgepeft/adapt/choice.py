"""`--adapter auto`: the adapter goes into the weights only where nothing measurable is lost by it.

The merge stage merges and measures as ever, and then decides for the whole model. It ships merged when

    retention ≥ max(--min-retention, LOSSLESS)        drop ≤ min(--max-metric-drop, noise)

retention over all layers (`merge`); drop: by how much the validation metric got worse; noise: one standard error of
that drop, from the same examples answered by both models. Of scores s over n labels per example, before and after,

    drop = Σ(s' - s) / Σn        noise = √( Σ(s' - s - n·drop)² · m / (m - 1) ) / Σn        m examples

Otherwise, and where a part of it cannot go into the weights, it stays separate, swappable and exact; merge.json,
export.json and the manifest say why. Left out: merging some layers and not others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.artifact import Run, read_json, write_json
from edgepeft.console import say

if TYPE_CHECKING:
    from edgepeft.config import Config

AUTO, LOSSLESS = "auto", 0.9
PARTS_NAMED = 3


def noise(before_m2: np.ndarray, after_m2: np.ndarray) -> float:
    """Return one standard error of the change of Σ score / Σ labels; rows are (score, labels) of the same examples."""
    labels, apart = before_m2[:, 1].astype(np.float64), (after_m2 - before_m2)[:, 0].astype(np.float64)
    rest = apart - labels * apart.sum() / labels.sum()
    return math.sqrt(float(rest @ rest) * len(rest) / max(len(rest) - 1, 1)) / float(labels.sum())


def decide(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"ships": "merged" or "separate", "why": what would be lost} of a merge's figures."""
    found, why = report["validation"], []
    least, most = max(report["min_retention"], LOSSLESS), min(report["max_metric_drop"], found["noise"])
    if not report["retention"] >= least:
        why.append(f"merging retains {report['retention']:.3f} of the adapter, less than {least:g}")
    if not found["drop"] <= most:
        why.append(
            f"validation {found['metric']} goes from {found['separate']:.4f} to {found['merged']:.4f}, a loss above "
            f"{most:.2g}"
        )
    ships = "separate" if why else "merged"
    say(f"--adapter auto: {ships}" + (f", as {'; '.join(why)}" if why else ": nothing measurable is lost"))
    return {"ships": ships, "why": why}


def apart(parts: list[str], out: Path) -> dict[str, Any]:
    """Write and return the decision for an adapter of which some parts cannot go into the weights at all."""
    report = {"ships": "separate", "why": [f"cannot be merged: {'; '.join(parts[:PARTS_NAMED])}"]}
    say(f"--adapter auto: separate, as it {report['why'][0]}")
    write_json(out / "merge.json", report)
    return report


def decided(config: Config, run: Run) -> Config:
    """Return the settings with `auto` replaced by what the merge stage decided."""
    return config.replace(adapter=read_json(run.path("merged") / "merge.json")["ships"]) if _asked(config) else config


def record(config: Config, run: Run) -> dict[str, Any]:
    """Return what the decision was and why, for export.json and the manifest; nothing where none was asked for."""
    if not _asked(config):
        return {}
    found = read_json(run.path("merged") / "merge.json")
    told = ("ships", "why", "retention", "share", "validation")
    return {"adapter_choice": {name: found[name] for name in told if name in found}}


def _asked(config: Config) -> bool:
    return config.adapter == AUTO
