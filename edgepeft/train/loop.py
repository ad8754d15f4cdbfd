"""Train an adapter on the packed backbone: what is trained against is what will be shipped.

    quantized folder ─► model with packed linears ─► PEFT adapter + head ─► Trainer ─► best checkpoint ─► adapter folder

The backbone stays in its packed bits (a digest taken before and after says so) and each linear dequantizes them as it
needs them; only the adapter and, where the task has one, its head have gradients, in float32. AdamW, linear decay after
a warm-up, one evaluation and one checkpoint per epoch, the best checkpoint by the task's metric kept. The loss of a
step is the mean over all its labels, whatever number of forward passes and processes (`ranks`) share them.

Every random choice hangs on the seed and each checkpoint holds the generators' states, so a training that was killed
and went on ends with the same bytes as one that was not (`checkpoints`).

Memory: packed bits, 16 bytes per trained parameter (itself, gradient, AdamW), and the activations of one forward pass,
which `--batch-size` and `--max-length` bound; with `--checkpointing` those of one layer, for half as much time again.
Logits over a vocabulary do not exist (`losses`). A teacher in float speaks before the first step (`teacher`).

Packed linears multiply float activations, or with `--train-activation int8` those the shipped op makes of them, by its
kernel; gradients pass both alike. A backbone that outgrows one machine is shared among processes (`shards`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft import ranks
from edgepeft.adapt import peft_files
from edgepeft.adapt.methods import METHODS
from edgepeft.artifact import Run, read_json, read_tensors, write_json
from edgepeft.backbone.check import text_limit
from edgepeft.backbone.families import Family, family_of
from edgepeft.console import say
from edgepeft.errors import ConfigError, blaming
from edgepeft.train import checkpoints
from edgepeft.train.batches import LengthBatches, pack
from edgepeft.train.data import Splits, load_splits
from edgepeft.train.tasks import TASKS

if TYPE_CHECKING:
    import torch

    from edgepeft.config import Config

WARMUP_SHARE = 0.06
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
LOGS_PER_EPOCH = 5


def train(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Train the adapter of a run and write its PEFT folder, training.json and curves.png to `out`.

    Returns the summary: test and validation figures, size, speed, peak memory. Raises DataError, ModelError or
    EdgePeftError for what the user can mend.
    """
    from edgepeft.train import starts
    from edgepeft.train.attach import attach
    from edgepeft.train.teacher import check_source
    from edgepeft.train.watch import draw_curves, quiet, reset_peak_resident

    if config.adapter_from:
        return attach(config, run, out) if ranks.leads() else {}
    reset_peak_resident()
    _check_precision(config)
    splits = load_splits(config)
    quantized = run.path("quantized")
    described = read_json(quantized / "quantized.json")
    with quiet():
        tokenizer = load_tokenizer(quantized)
        check_source(config, described)
        model = adapted(_packed_model(quantized, splits, config), config)
        work = ranks.led(lambda: run.work("train", run.key))
        result = fit(model, tokenizer, splits, config, work, run.folder / "logs")
    if not ranks.leads():
        return {}
    settings = _settings(model, config, _family(model).heads)
    tensors = read_tensors(checkpoints.place(work, result["best_step"]) / peft_files.TENSORS)
    settings, tensors = starts.shipped(model, config, settings, tensors)
    peft_files.write(out, settings, tensors, described["base_digest"], described["format"])
    draw_curves(result["epochs"], out / "curves.png")
    report = {**result, "labels": list(splits.labels), "config": dataclasses.asdict(config), "versions": versions()}
    write_json(out / "training.json", report)
    return {name: value for name, value in result.items() if name != "epochs"}


