"""The road from a model folder and a data file to a bundle, on one screen.

    config -> quantize -> train -> merge | keep -> export -> verify -> bundle

A stage is a function `stage(config, run, out) -> summary`: it reads the folders of earlier stages through
`run.path(...)` and writes below `out` alone. The stages meet only in the run folder, so each can be redone, replaced
or resumed by itself. A stage's key is made of the settings it reads, the files it was given and the version of
edgepeft; when key and files still agree with the record, the stage is not run again.

What lies outside the run folder (OUTSIDE) stands in the key by itself, a digest each, so that a stage is refused when
one that it goes on from read something else. Where that is gone, as on another machine, only the stages that read it
cannot go on.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgepeft import OP_ABI, __version__
from edgepeft.artifact import Run, key_of, read_json, write_json
from edgepeft.config import Config, checked, teacher_folder
from edgepeft.console import say
from edgepeft.errors import ArtifactError, ConfigError, EdgePeftError, unknown
from edgepeft.ranks import leads, world

if TYPE_CHECKING:
    from edgepeft.backbone.families import Family
    from edgepeft.backbone.load import ModelSource
    from edgepeft.deploy.targets import Target
    from edgepeft.train.data import Splits

# Says when it is imported, on processors with AVX512-BF16, that a package is missing which nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _model_digest(config: Config) -> str:
    from edgepeft.backbone.load import resolve_model

    return resolve_model(config).identity


def _own_model(config: Config) -> bool:
    """Tell whether the model is the user's own folder; a packaged one is pinned, a hub is asked by quantize alone."""
    from edgepeft.backbone.load import PACKAGED

    return config.model not in PACKAGED and Path(config.model).expanduser().is_dir()


def _data_digest(config: Config) -> str:
    from edgepeft.train.data import data_digest

    return data_digest(config)


def _teacher_digest(config: Config) -> str:
    """Return the digest of a teacher's folder, or "" for one that the setting alone names."""
    from edgepeft.backbone.load import open_folder

    folder = teacher_folder(config)
    return open_folder(folder).identity if folder else ""


def _adapter_digest(config: Config) -> str:
    from edgepeft.train.attach import folder_digest

    return folder_digest(config)


def _calibration_digest(config: Config) -> str:
    from edgepeft.quant.calibration import digest

    return digest(config)


def _target_digest(config: Config) -> str:
    from edgepeft.deploy.compile import sources_digest
    from edgepeft.deploy.targets import load_target

    return key_of([dataclasses.asdict(load_target(config.target)), sources_digest()])


@dataclasses.dataclass(frozen=True)
class Outside:
    """Something outside the run folder: how messages call it, its digest, and when a later stage can look at it."""

    words: str
    digest: Callable[[Config], str]
    at_hand: Callable[[Config], bool] = lambda config: True


