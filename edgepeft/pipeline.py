"""The road from a model folder and a data file to a bundle, on one screen.

    config -> quantize -> train -> merge | keep -> export -> verify -> bundle

A stage is a function `stage(config, run, out) -> summary`: it reads the folders of earlier stages through
`run.path(...)` and writes below `out` alone. The stages meet only in the run folder, so each can be redone, replaced
or resumed by itself. A stage's key is made of the settings it reads, the files it was given and the version of
edgepeft; when key and files still agree with the record, the stage is not run again.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgepeft import __version__
from edgepeft.artifact import Run, key_of, read_json, write_json
from edgepeft.config import Config, checked
from edgepeft.console import say
from edgepeft.errors import ArtifactError, unknown


def _model_digest(config: Config) -> str:
    from edgepeft.backbone.load import resolve_model

    return resolve_model(config).identity


def _data_digest(config: Config) -> str:
    from edgepeft.train.data import data_digest

    return data_digest(config)


def _target_digest(config: Config) -> str:
    from edgepeft.deploy.compile import sources_digest
    from edgepeft.deploy.targets import load_target

    return key_of([dataclasses.asdict(load_target(config.target)), sources_digest()])


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step: the function that does it, the folder it fills, what it reads, and when it has nothing to do."""

    name: str
    folder: str
    function: str
    settings: tuple[str, ...]
    needs: tuple[str, ...] = ()
    outside: Callable[[Config], str] | None = None
    applies: Callable[[Config], bool] = lambda config: True


TRAINING = ("text_column", "label_column", "task", "method", "rank", "alpha", "dropout", "epochs", "batch_size")
STAGES = (
    Stage(
        "quantize", "quantized", "edgepeft.quant.stage:quantize",
        ("model", "format", "embedding_format", "double_quant", "solver"), outside=_model_digest,
    ),
    Stage(
        "train", "adapter", "edgepeft.train.loop:train",
        ("data", *TRAINING, "learning_rate", "max_length", "seed"), ("quantized",), _data_digest,
    ),
    Stage(
        "merge", "merged", "edgepeft.adapt.merge:merge", ("data", "min_retention", "max_metric_drop"),
        ("quantized", "adapter"), applies=lambda config: config.adapter == "merged",
    ),
    Stage(
        "export", "export", "edgepeft.export.stage:export", ("adapter", "activation", "task"),
        ("quantized", "adapter", "merged"),
    ),
    Stage(
        "verify", "verify", "edgepeft.export.verify:verify", ("data", "target", "max_metric_drop"),
        ("quantized", "adapter", "export"), _target_digest,
    ),
    Stage(
        "bundle", "bundle", "edgepeft.deploy.bundle:bundle", ("target",),
        ("export", "verify", "adapter"), _target_digest,
    ),
)  # fmt: skip


def stage_named(name: str) -> Stage:
    """Return the stage of that name. Raises ArtifactError for an unknown one."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise ArtifactError(unknown("stage", name, [stage.name for stage in STAGES]))


def _needs(stage: Stage, config: Config) -> list[Stage]:
    """Return the earlier stages whose results a stage reads."""
    return [other for other in STAGES if other.folder in stage.needs and other.applies(config)]


def _basis(stage: Stage, config: Config, run: Run) -> str:
    """Return the digest of the settings a stage reads and of the results it starts from."""
    settings = {name: getattr(config, name) for name in stage.settings}
    inputs = {other.folder: run.records.get(other.folder, {}).get("files") for other in _needs(stage, config)}
    return key_of([__version__, stage.name, settings, inputs])


def stage_key(stage: Stage, config: Config, run: Run) -> str:
    """Return the key of everything a stage's result depends on, what lies outside the run folder included.

    Raises ArtifactError when an earlier stage has not been done, or with other settings or from other results than
    there are now: what it found, or checked, would not be what goes on.
    """
    for other in _needs(stage, config):
        if other.folder not in run.records:
            raise ArtifactError(f"{run.path(other.folder)}: missing. Run 'edgepeft {other.name}' first.")
        if not run.records[other.folder]["key"].startswith(_basis(other, config, run)):
            raise ArtifactError(
                f"{run.path(other.folder)}: expected the result of the settings and files there are now, found an "
                f"older one. Run 'edgepeft {other.name}' first."
            )
    outside = key_of(stage.outside(config)) if stage.outside else ""
    return f"{_basis(stage, config, run)}-{outside}"


def run_stage(stage: Stage, config: Config, run: Run) -> dict[str, Any]:
    """Do one stage unless its result already stands, and return its summary."""
    key = stage_key(stage, config, run)
    if run.holds(stage.folder, key):
        say(f"{stage.name}: up to date ({run.path(stage.folder)})")
        return run.records[stage.folder]["summary"]
    say(f"{stage.name}: ...")
    module, name = stage.function.split(":")
    function = getattr(importlib.import_module(module), name)
    run.key = key
    return run.make(stage.folder, key, lambda out: function(config, run, out))


def open_run(config: Config) -> Run:
    """Return the run folder of a configuration and leave the configuration in it for the single-stage commands."""
    run = Run(Path(config.output))
    write_json(run.folder / "config.json", dataclasses.asdict(config))
    return run


def saved_settings(folder: Path) -> dict[str, Any]:
    """Return the settings an earlier command left in a run folder, or nothing."""
    path = folder / "config.json"
    return checked(read_json(path), path) if (folder / "run.json").exists() and path.exists() else {}


def build(config: Config, stages: Sequence[Stage] = STAGES) -> Path:
    """Run the stages in order, each that applies, and return the folder of the last one.

    Stages whose result still stands are skipped. Raises EdgePeftError from the stage that cannot go on.
    """
    folder = Path(config.output)
    with Run(folder).lock():
        run = open_run(config)
        for stage in stages:
            if stage.applies(config):
                run_stage(stage, config, run)
    return run.path(stages[-1].folder)
