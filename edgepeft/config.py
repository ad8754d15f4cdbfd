"""The configuration: one frozen record, filled from defaults, then a TOML file, then flags.

Every field is a key of the file (`rank = 16`) and a flag of the command line (`--rank 16`); the help text and the set
of allowed names live with the field, so the three cannot drift apart. Fields that name a member of a table are checked
against that table when the record is made. A setting that tasks have of their own defaults to 0, which the record
replaces by the task's value; the format defaults to the best that the target has.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepeft.errors import ConfigError, unknown


def _adapter_forms() -> Iterable[str]:
    return ("separate", "merged", "auto")


def _activations() -> Iterable[str]:
    return ("int8", "float")


def _formats() -> Iterable[str]:
    from edgepeft.quant.formats import FORMATS

    return FORMATS


def _embedding_formats() -> Iterable[str]:
    from edgepeft.quant.formats import EMBEDDING_FORMATS

    return [*EMBEDDING_FORMATS, "float"]


def _solvers() -> Iterable[str]:
    from edgepeft.quant.solvers import SOLVERS

    return SOLVERS


def _methods() -> Iterable[str]:
    from edgepeft.adapt.methods import METHODS

    return METHODS


def _starts() -> Iterable[str]:
    return ("default", "loftq", "pissa")


def _tasks() -> Iterable[str]:
    from edgepeft.train.tasks import TASKS

    return TASKS


def _precisions() -> Iterable[str]:
    return ("float32", "bfloat16")


def _targets() -> Iterable[str]:
    from edgepeft.deploy.targets import target_names

    return target_names()


def _has_classes(task: str) -> bool:
    from edgepeft.train.tasks import TASKS

    return task in TASKS and TASKS[task].classes


def _stays_apart(method: str) -> bool:
    from edgepeft.adapt.methods import METHODS

    return method in METHODS and METHODS[method].apart


TEACHERS = ("none", "self", "tuned")  # or a folder
# More than the cores only slows a machine down, and thousands of waiting threads take it away from its user.
MOST_THREADS = 4 * (os.cpu_count() or 1)


def _field(
    default: Any,
    help_text: str,
    choices: Callable[[], Iterable[str]] | None = None,
    low: float | None = None,
    high: float | None = None,
    group: str = "model",
) -> Any:
    """Describe one field: its default, its help, and what values it takes."""
    meta = {"help": help_text, "choices": choices, "low": low, "high": high, "group": group}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of one build. Raises ConfigError, naming every problem at once, when one cannot be used."""

    model: str = _field("minilm", "Model folder, hub name, or 'minilm' for the embedded default.")
    data: str = _field("home-assistant", "Labelled file or saved data set, or 'home-assistant' for the shipped one.")
    text_column: str = _field("text", "Column that holds the text.", group="data")
    label_column: str = _field("label", "Column that holds the label.", group="data")
    task: str = _field("text-classification", "What the model is tuned for.", _tasks, group="data")
    target: str = _field("host", "Where the bundle will run.", _targets, group="deploy")
    format: str = _field("", "Weight format of the frozen linear layers.", _formats, group="quantize")
    embedding_format: str = _field("i4b32", "Weight format of the embeddings.", _embedding_formats, group="quantize")
    double_quant: bool = _field(False, "nf4 only: store the block scales in 8 bits, as QLoRA does.", group="quantize")
    solver: str = _field("rtn", "How codes and scales are found.", _solvers, group="quantize")
    calibration: str = _field(
        "", "Text or data file that solvers look at; of the training texts of --data unless given.", group="quantize"
    )
    calibration_rows: int = _field(128, "Rows drawn of it.", low=1, high=1 << 16, group="quantize")
    calibration_tokens: int = _field(256, "Most tokens of such a row.", low=2, high=1 << 16, group="quantize")
    size: str = _field(
        "",
        "Most bytes of the packed weights, as 12MB: formats are then measured and chosen per layer.",
        group="quantize",
    )
    method: str = _field("lora", "Adapter method.", _methods, group="train")
    rank: int = _field(16, "Rank R of the adapter.", low=1, high=1024, group="train")
    alpha: float = _field(32.0, "LoRA alpha; the adapter is scaled by alpha / rank.", low=1e-3, group="train")
    share_groups: int = _field(2, "share-groups: groups of layers, each with one A, B a role.", low=1, group="train")
    lora_plus_ratio: float = _field(16.0, "loraplus: learning rate of B over that of A.", low=1, group="train")
    prompt_tokens: int = _field(20, "prompt, p-tuning, prefix: rows before a text.", low=1, high=1 << 12, group="train")
    dropout: float = _field(0.05, "Dropout on the adapter's input.", low=0, high=0.9, group="train")
    epochs: int = _field(0, "Passes over the training set.", low=1, group="train")
    batch_size: int = _field(0, "Examples, or packed rows of them, per forward pass.", low=1, group="train")
    accumulation: int = _field(1, "Forward passes per training step, their gradients summed.", low=1, group="train")
    learning_rate: float = _field(0.0, "Peak learning rate.", low=1e-9, group="train")
    max_length: int = _field(
        0, "Longest text or packed row in tokens; longer ones are cut. The default yields to a model with fewer "
        "positions.", low=4, group="train",
    )  # fmt: skip
    packing: bool = _field(True, "text-generation: put several examples into one row.", group="train")
    checkpointing: bool = _field(
        False, "Compute activations twice instead of keeping them: less memory.", group="train"
    )
    experts: int = _field(4, "--method experts: LoRA experts of each linear.", low=2, high=64, group="train")
    precision: str = _field(
        "float32", "Arithmetic of training; bfloat16 where it is native.", _precisions, group="train"
    )
    start: str = _field(
        "default", "Where the adapter begins: B = 0, or from what quantization lost, or from W itself.", _starts,
        group="train",
    )  # fmt: skip
    adapter_from: str = _field(
        "",
        "Folder of a trained adapter, as Hugging Face PEFT saves it, to ship instead of training one.",
        group="train",
    )
    teacher: str = _field(
        "none", "Who teaches beside the labels: none, self (the float backbone), tuned (it, tuned first) or a folder.",
        group="train",
    )  # fmt: skip
    lesson_weight: float = _field(0.5, "Share of the teacher's answers in the loss.", low=0, high=1, group="train")
    lesson_temperature: float = _field(2.0, "Temperature of both answers.", low=0.1, high=100, group="train")
    lesson_hidden: float = _field(0.0, "Weight of the teacher's hidden states.", low=0, group="train")
    train_activation: str = _field(
        "float", "What packed linears multiply in training; int8 as the shipped op does.", _activations, group="train"
    )
    shard: bool = _field(False, "torchrun: each process keeps its share of the packed bits.", group="train")
    seed: int = _field(0, "Seed of every random choice.", low=0, high=2**32 - 1, group="train")
    adapter: str = _field(
        "separate",
        "Ship the adapter beside the base, merged, or merged where nothing is lost.",
        _adapter_forms,
        group="export",
    )
    min_retention: float = _field(0.5, "Merged: least share of the adapter to survive.", low=0, high=1, group="export")
    max_metric_drop: float = _field(0.01, "Merged: most the validation metric may fall.", low=0, group="export")
    activation: str = _field("int8", "Activations of the fused op.", _activations, group="export")
    context: int = _field(2048, "text-generation: most tokens of prompt and answer together.", low=16, group="export")
    threads: int = _field(0, "CPU threads to train and verify; 0 takes all.", low=0, high=MOST_THREADS, group="run")
    output: str = _field("edgepeft-out", "Folder for all that is made: new, empty or of an earlier build.", group="run")

    def __post_init__(self) -> None:
        formats = target_formats(self.target)
        for name, value in {**own_settings(self.task), **({"format": formats[0]} if formats else {})}.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        unset = set() if own_settings(self.task) else tasks_own()  # which 0 each stands for, no task says
        unset |= {"format"} if not formats and not self.format else set()  # nor a target
        known = [field for field in dataclasses.fields(self) if field.name not in unset]
        problems = [problem for field in known if (problem := _problem(field, getattr(self, field.name)))]
        if formats and self.format in _formats() and self.format not in formats:
            what = f"--format: {self.format} does not run on every GPU of --target {self.target}"
            problems.append(f"{what}. Take one of {', '.join(formats)}.")
        if self.double_quant and not self.format.startswith("nf4"):
            problems.append(f"--double-quant needs --format nf4b64, found {self.format!r}.")
        if self.size and bytes_of(self.size) is None:
            problems.append(
                f"--size: expected a number with kB, MB, GB, KiB, MiB or GiB such as 12MB, found {self.size!r}."
            )
        if self.size and self.double_quant:
            problems.append("--size chooses formats without nf4b64, which --double-quant is for. Leave one out.")
        if self.adapter_from:
            problems += [
                f"{flag(name)} {getattr(self, name)}: nothing is trained with --adapter-from. Leave one out."
                for name, plain in (("teacher", "none"), ("start", "default"))
                if getattr(self, name) != plain
            ]
        if self.teacher == "self" and _has_classes(self.task) and not self.lesson_hidden and not self.adapter_from:
            problems.append(
                "--teacher self: a backbone knows no classes, so it can teach hidden states alone. Give "
                "--lesson-hidden 1, or take --teacher tuned."
            )
        if self.adapter == "merged" and not self.adapter_from and _stays_apart(self.method):
            problems.append(
                f"--adapter merged: --method {self.method} stands before the text or beside the weights and goes into "
                "none. Give --adapter separate, or auto."
            )
        if self.size and self.embedding_format == "float":
            problems.append("--size chooses the embeddings' formats too. Leave out --embedding-format float.")
        if problems:
            raise ConfigError("\n".join(problems))

    def replace(self, **changes: Any) -> Config:
        """Return a copy with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)


UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def bytes_of(size: str) -> int | None:
    """Return how many bytes "12MB" or "1.5 GiB" are, or None for what is no size."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})", size.strip(), re.ASCII)
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def teacher_folder(config: Config) -> Path | None:
    """Return the model folder that --teacher names, or None for a word. Raises ConfigError when it is neither."""
    if config.teacher in TEACHERS:
        return None
    folder = Path(config.teacher).expanduser()
    if not folder.is_dir():
        expected = f"{', '.join(TEACHERS)} or a model folder"
        raise ConfigError(f"--teacher: expected {expected}, found {config.teacher!r}.")
    return folder