def fit(
    model: Any, tokenizer: Any, splits: Splits, config: Config, work: Path, logs: Path | None = None
) -> dict[str, Any]:
    """Train a PEFT model on checked splits; leave it with the best checkpoint's weights and return all figures.

    work: checkpoints of this training alone, from which an interrupted one goes on.  Of several processes the leader
    evaluates, with all the others where they share the bits, and returns the figures; the others return nothing.
    """
    from edgepeft.train.teacher import NONE, lesson_for
    from edgepeft.train.watch import Progress, epoch_rows, frugal, peak_resident_bytes

    if config.threads:
        _torch().set_num_threads(config.threads)
    task, limit = TASKS[config.task], token_limit(model, config)
    examples = {name: getattr(splits, name).encode(tokenizer, limit, name) for name in ("train", "validation")}
    tokens = sum(len(row["input_ids"]) for row in examples["train"])
    if task.packs and config.packing and not METHODS[config.method].prompt:
        examples["train"] = pack(examples["train"], limit, config.seed)
    before, began = _frozen_digest(model), time.perf_counter()
    lesson = None
    if config.teacher != NONE:
        lesson = lesson_for(model, examples["train"], splits, tokenizer, config, work)
        examples["train"] = lesson.numbered(examples["train"])
    resumed = ranks.led(lambda: checkpoints.newest(work))
    _tell_start(model, splits, resumed)
    progress = Progress(task)
    taught = task.taught(model, lesson) if lesson else contextlib.nullcontext()
    with task.answering(model), taught, frugal() if config.checkpointing else contextlib.nullcontext():
        trainer = _trainer(model, tokenizer, examples, config, work, progress, logs, resumed, lesson)
        history = _run_trainer(trainer, work, resumed)
    if not ranks.leads() and not config.shard:
        return {}
    best = checkpoints.best_step(history, task.select, task.lower)
    _load_adapter(model, checkpoints.place(work, best))
    METHODS[config.method].at("restore", model, checkpoints.place(work, best))
    if _frozen_digest(model) != before:
        raise RuntimeError("the frozen backbone changed while the adapter was trained")
    rows = epoch_rows(history)
    judged = [name for name in ("validation", "test") if len(getattr(splits, name))]
    figures = {name: evaluate(model, config, getattr(splits, name), tokenizer) for name in judged}
    if not ranks.leads():
        return {}
    steps = _steps_per_epoch(len(examples["train"]), config)
    result = {
        **figures, "best_epoch": next(round(row["epoch"]) for row in rows if row["step"] == best), "best_step": best,
        "epochs": rows, "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak_resident_bytes": peak_resident_bytes(), "seconds": round(time.perf_counter() - began, 2),
        "resumed_at_step": resumed, **_speed(progress, len(splits.train) / steps, tokens / steps),
        "examples": {name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
    }  # fmt: skip
    _tell_end(result)
    return result


def evaluate(model: Any, config: Config, split: Any, tokenizer: Any = None) -> dict[str, float]:
    """Return the task's metrics of a model on a split, and how many examples that were.

    model: any transformers or PEFT model of the task. The tokenizer is the source model's unless given.
    """
    labels = np.asarray(split.labels)
    return {**TASKS[config.task].metrics(predict(model, config, split, tokenizer), labels), "examples": len(split)}


def predict(model: Any, config: Config, split: Any, tokenizer: Any = None) -> np.ndarray:
    """Return the answers of a model to a split, in its order, as the task's metrics take them.

    float32 [M, labels], the logits; of a task without labels [M, 3], figures per row that the split becomes.
    """
    torch, task = _torch(), TASKS[config.task]
    if tokenizer is None:
        from edgepeft.backbone.load import resolve_model

        tokenizer = load_tokenizer(resolve_model(config).path)
    rows = split.encode(tokenizer, token_limit(model, config))
    size = task.eval_batch or config.batch_size
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    answers: dict[int, np.ndarray] = {}
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode(), task.answering(model):
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = task.collate([rows[i] for i in chosen], tokenizer.pad_token_id or 0)
            batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
            answers.update(zip(chosen, model(**batch)[0].float().cpu().numpy(), strict=True))
    model.train(was_training)
    return np.stack([answers[i] for i in range(len(rows))])


# --- model and data ----------------------------------------------------------------------------------------------


def _torch() -> Any:
    import torch

    return torch


def load_tokenizer(folder: Path) -> Any:
    """Return the Hugging Face tokenizer of a folder."""
    from transformers import AutoTokenizer

    with blaming(folder / "tokenizer_config.json", "Copy the tokenizer again and run 'edgepeft quantize'."):
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def token_limit(model: Any, config: Config) -> int:
    """Return the most tokens of a text, those of a prompt not among them. Raises ConfigError; see `text_limit`."""
    from edgepeft.adapt.prompts import columns

    return text_limit(config, getattr(model.config, "max_position_embeddings", None), columns(model))


def _packed_model(quantized: Path, splits: Splits, config: Config) -> Any:
    """Return the model on its packed backbone, the head drawn from the seed."""
    from transformers import set_seed

    from edgepeft.backbone.load import quantized_model
    from edgepeft.quant.linear import multiply_int8
    from edgepeft.train.shards import shard

    set_seed(config.seed)
    model = quantized_model(quantized, splits.labels, config)
    if config.train_activation == "int8":
        multiply_int8(model)
    if config.shard:
        shard(model)
    model.config.name_or_path = str(quantized)  # PEFT looks here, not on a hub, for the base's config.json
    return model


def _family(model: Any) -> Family:
    return family_of(model.config.to_dict(), "the model")


def adapted(model: Any, config: Config) -> Any:
    """Return the model as a PEFT model: an adapter on every linear of the backbone, a task's head trained in full."""
    from peft import get_peft_model

    from edgepeft.train import starts

    family, kind = _family(model), TASKS[config.task].peft_type
    linears = [name for name, module in model.named_modules() if isinstance(module, _torch().nn.Linear)]
    modules = [name for name in linears if name.startswith(f"{family.prefix}.")]
    method = METHODS[config.method]
    method.at("prepare", model, config)
    own = {id(p) for p in model.parameters()}
    peft = get_peft_model(model, method.peft_config(config, modules, family.heads, kind))
    method.at("attach", peft, config)
    loose = [name for name, p in peft.named_parameters() if p.requires_grad and id(p) in own]
    if loose and not method.trains_base:
        raise RuntimeError(f"parameters of the backbone would be trained: {', '.join(loose[:4])}")
    if config.start != "default":
        starts.begin(peft, config)
    return peft


def _frozen_digest(model: Any) -> str:
    """Return a digest of everything that training must not change; what a model works out anew is not stored in it."""
    digest, stored = hashlib.sha256(), model.state_dict()
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
    for name, tensor in sorted([*frozen, *buffers], key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(_torch().uint8).numpy())
    return digest.hexdigest()


def _load_adapter(model: Any, folder: Path) -> None:
    """Put a checkpoint's adapter and head into the model."""
    from peft import set_peft_model_state_dict

    tensors = {n: _torch().from_numpy(t.copy()) for n, t in read_tensors(folder / peft_files.TENSORS).items()}
    set_peft_model_state_dict(model, tensors)


def _settings(model: Any, config: Config, heads: Iterable[str]) -> dict[str, Any]:
    """Return adapter_config.json: what differs from PEFT's defaults, the base by name, no path of this machine."""
    peft_config = model.peft_config["default"]
    needed = {"total_step": 1} if hasattr(peft_config, "total_step") else {}
    settings, defaults = peft_config.to_dict(), type(peft_config)(**needed).to_dict()
    always = {"peft_type", "task_type", "peft_version", "r", "lora_alpha", "bias", "init_r", "total_step"}
    kept = {name: value for name, value in settings.items() if name in always or value != defaults.get(name)}
    base = Path(config.model)
    own = {"base_model_name_or_path": base.name if base.exists() else config.model, "inference_mode": True}
    return {**kept, **own, "modules_to_save": sorted(heads) or None}


# --- the Trainer -------------------------------------------------------------------------------------------------


def native_bfloat16() -> bool:
    """Tell whether this machine multiplies bfloat16 itself; elsewhere it is slower than float32."""
    if _torch().cuda.is_available():
        return bool(_torch().cuda.is_bf16_supported(including_emulation=False))
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as stream:
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(stream.read().split()))
    return False


