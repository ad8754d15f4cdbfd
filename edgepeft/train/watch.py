"""What stands beside the Trainer while it works: progress and metric lines, seals, curves, peak memory, silence."""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from edgepeft import ranks
from edgepeft.console import say
from edgepeft.errors import EdgePeftError
from edgepeft.train import checkpoints

if TYPE_CHECKING:
    import torch

    from edgepeft.adapt.methods import Method
    from edgepeft.config import Config
    from edgepeft.train.lesson import Lesson
    from edgepeft.train.tasks import Task


NO_LABEL = -100  # as the Trainer counts them
MMAP_THRESHOLD, LEAST_RETURNED_BYTES = -3, 4 << 20  # the first is mallopt's name for it
TRAINER_FIGURES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class Progress(TrainerCallback):
    """A bar on a terminal, one line per epoch, and the wall and CPU seconds spent in training steps."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.step_seconds = 0.0
        self.step_cpu_seconds = 0.0
        self.steps = 0
        self._bar: Any = None
        self._began = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        from tqdm import tqdm

        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="  train", unit="step", file=sys.stderr,
            disable=None, leave=False,
        )  # fmt: skip

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._began = (time.perf_counter(), time.process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock and move the bar."""
        self.step_seconds += time.perf_counter() - self._began[0]
        self.step_cpu_seconds += time.process_time() - self._began[1]
        self.steps += 1
        self._bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Say the figures of the epoch."""
        metrics = given["metrics"]
        best = checkpoints.best_step(state.log_history, self.task.select, self.task.lower) == state.global_step
        loss = epoch_rows(state.log_history)[-1]["train_loss"]
        figures = f"train loss {loss:.4f}, validation {figures_text(eval_figures(metrics))}"
        self._bar.clear()
        say(f"  epoch {round(state.epoch)}/{args.num_train_epochs}: {figures}{' (best)' if best else ''}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the bar."""
        self._bar.close()


class MethodSteps(TrainerCallback):
    """Lets a method do its part: when training goes on from a checkpoint, and after each step, and in checkpoints."""

    def __init__(self, method: Method, model: Any) -> None:
        self.method, self.model = method, model

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Call the method when the tensors of a checkpoint are in place."""
        if state.global_step:
            self.method.at("restore", self.model, checkpoints.place(Path(args.output_dir), state.global_step))
            self.method.at("resume", self.model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Call the method with the number of the step, while the gradients are there."""
        self.method.at("step", self.model, state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the method add to a checkpoint before it is sealed."""
        if ranks.leads():
            self.method.at("save", self.model, checkpoints.place(Path(args.output_dir), state.global_step))


class Sealer(TrainerCallback):
    """Seals each checkpoint when the Trainer has written it, in every process its part."""

    def __init__(self, work: Path, task: Task) -> None:
        self.work, self.task = work, task

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the checkpoint."""
        ranks.wait()
        best = checkpoints.best_step(state.log_history, self.task.select, self.task.lower)
        if ranks.leads():
            checkpoints.seal(self.work, state.global_step, best)


class GuardedLoss:
    """The task's loss; stops training, with the step and a way out, when it is not finite.

    A batch weighs as many labels as it has of those that the whole step has, in all its forward passes and processes.
    """

    def __init__(self, task: Task, config: Config, step: Callable[[], int], lesson: Lesson | None = None) -> None:
        self.task, self.config, self.step, self.lesson = task, config, step, lesson

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the batch's share of the step's mean loss. Raises EdgePeftError when it is not finite."""
        loss = self.task.loss(outputs[0], labels)
        if self.lesson is not None:
            loss = self.lesson.mixed(loss, outputs)
        if num_items_in_batch is not None:
            loss = loss * ((labels != NO_LABEL).sum() / num_items_in_batch)
        if not math.isfinite(loss.item()):
            rate, alpha = self.config.learning_rate, self.config.alpha
            raise EdgePeftError(
                f"training step {self.step() + 1}: expected a finite loss, found {loss.item()}. Lower the learning "
                f"rate (--learning-rate {rate / 10:g} instead of {rate:g}) or alpha ({alpha:g})."
            )
        return loss


def eval_figures(entry: Mapping[str, float]) -> dict[str, float]:
    """Return the loss and the task's metrics of an evaluation, without the speeds that the Trainer adds."""
    found = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
    return {name: value for name, value in found.items() if name not in TRAINER_FIGURES}


def figures_text(figures: Mapping[str, float]) -> str:
    """Return figures as words: "loss 0.5, accuracy 0.8"."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())


def epoch_rows(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return one row per evaluated epoch: the mean training loss since the one before and the validation figures."""
    rows: list[dict[str, float]] = []
    losses: list[float] = []
    for entry in log_history:
        if "loss" in entry:
            losses.append(entry["loss"])
        elif "eval_loss" in entry:
            figures = eval_figures(entry)
            mean = sum(losses) / len(losses) if losses else math.nan
            rows.append({"epoch": entry["epoch"], "step": entry["step"], "train_loss": mean, **figures})
            losses = []
    return rows


def tensorboard(folder: Path) -> list[TrainerCallback]:
    """Return the callback that logs for TensorBoard below `folder`, or none when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback
    except ImportError:
        return []
    return [TensorBoardCallback(SummaryWriter(log_dir=str(folder)))]


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw losses and metrics over the epochs as a PNG, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 3), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    metrics = [name for name in rows[0] if name not in ("epoch", "step", "train_loss", "loss", "perplexity")]
    for axis, names in zip(figure.subplots(1, 2), (["train_loss", "loss"], metrics), strict=True):
        for name in names:
            label = "validation_loss" if name == "loss" else name
            axis.plot(epochs, [row[name] for row in rows], marker=".", label=label.replace("_", " "))
        axis.set_xlabel("epoch")
        axis.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def reset_peak_resident() -> None:
    """Begin measuring the peak anew where the kernel allows it (Linux)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")


def peak_resident_bytes() -> int:
    """Return the process's largest resident size since the reset (VmHWM), or since it began elsewhere."""
    with contextlib.suppress(OSError), open("/proc/self/status") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def frugal() -> Iterator[None]:
    """Give freed tensors back to the system at once, where the C library is glibc.

    It keeps what is below a threshold that grows to 32 MiB, and the next tensors do not fit the gaps: a step of a
    24-layer model held 3 GB that way. Asking the system each time takes a tenth to a third more processor time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(MMAP_THRESHOLD, LEAST_RETURNED_BYTES)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, 32 << 20)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings, tables and bars off the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