# By the setting that names it.
OUTSIDE = {
    "model": Outside("the model that was quantized", _model_digest, _own_model),
    "calibration": Outside("the texts that were calibrated with", _calibration_digest),
    "data": Outside("the data trained with", _data_digest),
    "teacher": Outside("the teacher trained with", _teacher_digest),
    "adapter_from": Outside("the adapter that was attached", _adapter_digest),
    "target": Outside("the target verified for", _target_digest),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step: the function that does it, the folder it fills, what it reads, and when it has nothing to do."""

    name: str
    folder: str
    function: str
    settings: tuple[str, ...]
    needs: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    applies: Callable[[Config], bool] = lambda config: True

    def call(self, config: Config, run: Run, out: Path) -> dict[str, Any]:
        """Do the stage, its result below `out`, and return its summary."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)(config, run, out)


TRAINING = (
    "text_column", "label_column", "task", "method", "rank", "alpha", "experts", "share_groups", "lora_plus_ratio",
    "prompt_tokens", "dropout", "epochs", "batch_size", "accumulation", "learning_rate", "max_length", "packing",
    "checkpointing", "precision", "train_activation", "seed", "teacher", "lesson_weight", "lesson_temperature",
    "lesson_hidden", "start",
)  # fmt: skip
STAGES = (
    Stage(
        "quantize", "quantized", "edgepeft.quant.stage:quantize",
        ("model", "format", "embedding_format", "double_quant", "solver", "size"), outside=("model", "calibration"),
    ),
    Stage(
        "train", "adapter", "edgepeft.train.loop:train",
        ("data", "adapter_from", *TRAINING), ("quantized",), ("data", "teacher", "adapter_from"),
    ),
    Stage(
        "merge", "merged", "edgepeft.adapt.merge:merge",
        ("data", "adapter", "min_retention", "max_metric_drop"),
        ("quantized", "adapter"), ("data",), applies=lambda config: config.adapter != "separate",
    ),
    Stage(
        "export", "export", "edgepeft.export.stage:export", ("adapter", "activation", "context", "task", "target"),
        ("quantized", "adapter", "merged"),
    ),
    Stage(
        "verify", "verify", "edgepeft.export.verify:verify", ("data", "target", "max_metric_drop"),
        ("quantized", "adapter", "merged", "export"), ("data", "target"),
    ),
    Stage(
        "bundle", "bundle", "edgepeft.deploy.bundle:bundle", ("target",),
        ("quantized", "adapter", "export", "verify"), ("target",),
    ),
)  # fmt: skip


def stage_named(name: str) -> Stage:
    """Return the stage of that name. Raises ArtifactError for an unknown one."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise ArtifactError(unknown("stage", name, [stage.name for stage in STAGES]))


class Inputs(NamedTuple):
    """What a build reads, opened."""

    source: ModelSource
    family: Family
    splits: Splits[Any]
    target: Target


def open_inputs(config: Config) -> Inputs:
    """Open all that a build reads. Raises EdgePeftError for what a stage would refuse, before the first one works."""
    from edgepeft.backbone.check import check_bindable, check_length, check_model
    from edgepeft.backbone.families import check_task
    from edgepeft.backbone.load import resolve_model
    from edgepeft.deploy.targets import load_target
    from edgepeft.quant.budget import check_size
    from edgepeft.train.data import load_splits

    source, target = resolve_model(config), load_target(config.target)
    family = check_model(source)
    check_task(family, config.task, str(source.path))
    check_length(config, source)
    if "webgpu" in target.gpu:
        check_bindable(config, source, family, target.gpu_buffer_mib)
    if config.size:
        check_size(config, source, family)
    for name in ("calibration", "teacher", "adapter_from"):
        OUTSIDE[name].digest(config)
    splits = load_splits(config)
    if config.adapter_from:
        from edgepeft.train import attach

        attach.check(config, source, family, splits)
    return Inputs(source, family, splits, target)


def _needs(stage: Stage, config: Config) -> list[Stage]:
    """Return the earlier stages whose results a stage reads."""
    return [other for other in STAGES if other.folder in stage.needs and other.applies(config)]


def _basis(stage: Stage, config: Config, run: Run) -> str:
    """Return the digest of the settings a stage reads and of the results it starts from."""
    settings = {name: getattr(config, name) for name in stage.settings}
    inputs = {other.folder: run.records.get(other.folder, {}).get("files") for other in _needs(stage, config)}
    return key_of([__version__, OP_ABI, stage.name, settings, inputs])


def stage_key(stage: Stage, config: Config, run: Run) -> str:
    """Return the key of everything a stage's result depends on, what lies outside the run folder included.

    Raises ArtifactError when an earlier stage has not been done, or with other settings or from other results or files
    than there are now: what it found, or checked, would not be what goes on.
    """
    needs = _needs(stage, config)
    now = {name: _glance(name, config) for other in needs for name in other.outside if name not in stage.outside}
    now |= {name: OUTSIDE[name].digest(config) for name in stage.outside}
    for other in needs:
        _check(other, config, run, now)
    return "-".join([_basis(stage, config, run), *(now[name] for name in stage.outside)])


def _glance(name: str, config: Config) -> str:
    """Return the digest of something outside that a stage does not read itself, or "" where it cannot be read."""
    try:
        return OUTSIDE[name].digest(config) if OUTSIDE[name].at_hand(config) else ""
    except (EdgePeftError, OSError):
        return ""


def _check(stage: Stage, config: Config, run: Run, now: Mapping[str, str]) -> None:
    """Raise ArtifactError unless a stage was done, with the settings, results and outside files there are now."""
    folder, advice = run.path(stage.folder), f"Run 'edgepeft {stage.name}' first."
    if stage.folder not in run.records:
        raise ArtifactError(f"{folder}: missing. {advice}")
    basis, *digests = run.records[stage.folder]["key"].split("-")
    if basis != _basis(stage, config, run):
        what = "expected the result of the settings and files there are now, found an older one"
        raise ArtifactError(f"{folder}: {what}. {advice}")
    for name, digest in zip(stage.outside, digests, strict=False):
        if now[name] not in ("", digest):
            where = getattr(config, name) or config.data
            raise ArtifactError(f"{where}: expected {OUTSIDE[name].words}, found other. {advice}")


def run_stage(stage: Stage, config: Config, run: Run) -> dict[str, Any]:
    """Do one stage unless its result already stands, and return its summary."""
    key = stage_key(stage, config, run)
    if run.holds(stage.folder, key):
        say(f"{stage.name}: up to date ({run.path(stage.folder)})")
        return run.records[stage.folder]["summary"]
    say(f"{stage.name}: ...")
    run.key = key
    summary = run.make(stage.folder, key, lambda out: stage.call(config, run, out))
    run.clear(stage.name)
    return summary


def _follow(stage: Stage, config: Config) -> Path:
    """Do one's share of a stage that another process leads; nothing is written."""
    run = Run(Path(config.output))
    run.key = stage_key(stage, config, run)
    if not run.holds(stage.folder, run.key):
        stage.call(config, run, run.path(stage.folder))
    return run.path(stage.folder)


def saved_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the last stage that was done in a run folder, or nothing."""
    path = folder / "config.json"
    return checked(read_json(path), path) if Run(folder).records and path.exists() else {}


def build(config: Config, stages: Sequence[Stage] = STAGES) -> Path:
    """Run the stages in order, each that applies, and return the folder of the last one.

    What it reads is looked at before a folder is made. Stages whose result still stands are skipped. The settings stay
    in the folder for the single-stage commands once a stage was done with them; those of a command that failed at once
    are not remembered. Raises EdgePeftError from the stage that cannot go on.
    """
    folder = Path(config.output)
    if world() > 1 and [stage.name for stage in stages] != ["train"]:
        raise ConfigError("several processes (torchrun) can only train. Run the other stages in one: edgepeft ...")
    if not leads():
        return _follow(stages[0], config)
    if len(stages) > 1 and not Run(folder).records:
        open_inputs(config)
    with Run(folder).lock():
        run = Run(folder)
        for stage in stages:
            if stage.applies(config):
                run_stage(stage, config, run)
                write_json(folder / "config.json", dataclasses.asdict(config))
    return run.path(stages[-1].folder)