def _check_precision(config: Config) -> None:
    """Raise ConfigError for a precision that this machine only imitates."""
    if config.precision == "bfloat16" and not native_bfloat16():
        raise ConfigError(
            "--precision bfloat16: expected a processor or GPU that multiplies bfloat16 (AVX512-BF16, AMX, ARM's "
            "bf16), found none: it would take about three times as long as float32. Take --precision float32."
        )


def _steps_per_epoch(rows: int, config: Config) -> int:
    passes = -(-rows // (config.batch_size * ranks.world()))
    return -(-passes // config.accumulation)


def _arguments(config: Config, work: Path, steps_per_epoch: int) -> Any:
    from transformers import TrainingArguments

    steps = steps_per_epoch * config.epochs
    return TrainingArguments(
        output_dir=str(work), num_train_epochs=config.epochs, per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=TASKS[config.task].eval_batch or config.batch_size,
        gradient_accumulation_steps=config.accumulation, gradient_checkpointing=config.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=config.learning_rate, lr_scheduler_type="linear",
        warmup_steps=min(max(1, int(WARMUP_SHARE * steps)), steps - 1), weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP_NORM, optim="adamw_torch", seed=config.seed, data_seed=config.seed,
        use_cpu=not _torch().cuda.is_available(),
        bf16=config.precision == "bfloat16", fp16=False, ddp_find_unused_parameters=False, ddp_broadcast_buffers=False,
        eval_strategy="epoch", save_strategy="epoch", logging_strategy="steps",
        logging_steps=max(1, steps_per_epoch // LOGS_PER_EPOCH), logging_nan_inf_filter=False, report_to=[],
        disable_tqdm=True, remove_unused_columns=False, label_names=["labels"], dataloader_pin_memory=False,
    )  # fmt: skip


def _trainer(
    model: Any, tokenizer: Any, examples: Mapping[str, list], config: Config, work: Path, progress: Any,
    logs: Path | None, resumed: int | None, lesson: Any,
) -> Any:  # fmt: skip
    from transformers import PrinterCallback, Trainer

    from edgepeft.train.watch import GuardedLoss, MethodSteps, Sealer, tensorboard

    collate = lesson.collate if lesson else TASKS[config.task].collate

    class BatchedTrainer(Trainer):
        """The Trainer on batches of like length."""

        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            batches = LengthBatches(
                [len(row["input_ids"]) for row in examples["train"]], config.batch_size, config.seed,
                lambda: round(self.state.epoch or 0), (ranks.rank(), ranks.world()),
            )  # fmt: skip
            loader = _torch().utils.data.DataLoader
            return loader(examples["train"], batch_sampler=batches, collate_fn=self.data_collator)

    task, method = TASKS[config.task], METHODS[config.method]
    steps = _steps_per_epoch(len(examples["train"]), config)
    method.at("begin", model, steps, config.epochs)
    if logs is not None and resumed is None and ranks.leads():
        shutil.rmtree(logs, ignore_errors=True)
    trainer = BatchedTrainer(
        model=model,
        args=_arguments(config, work, steps),
        optimizers=(method.at("optimizer", model, config, WEIGHT_DECAY), None),
        train_dataset=examples["train"],
        eval_dataset=sorted(examples["validation"], key=lambda row: len(row["input_ids"])),
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id or 0),
        compute_loss_func=GuardedLoss(task, config, lambda: trainer.state.global_step, lesson),
        compute_metrics=lambda found: task.metrics(np.asarray(found.predictions), np.asarray(found.label_ids)),
        callbacks=[
            MethodSteps(method, model),
            Sealer(work, task),
            *([progress, *(tensorboard(logs) if logs else [])] if ranks.leads() else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _run_trainer(trainer: Any, work: Path, resumed: int | None) -> list[dict[str, Any]]:
    """Train to the end, from a checkpoint if there is one, and return the Trainer's log."""
    source = str(checkpoints.place(work, resumed)) if resumed else None
    try:
        trainer.train(resume_from_checkpoint=source)
    except KeyboardInterrupt:
        done = checkpoints.newest(work)
        kept = f"checkpoint of step {done} kept" if done else "no epoch was finished"
        say(f"  interrupted at step {trainer.state.global_step}; {kept}. The same command goes on from there.")
        raise
    return list(trainer.state.log_history)


# --- telling -----------------------------------------------------------------------------------------------------


def _tell_start(model: Any, splits: Splits, resumed: int | None) -> None:
    sizes = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
    counts = ", ".join(f"{name} {size}" for name, size in sizes.items() if size)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kinds = f" of {len(splits.labels)} labels" if splits.labels else ""
    say(f"  {counts} examples{kinds}; training {trained:,} parameters, the backbone is frozen")
    if resumed:
        say(f"  going on from the checkpoint of step {resumed}")


def _tell_end(result: Mapping[str, Any]) -> None:
    from edgepeft.train.watch import figures_text

    split = "test" if "test" in result else "validation"
    figures = {name: value for name, value in result[split].items() if name != "examples"}
    say(f"  best epoch {result['best_epoch']}: {split} {figures_text(figures)}")
    memory = result["peak_resident_bytes"] / 2**20
    speed = result["samples_per_second"]
    say(f"  {result['seconds']:.0f} s, peak memory {memory:.0f} MiB" + (f", {speed:.0f} samples/s" if speed else ""))


def _speed(progress: Any, examples: float, tokens: float) -> dict[str, float | None]:
    """Return the speed of the training steps this process did, of so many examples and tokens each in the mean.

    Evaluation and checkpoints do not count.
    """
    if not progress.steps:
        return dict.fromkeys(("samples_per_second", "tokens_per_second", "step_ms", "step_cpu_ms"))
    wall, cpu = progress.step_seconds / progress.steps, progress.step_cpu_seconds / progress.steps
    return {
        "samples_per_second": round(examples / wall, 2),
        "tokens_per_second": round(tokens / wall, 1),
        "step_ms": round(wall * 1e3, 3),
        "step_cpu_ms": round(cpu * 1e3, 3),
    }


def versions() -> dict[str, str]:
    """Return the versions of what took part."""
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "peft")}}
