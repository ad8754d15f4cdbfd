"""The verify stage: the exported files, run by the real runtime, must do what was trained. Any miss stops the build.

| check | what runs | against | allowed |
|---|---|---|---|
| adapter | PyTorch, the exported adapter | the trained one, rounded to float16 | float32 rounding, per layer |
| stock | function bodies, stock ONNX Runtime | PyTorch, same bits and adapter | float32 rounding, per layer |
| library | our kernels, float activations | the same | the same |
| rounding | our kernels, int8 activations | PyTorch in float | twice the noise of PyTorch rounding to int8, per layer |
| answers | the model as it will ship, `LABELLED` examples | PyTorch in float | 99 % the same label |
| metric | the model as it will ship, the whole test split | the figure measured after training | a drop of 0.01 |
| effect | adapter off; each of its tensors set to zero | the model itself | more than int8 noise; any difference |
| device | emulated CPUs of the target with its pinned wheel | the same arrays here | as `stock` and `rounding` |

A check that cannot run here (no compiler, no emulator, a merged adapter) is written down as skipped, with the reason.
Layers are compared on a few real sentences of different lengths, padding included. report.json holds every figure.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.artifact import Run, read_json, write_json
from edgepeft.console import say
from edgepeft.errors import EdgePeftError, VerifyError
from edgepeft.export import parity, probe
from edgepeft.export.parity import LOGITS, Trace
from edgepeft.export.subject import TRACED, Skipped, Subject
from edgepeft.train.tasks import TASKS

if TYPE_CHECKING:
    from edgepeft.config import Config

FLOAT_ERROR = 1e-4  # some 100 units of float32 over a few dozen layers; measured: 1e-6 to 1e-5
HALF_NOISE = 1e-2  # of the logits, by keeping the adapter in float16; measured: 4e-5 to 1e-3
NOISE_FACTOR = 2.0
NOISE_FLOOR = 1e-3
AGREEMENT = 0.99
METRIC_DROP = 0.01
LABELLED = 512
DEVICE_TRACED = 2

Figures = dict[str, Any]


def verify(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Check the exported folder of a run, write report.json and return its figures.

    Raises VerifyError that names the check, the layer or tensor where it starts, what was expected and what was found.
    """
    work = Subject.open(config, run, out)
    report: dict[str, Figures] = {}
    for name, check in CHECKS.items():
        try:
            report[name] = {"status": "passed", **check(work)}
        except Skipped as reason:
            report[name] = {"status": "skipped", "reason": str(reason)}
        _tell(name, report[name])
    versions = {name: _version(name) for name in ("onnxruntime", "torch", "transformers", "peft")}
    write_json(out / "report.json", {"checks": report, "versions": versions})
    return report


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _tell(name: str, figures: Figures) -> None:
    text = _phrase({key: value for key, value in figures.items() if key != "status"})
    say(f"  {name:<9}{figures['status']}" + (f": {text}" if text else ""))


