"""The verify stage: the exported files, run by the real runtime, must do what was trained. Any miss stops the build.

| check | what runs | against | allowed |
|---|---|---|---|
| adapter | PyTorch, the exported adapter | the trained one, rounded to float16 | float32 rounding, per layer |
| stock | function bodies, stock ONNX Runtime | PyTorch, same bits and adapter | float32 rounding, per layer |
| library | our kernels, float activations | the same | the same |
| rounding | our kernels, int8 activations | PyTorch in float | twice the noise of PyTorch rounding to int8, per layer |
| answers, metric | of a task: `label_checks`, and steps: `token_checks` | | |
| effect | adapter off; each of its tensors set to zero | the model itself | more than int8 noise; any difference |
| gpu | a GPU, every node on it, each way the target has | stock, on the CPU | float32 rounding, or digits' |
| device | emulated CPUs of the target with its pinned wheel | the same arrays here | as `stock` and `rounding` |

A check that cannot run here (no compiler, no emulator, a merged adapter) is written down as skipped, with the reason.
Layers are compared on a few real sentences of different lengths, padding included. report.json holds every figure.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.artifact import Run, write_json
from edgepeft.console import say
from edgepeft.errors import EdgePeftError, TargetError, VerifyError
from edgepeft.export import label_checks, parity, probe, token_checks
from edgepeft.export.parity import FLOAT_ERROR, LOGITS, Figures, Trace
from edgepeft.export.subject import SUBJECTS, TRACED, Skipped, Subject
from edgepeft.runtime import rewrite
from edgepeft.runtime.library import version_tuple

if TYPE_CHECKING:
    from edgepeft.config import Config
    from edgepeft.deploy.targets import Target

HALF_NOISE = 1e-2  # of the logits, by keeping the adapter in float16; measured: 4e-5 to 1e-3
NOISE_FACTOR = 2.0
NOISE_FLOOR = 1e-3
DIGITS_ERROR = 5e-3  # of the logits, by an adapter in 4-bit digits, which errs by 1e-3 of what it changes
DEVICE_TRACED = 2


def verify(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Check the exported folder of a run, write report.json and return its figures.

    Raises VerifyError that names the check, the layer or tensor where it starts, what was expected and what was found.
    """
    work = SUBJECTS[config.task].open(config, run, out)
    report: dict[str, Figures] = {}
    for name, check in CHECKS[config.task].items():
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
    """The exported adapter computes what the trained one does: exactly but for its rounding to float16.

    The device form is made from the trained adapter twice more: rounded, as it was exported, which has to be the same,
    and in float32, which has to compute what PEFT trained.
    """
    if work.merged:
        raise Skipped("merged: there is no adapter file")
    exported = work.float_trace
    work.adapter("trained")
    trained = parity.torch_trace(work.model, work.sample(TRACED), work.layers)
    advice = "The adapter's file does not hold what was trained: run 'edgepeft export' again."
    worst = 0.0
    for exact, got, want, what in (
        (False, exported, None, "exported adapter against the trained one"),
        (True, None, trained, "exported form in float32 against what PEFT trained"),
    ):
        with tempfile.TemporaryDirectory(dir=work.out) as name:
            anew = work.device_form(Path(name), exact)
        rows = parity.differences(got or anew, want or anew, FLOAT_ERROR)
        worst = max(worst, parity.require(what, rows, advice))
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
    idle = _idle(model, work.sample(DEVICE_TRACED), work.tensors)  # a run for each: a few tokens tell as much
    if idle:
        raise VerifyError(
            f"effect: {len(idle)} of {len(work.tensors)} adapter tensors change nothing when set to zero: "
            f"{', '.join(idle[:4])}. They are zero or the graph does not use them."
        )
    return {"adapter_effect": effect, "shipped_noise": own_noise, "tensors_in_use": len(work.tensors)}