def own_settings(task: str) -> Mapping[str, Any]:
    """Return the settings that a task has of its own; 0 stands for them."""
    from edgepeft.train.tasks import TASKS

    return TASKS[task].defaults if task in TASKS else {}


def target_formats(target: str) -> Sequence[str]:
    """Return the formats that a target has, the best first; none for one that there is not."""
    from edgepeft.deploy.targets import load_target

    return load_target(target).formats if target in _targets() else ()


def tasks_own() -> set[str]:
    """Return the names of the settings that tasks have of their own."""
    return {name for task in _tasks() for name in own_settings(task)}


def default_text(field: dataclasses.Field) -> str:
    """Return the default of a field in words; of one that tasks or targets have of their own, each one's."""
    if field.name == "format":
        return f"the target's best, {', '.join(dict.fromkeys(target_formats(target)[0] for target in _targets()))}"
    own = {task: found[field.name] for task in _tasks() if field.name in (found := own_settings(task))}
    return ", ".join(f"{value} for {task}" for task, value in own.items()) or str(field.default)


def flag(name: str) -> str:
    """Return the command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def _problem(field: dataclasses.Field, value: Any) -> str | None:
    """Say what is wrong with one value, or nothing."""
    meta = field.metadata
    if meta["choices"] is not None and value not in (known := list(meta["choices"]())):
        return f"{flag(field.name)}: " + unknown(field.name.replace("_", " "), value, known)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{flag(field.name)}: expected a finite number, found {value!r}."
    for bound, low in ((meta["low"], True), (meta["high"], False)):
        if bound is not None and not (value >= bound if low else value <= bound):
            return f"{flag(field.name)}: expected at {'least' if low else 'most'} {bound:g}, found {value!r}."
    return None


def _coerce(field: dataclasses.Field, value: Any, where: str) -> Any:
    """Turn a TOML value into the field's type: an int may serve as a float, nothing else is bent."""
    kind = type(field.default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is kind:
        return value
    raise ConfigError(f"{where}: {field.name}: expected {kind.__name__}, found {value!r}.")


def read_file(path: Path) -> dict[str, Any]:
    """Read a TOML configuration. Raises ConfigError for a missing file, bad TOML, unknown keys or wrong types."""
    try:
        with open(path, "rb") as stream:
            table = tomllib.load(stream)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None
    return checked(table, path)


def checked(table: Any, path: Path) -> dict[str, Any]:
    """Return the settings that a file holds. Raises ConfigError for unknown keys or wrong types."""
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: expected a table of settings, found {type(table).__name__}.")
    fields = {f.name: f for f in dataclasses.fields(Config)}
    table = {key.replace("-", "_"): value for key, value in table.items()}
    strange = [f"{path}: " + unknown("key", key, fields) for key in table if key not in fields]
    if strange:
        raise ConfigError("\n".join(strange))
    return {key: _coerce(fields[key], value, str(path)) for key, value in table.items()}


def settings(file: Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what file and flags say, flags winning; a flag that is None was not given.

    Raises ConfigError for a 0 that would stand for a task's own setting: whoever gives one means it.
    """
    values = read_file(file) if file else {}
    values |= {key: value for key, value in flags.items() if value is not None}
    own = tasks_own()
    zeros = [field for field in dataclasses.fields(Config) if field.name in own and values.get(field.name) == 0]
    if zeros:
        raise ConfigError("\n".join(str(_problem(field, values[field.name])) for field in zeros))
    return values


def resolve(file: Path | None, flags: Mapping[str, Any]) -> Config:
    """Return defaults, file and flags as one, later ones winning."""
    return Config(**settings(file, flags))
