"""`edgepeft doctor`: what an adapter is, whether it does anything, and whether it fits a base; with what to do.

    adapter of any layout ─► one form (adapt/foreign) ─► checks of itself ─► fitted to the base's names ─► checks
                                                                               │
                                                                               └─► --convert: a PEFT folder

An error makes an adapter unusable; a warning is for a person to judge; a note says what was found or will be done.
Names that differ from the base's by what stands before the layer are matched by their endings, when there is one match
alone. The checks are in `doctor_checks`. Left out: merging of several adapters, repairs that would be guesses.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.adapt import peft_files
from edgepeft.adapt.doctor_checks import (
    AGAINST,
    CHECKS,
    ERROR,
    NOTE,
    WARNING,
    Finding,
    fit,
    heads,
    kind_of,
    modules,
    scale_of,
)  # fmt: skip
from edgepeft.adapt.foreign import Foreign, some
from edgepeft.adapt.foreign.identify import open_adapter
from edgepeft.adapt.kinds import KINDS
from edgepeft.artifact import staging, write_json, write_tensors
from edgepeft.errors import ArtifactError, EdgePeftError

if TYPE_CHECKING:
    from edgepeft.adapt.doctor_base import Base

VARIANTS = ("use_dora", "use_rslora", "use_qalora")
SHOWN = (
    "adapter", "tool", "layout", "method", "rank", "alpha", "scale", "modules", "heads", "dtype", "bytes", "trained_on",
    "base_digest", "base",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is known of an adapter; `adapter` is in PEFT's form, under the base's names where there is a base."""

    adapter: Foreign
    base: Base | None
    findings: tuple[Finding, ...]

    @property
    def usable(self) -> bool:
        """Tell whether nothing stands against using it."""
        return all(finding.level != ERROR for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        base = self.base and {"kind": self.base.kind, "path": str(self.base.path), "digest": self.base.digest}
        findings = [dataclasses.asdict(finding) for finding in self.findings]
        return {**describe(self.adapter), "base": base, "findings": findings, "usable": self.usable}

    def text(self) -> str:
        """Return the report for a person."""
        found = {**describe(self.adapter), "modules": _modules_text(self.adapter), "usable": _verdict(self)}
        if self.base:
            found["base"] = f"{self.base.path} ({self.base.kind}, digest {self.base.digest[:12]}…)"
        lines = [f"{key.replace('_', ' '):<12}{_plain(found[key])}" for key in SHOWN if found.get(key)]
        lines += [f"{finding.level:<12}{finding}" for finding in self.findings]
        return "\n".join([*lines, f"{'usable':<12}{found['usable']}"])


def diagnose(adapter: Path, base: Path | None = None) -> Report:
    """Read an adapter, and a base, and check all there is. Raises EdgePeftError for what cannot be read at all."""
    from edgepeft.adapt.doctor_base import open_base

    found = open_adapter(adapter)
    held = None if base is None else open_base(base)
    findings = [finding for check in CHECKS for finding in check(found)]
    if held is not None and not found.unread:
        found, fitted = fit(found, held)
        findings += fitted
        findings += [finding for check in AGAINST for finding in check(found, held)]
    if all(finding.level != ERROR for finding in findings):
        findings += check_ours(found)
    order = (ERROR, WARNING, NOTE)
    return Report(found, held, tuple(sorted(findings, key=lambda finding: order.index(finding.level))))


def convert(adapter: Foreign, out: Path) -> None:
    """Write an adapter as a PEFT folder, every value as it was. Raises ArtifactError when that is not possible."""
    if out.exists():
        raise ArtifactError(f"{out}: exists already. Give --convert a new folder.")
    if adapter.unread:
        raise ArtifactError(f"{adapter.path}: {adapter.unread}.")
    if adapter.strange:
        raise ArtifactError(
            f"{adapter.path}: {len(adapter.strange)} tensors of no known meaning ({some(adapter.strange)}) would be "
            "left out. Convert it with the tool that made it."
        )
    if adapter.turned:
        raise ArtifactError(
            f"{adapter.path}: rows of {some(adapter.turned, 2)} are in llama.cpp's order, which takes the number of "
            "heads to undo. Give the base too: edgepeft doctor ADAPTER BASE --convert OUT."
        )
    with staging(out) as place:
        _write(adapter, place)


def _write(adapter: Foreign, folder: Path) -> None:
    write_json(folder / peft_files.SETTINGS, dict(adapter.settings))
    write_tensors(folder / peft_files.TENSORS, adapter.tensors, {"format": "pt", **_metadata(adapter)})


def _metadata(adapter: Foreign) -> dict[str, str]:
    return {key: text for key, text in adapter.metadata.items() if key.startswith("edgepeft.")}


def check_ours(adapter: Foreign) -> list[Finding]:
    """Edgepeft reads it, as the folder it is or would be converted to."""
    with tempfile.TemporaryDirectory(prefix="edgepeft-") as name:
        folder = adapter.path
        if adapter.changes or not folder.is_dir():
            folder = Path(name)
            _write(adapter, folder)
        try:
            peft_files.read(folder)
        except EdgePeftError as error:
            lines = str(error).replace(f"{folder}: ", "").splitlines()
            return [Finding(ERROR, line.rstrip(".")) for line in lines]
    return []


# --- what it is ----------------------------------------------------------------------------------------------------


def describe(adapter: Foreign) -> dict[str, Any]:
    """Return what an adapter is, as JSON values."""
    settings = adapter.settings
    return {
        "adapter": str(adapter.path), "tool": adapter.tool, "layout": adapter.layout, "method": method(settings),
        "rank": settings.get("r"), "alpha": settings.get("lora_alpha"), "scale": scale_of(settings),
        "ranks": sorted({pair["A"].shape[0] for pair in adapter.pairs.values() if "A" in pair and pair["A"].ndim}),
        "modules": modules(adapter), "heads": heads(adapter) if settings.get("peft_type") in KINDS else [],
        "dtype": sorted({str(array.dtype) for array in adapter.tensors.values()}),
        "bytes": sum(array.nbytes for array in adapter.tensors.values()),
        "trained_on": settings.get("base_model_name_or_path"), "base_digest": adapter.metadata.get("edgepeft.base"),
        "format": adapter.metadata.get("edgepeft.format"),
    }  # fmt: skip


def method(settings: Mapping[str, Any]) -> str:
    """Return an adapter's method in PEFT's words, with the variants that are switched on."""
    kind = str(settings.get("peft_type") or "unknown").lower()
    return " ".join([kind, *(f"({name.removeprefix('use_')})" for name in VARIANTS if settings.get(name))])


def _modules_text(adapter: Foreign) -> str:
    found = modules(adapter)
    kinds = Counter(map(kind_of, found))
    return f"{len(found)}: " + some((f"{kind} x {count}" for kind, count in kinds.items()), 8) if kinds else ""


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return some(map(str, value), 6)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _verdict(report: Report) -> str:
    if not report.usable:
        return "no"
    moved = report.adapter.changes
    return "yes, after --convert OUT, as a PEFT folder" if moved else "yes"


def doctor_cli(adapter: Path, base: Path | None, as_json: bool, out: Path | None) -> bool:
    """Print the report of an adapter and tell whether it can be used; convert it where `out` is given."""
    report = diagnose(adapter, base)
    if out is not None:
        convert(report.adapter, out)
    print(json.dumps(report.as_dict(), indent=2) if as_json else report.text())
    return report.usable