def _phrase(figures: Figures) -> str:
    """Return figures as words: "largest error 8e-07; layers 27"."""

    def one(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"({_phrase(dict(value))})"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return "; ".join(f"{key.replace('_', ' ')} {one(value)}" for key, value in figures.items())


# --- the checks --------------------------------------------------------------------------------------------------


def check_adapter(work: Subject) -> Figures:
    """The exported adapter computes what the trained one does."""
    if work.merged:
        raise Skipped("merged: there is no adapter file")
    exported = {name: work.float_trace[name] for name in work.layers if name in work.float_trace}
    work.adapter("trained")
    trained = parity.torch_trace(work.model, work.sample(TRACED), work.layers)
    with parity.half_adapter(work.model, "trained"):
        rounded = parity.torch_trace(work.model, work.sample(TRACED), work.layers)
    advice = "The adapter's file does not hold what was trained: run 'edgepeft export' again."
    rows = parity.differences(exported, rounded, FLOAT_ERROR)
    worst = parity.require("exported adapter against the trained one", rows, advice)
    half = parity.Difference(LOGITS, parity.noise(exported[LOGITS], trained[LOGITS]), HALF_NOISE)
    parity.require("adapter in float16", [half], "Its values span too much; train with a lower learning rate.")
    return {"largest_error": worst, "float16_noise": half.error}


def _float_parity(work: Subject, library: bool) -> Figures:
    got = work.onnx(library, "float", traced=True).trace(work.sample(TRACED))
    rows = parity.differences(got, work.float_trace, FLOAT_ERROR)
    advice = "The exported weights or adapter differ from those trained with: run 'edgepeft export' again."
    where = "the op library in float" if library else "stock ONNX Runtime"
    worst = parity.require(f"{where} against PyTorch", rows, advice)
    return {"largest_error": worst, "logits_error": rows[-1].error, "layers": len(rows)}


def check_stock(work: Subject) -> Figures:
    """The function bodies, on stock ONNX Runtime, compute what PyTorch does."""
    return _float_parity(work, library=False)


def check_library(work: Subject) -> Figures:
    """Our kernels with float activations compute what PyTorch does."""
    return _float_parity(work, library=True)


def _rounded_trace(work: Subject) -> Trace:
    """PyTorch's layers with activations rounded to int8."""
    work.adapter("exported")
    with parity.int8_activations(work.model):
        return parity.torch_trace(work.model, work.sample(TRACED), work.layers)


def check_rounding(work: Subject) -> Figures:
    """Our kernels with int8 activations differ from float by no more than int8 rounding does."""
    if work.config.activation != "int8":
        raise Skipped("activations are float")
    got = work.onnx(True, traced=True).trace(work.sample(TRACED))
    rounded = _rounded_trace(work)
    rows = parity.noise_differences(got, work.float_trace, rounded, NOISE_FACTOR, NOISE_FLOOR)
    parity.require("int8 activations against PyTorch in float", rows, "A kernel is wrong: please report it.")
    torch_noise = parity.noise(rounded[LOGITS], work.float_trace[LOGITS])
    return {"logits_noise": rows[-1].error, "logits_noise_in_pytorch": torch_noise, "allowed": rows[-1].allowed}


def check_answers(work: Subject) -> Figures:
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


def check_metric(work: Subject) -> Figures:
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


def check_effect(work: Subject) -> Figures:
    """The adapter changes the answers, and every one of its tensors takes part."""
    if work.merged:
        raise Skipped("merged: what of the adapter survived is measured by the merge stage")
    model, batch = work.onnx(work.library is not None, "float"), work.sample(TRACED)
    full = model.logits(batch)
    effect = parity.noise(model.logits(batch, model.without_adapter()), full)
    own_noise = parity.noise(work.shipped.logits(batch), full)
    if not effect > max(NOISE_FACTOR * own_noise, FLOAT_ERROR):
        raise VerifyError(
            f"effect: turning the adapter off changes the logits by {effect:.3g}, int8 noise alone by {own_noise:.3g}: "
            "the device could not tell the tuned model from the base. Train longer, or take --activation float."
        )
    zeros = {name: np.zeros_like(tensor) for name, tensor in work.tensors.items()}
    idle = [name for name, zero in zeros.items() if np.array_equal(model.logits(batch, {name: zero}), full)]
    if idle:
        raise VerifyError(
            f"effect: {len(idle)} of {len(zeros)} adapter tensors change nothing when set to zero: "
            f"{', '.join(idle[:4])}. They are zero or the graph does not use them."
        )
    return {"adapter_effect": effect, "shipped_noise": own_noise, "tensors_in_use": len(zeros)}


def check_device(work: Subject) -> Figures:
    """The target's emulated CPUs, with its library and its wheel, compute what this machine does."""
    from edgepeft.deploy import emulator
    from edgepeft.deploy.targets import load_target

    target, machine = load_target(work.config.target), emulator.available()
    if not target.emulate:
        raise Skipped(f"target {target.name} needs no emulation")
    if machine is None:
        raise Skipped(f"no emulator: {emulator.missing()}")
    if work.library is None:
        raise Skipped(work.why_no_library)
    figures: Figures = {"onnxruntime": target.onnxruntime}
    with _portable(work, target.os_arch) as (models, library):
        for cpu in target.emulate:
            figures[cpu] = _compare_device(work, cpu, _probe(machine, cpu, target, models, library))
    return figures


def _compare_device(work: Subject, cpu: str, found: Mapping[str, np.ndarray]) -> Figures:
    """Hold an emulated CPU's logits against those of this machine."""
    batch = work.sample(DEVICE_TRACED)
    wanted = work.onnx(True, "float").logits(batch)
    error = parity.largest_error(found["float"], wanted)
    rows = [parity.Difference(f"{cpu}, float activations", error, FLOAT_ERROR)]
    here = parity.noise(work.onnx(True, "int8").logits(batch), wanted)
    there = parity.noise(found["int8"], wanted)
    rows.append(parity.Difference(f"{cpu}, int8 activations", there, max(NOISE_FACTOR * here, NOISE_FLOOR)))
    parity.require("emulated device against this machine", rows, "A kernel for this CPU is wrong: please report it.")
    return {"float_error": error, "int8_noise": there, "int8_noise_here": here}


@contextlib.contextmanager
def _portable(work: Subject, os_arch: str) -> Iterator[tuple[dict[str, Path], Path]]:
    """Yield the model in both activations, as files, and the device's library, with inputs.npz beside them."""
    from edgepeft.deploy.compile import LIBRARY, cross_library

    with tempfile.TemporaryDirectory(dir=work.out) as name:
        place, models = Path(name), {}
        shutil.copytree(work.folder, place, dirs_exist_ok=True, copy_function=_link)
        for activation in ("float", "int8"):
            models[activation] = place / f"{activation}.onnx"
            models[activation].write_bytes(parity.model_bytes(work.folder, activation))
        np.savez(place / "inputs.npz", **work.sample(DEVICE_TRACED))  # type: ignore[arg-type]  # numpy's stubs
        yield models, cross_library(os_arch, place / LIBRARY)


def _link(source: str, dest: str) -> None:
    """Put a file in a second place, without a copy where the file system can."""
    try:
        os.link(source, dest)
    except OSError:
        shutil.copyfile(source, dest)


def _probe(machine: Any, cpu: str, target: Any, models: Mapping[str, Path], library: Path) -> dict[str, np.ndarray]:
    """Return the logits an emulated CPU computes per model. Raises VerifyError with what it said when it dies."""
    inputs = library.with_name("inputs.npz")
    argv = [probe.__file__, str(library), str(inputs), *map(str, models.values())]
    try:
        machine.python(cpu, argv, onnxruntime=target.onnxruntime)
    except EdgePeftError as error:
        raise VerifyError(f"device: {target.name} cannot run the exported model: {error}") from None
    found = {}
    for kind, model in models.items():
        with np.load(model.with_suffix(".npz")) as arrays:
            found[kind] = arrays[LOGITS]
    return found


CHECKS: dict[str, Callable[[Subject], Figures]] = {
    "adapter": check_adapter,
    "stock": check_stock,
    "library": check_library,
    "rounding": check_rounding,
    "answers": check_answers,
    "metric": check_metric,
    "effect": check_effect,
    "device": check_device,
}