def _idle(model: parity.OnnxModel, batch: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Return the tensors that are zero, or on which no logits [M, ...] hang.

    Zeros in the place of one that is in use may change none: a bias of the keys adds the same to all scores of a query,
    and a softmax takes it away again. NaN in its place tells, also of a bias that is zero: it takes the base's place.
    """
    full, idle = model.logits(batch), []
    for name, tensor in tensors.items():
        if np.array_equal(model.logits(batch, {name: np.zeros_like(tensor)}), full):
            told = tensor.any() or name.endswith(".bias")
            used = told and not np.isfinite(model.logits(batch, {name: np.full_like(tensor, np.nan)})).all()
            idle += [] if used else [name]
    return idle


def check_gpu(work: Subject) -> Figures:
    """A GPU, a software one where there is no other, computes what the CPU does with every node on it, each way."""
    from edgepeft.deploy.targets import load_target

    ways = load_target(work.config.target).gpu
    if not ways:
        raise Skipped(f"target {work.config.target} has no GPU")
    name = _choose_gpu()
    found, without = {}, {}
    for way in ways:
        try:
            found[way] = GPU_RUNS[way](work)
        except Skipped as reason:
            without[f"{way}_skipped"] = str(reason)
    if not found:
        raise Skipped("; ".join(without.values()))
    rows = [parity.Difference(f"{LOGITS}, {way}", error, bound) for way, (error, bound) in found.items()]
    parity.require("the GPU against the CPU", rows, "This driver or the provider is wrong: please report it.")
    errors: Figures = {f"{way}_float_error": error for way, (error, _) in found.items()}
    if "vulkan" in found:
        errors["vulkan_float16_error"] = _float16_error(work)
    return {"gpu": name, **errors, **without, "nodes_on_cpu": 0}


def _choose_gpu() -> str:
    """Return the name of this machine's GPU, or of the software GPU that is used from now on where it has none.

    A process meets a GPU once, and from then on no other: so another process looks.
    """
    from edgepeft.deploy import softgpu

    looked = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False)
    if looked.returncode == 0 and (name := looked.stdout.strip()):
        return name
    if not (names := softgpu.available()):
        return "this machine's"
    softgpu.use(names[-1])
    return names[-1]


def _gpu_error(work: Subject, session: Any, inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> float:
    """Return how far a GPU's logits are from the CPU's at most."""
    stock, worst = work.onnx(False, "float").session, 0.0
    for feeds in work.device_runs(DEVICE_TRACED):
        wanted = stock.run([LOGITS], feeds)[0]
        worst = max(worst, parity.largest_error(session.run([LOGITS], inputs(feeds))[0], wanted))
    return worst


def _on_webgpu(work: Subject) -> tuple[float, float]:
    """Return the error of WebGPU, and what it may be."""
    from edgepeft.runtime import webgpu

    if reason := webgpu.missing():
        raise Skipped(f"{reason}; {SOFT_GPU}")
    session = webgpu.open_session(work.folder)
    error = _gpu_error(work, session, functools.partial(webgpu.inputs, session))
    return error, DIGITS_ERROR if webgpu.in_digits(session) else FLOAT_ERROR


def _on_vulkan(work: Subject) -> tuple[float, float]:
    from edgepeft.deploy.compile import host_vulkan_library
    from edgepeft.runtime import vulkan

    library = host_vulkan_library()
    if reason := vulkan.missing(library):
        raise Skipped(f"{reason}; {SOFT_GPU}")
    return _gpu_error(work, vulkan.open_session(library, work.folder / "model.onnx"), dict), FLOAT_ERROR


def _float16_error(work: Subject) -> float | str:
    """Return the error of Vulkan with precision float16, which a user may choose, or why there is none."""
    from edgepeft.deploy.compile import host_vulkan_library
    from edgepeft.runtime import vulkan

    def inputs(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {
            n: array.astype(np.float16) if n.startswith(rewrite.PAST.decode()) else array for n, array in feeds.items()
        }

    try:
        session = vulkan.open_session(host_vulkan_library(), work.folder / "model.onnx", "float16")
    except TargetError as error:
        return str(error)
    return _gpu_error(work, session, inputs)


# Prints the name of a GPU that does not compute on the CPU.
LOOK = """
from edgepeft.deploy.compile import host_vulkan_library
from edgepeft.runtime import vulkan

library = host_vulkan_library()
if not vulkan.missing(library) and not vulkan.about(library).startswith(vulkan.SOFTWARE):
    print(vulkan.device_name(library))
"""
SOFT_GPU = "python -m edgepeft.deploy.softgpu install sets up one that computes on the CPU"
GPU_RUNS = {"webgpu": _on_webgpu, "vulkan": _on_vulkan}


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
    with _portable(work, target) as (models, library):
        for cpu in target.emulate:
            figures[cpu] = _compare_device(work, cpu, _probe(machine, cpu, target, models, library))
    return figures


def _compare_device(work: Subject, cpu: str, found: Mapping[str, list[np.ndarray]]) -> Figures:
    """Hold an emulated CPU's logits against those of this machine, run by run."""
    floats, ints = (work.onnx(True, activation) for activation in ("float", "int8"))
    error = there = here = allowed = 0.0
    for run, batch in enumerate(work.device_runs(DEVICE_TRACED)):
        wanted = floats.session.run([LOGITS], batch)[0]
        error = max(error, parity.largest_error(found["float"][run], wanted))
        own = parity.noise(ints.session.run([LOGITS], batch)[0], wanted)
        there, here = max(there, parity.noise(found["int8"][run], wanted)), max(here, own)
        allowed = max(NOISE_FACTOR * here, NOISE_FLOOR)
    rows = [
        parity.Difference(f"{cpu}, float activations", error, FLOAT_ERROR),
        parity.Difference(f"{cpu}, int8 activations", there, allowed),
    ]
    parity.require("emulated device against this machine", rows, "A kernel for this CPU is wrong: please report it.")
    return {"float_error": error, "int8_noise": there, "int8_noise_here": here}


@contextlib.contextmanager
def _portable(work: Subject, target: Target) -> Iterator[tuple[dict[str, Path], Path]]:
    """Yield the model in both activations, as files, and the device's library, with inputs.npz beside them."""
    from edgepeft.deploy.compile import LIBRARY, cross_library

    with tempfile.TemporaryDirectory(dir=work.out) as name:
        place, models = Path(name), {}
        shutil.copytree(work.folder, place, dirs_exist_ok=True, copy_function=_link)
        for activation in ("float", "int8"):
            models[activation] = place / f"{activation}.onnx"
            models[activation].write_bytes(_for_release(parity.model_bytes(work.folder, activation), target))
        runs = enumerate(work.device_runs(DEVICE_TRACED))
        arrays = {f"{run}/{name}": array for run, feeds in runs for name, array in feeds.items()}
        np.savez(place / "inputs.npz", **arrays)  # type: ignore[arg-type]  # numpy's stubs
        yield models, cross_library(target.os_arch, place / LIBRARY)


def _for_release(model: bytes, target: Target) -> bytes:
    """Return a model as the device's runtime hands it to the target's ONNX Runtime."""
    old = version_tuple(target.onnxruntime) < rewrite.NEW_WINDOWS
    return rewrite.with_older_windows(model) if old else model


def _link(source: str, dest: str) -> None:
    """Put a file in a second place, without a copy where the file system can."""
    try:
        os.link(source, dest)
    except OSError:
        shutil.copyfile(source, dest)


def _probe(
    machine: Any, cpu: str, target: Target, models: Mapping[str, Path], library: Path
) -> dict[str, list[np.ndarray]]:
    """Return the logits of every run that an emulated CPU computes per model.

    Raises VerifyError with what it said when it dies.
    """
    inputs = library.with_name("inputs.npz")
    argv = [probe.__file__, str(library), str(inputs), *map(str, models.values())]
    try:
        machine.python(cpu, argv, onnxruntime=target.onnxruntime)
    except EdgePeftError as error:
        raise VerifyError(f"device: {target.name} cannot run the exported model: {error}") from None
    found = {}
    for kind, model in models.items():
        with np.load(model.with_suffix(".npz")) as arrays:
            found[kind] = [arrays[f"{run}/{LOGITS}"] for run in range(len(arrays.files) - 1)]
    return found


LAYERS: dict[str, Callable[[Any], Figures]] = {
    "adapter": check_adapter,
    "stock": check_stock,
    "library": check_library,
    "rounding": check_rounding,
}
WHOLE: dict[str, Callable[[Any], Figures]] = {"effect": check_effect, "gpu": check_gpu, "device": check_device}
CHECKS = {
    "text-classification": {**LAYERS, **label_checks.CHECKS, **WHOLE},
    "text-generation": {**LAYERS, **token_checks.CHECKS, **WHOLE},
}
