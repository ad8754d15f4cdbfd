"""Train an adapter on the packed backbone: what is trained against is what will be shipped.

    quantized folder ─► model with packed linears ─► PEFT adapter + head ─► Trainer ─► best checkpoint ─► adapter folder

The backbone stays in its packed bits (a digest taken before and after says so) and each linear dequantizes them as it
needs them; only the adapter and the head have gradients, in float32. AdamW, linear decay after a warm-up, one
evaluation and one checkpoint per epoch, the best checkpoint by the task's metric kept.

Every random choice hangs on the seed and each checkpoint holds the generators' states, so a training that was killed
and went on ends with the same bytes as one that was not (`checkpoints`).

Left out: other devices than the CPU, mixed precision, gradient accumulation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepeft.adapt import peft_files
from edgepeft.adapt.methods import METHODS
from edgepeft.artifact import Run, read_json, read_tensors, write_json
from edgepeft.backbone.families import family_of
from edgepeft.console import say
from edgepeft.errors import ConfigError
from edgepeft.train import checkpoints
from edgepeft.train.batches import LengthBatches
from edgepeft.train.data import Split, Splits, load_splits
from edgepeft.train.tasks import TASKS

if TYPE_CHECKING:
    import torch

    from edgepeft.config import Config

WARMUP_SHARE = 0.06
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
EVAL_BATCH = 64
LOGS_PER_EPOCH = 5


def train(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Train the adapter of a run and write its PEFT folder, training.json and curves.png to `out`.

    Returns the summary: test and validation figures, size, speed, peak memory. Raises DataError, ModelError or
    EdgePeftError for what the user can mend.
    """
    from edgepeft.train.watch import draw_curves, quiet, reset_peak_resident

    reset_peak_resident()
    splits = load_splits(config)
    quantized = run.path("quantized")
    described = read_json(quantized / "quantized.json")
    with quiet():
        tokenizer = load_tokenizer(quantized)
        model = adapted(_packed_model(quantized, splits, config), config)
        work = run.work("train", run.key)
        result = fit(model, tokenizer, splits, config, work, run.folder / "logs")
    settings = _settings(model, config, heads_of(model))
    tensors = read_tensors(checkpoints.place(work, result["best_step"]) / peft_files.TENSORS)
    peft_files.write(out, settings, tensors, described["base_digest"], described["format"])
    draw_curves(result["epochs"], out / "curves.png")
    report = {**result, "labels": list(splits.labels), "config": dataclasses.asdict(config), "versions": versions()}
    write_json(out / "training.json", report)
    return {name: value for name, value in result.items() if name != "epochs"}


def fit(
    model: Any, tokenizer: Any, splits: Splits, config: Config, work: Path, logs: Path | None = None
) -> dict[str, Any]:
    """Train a PEFT model on checked splits; leave it with the best checkpoint's weights and return all figures.

    work: checkpoints of this training alone, from which an interrupted one goes on.
    """
    from edgepeft.train.watch import Progress, epoch_rows, peak_resident_bytes

    if config.threads:
        _torch().set_num_threads(config.threads)
    limit = token_limit(model, config)
    examples = {name: encode(tokenizer, getattr(splits, name), limit, name) for name in ("train", "validation")}
    before, began = _frozen_digest(model), time.perf_counter()
    resumed = checkpoints.newest(work)
    _tell_start(model, splits, resumed)
    progress = Progress(TASKS[config.task])
    trainer = _trainer(model, tokenizer, examples, config, work, progress, logs, resumed)
    history = _run_trainer(trainer, work, resumed)
    best = checkpoints.best_step(history, TASKS[config.task].select)
    _load_adapter(model, checkpoints.place(work, best))
    if _frozen_digest(model) != before:
        raise RuntimeError("the frozen backbone changed while the adapter was trained")
    rows = epoch_rows(history)
    figures = {name: evaluate(model, config, getattr(splits, name), tokenizer) for name in ("validation", "test")}
    result = {
        **figures, "best_epoch": next(round(row["epoch"]) for row in rows if row["step"] == best), "best_step": best,
        "epochs": rows, "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak_resident_bytes": peak_resident_bytes(), "seconds": round(time.perf_counter() - began, 2),
        "resumed_at_step": resumed, **_speed(progress, len(splits.train), config),
        "examples": {name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
    }  # fmt: skip
    _tell_end(result)
    return result


def evaluate(model: Any, config: Config, split: Split, tokenizer: Any = None) -> dict[str, float]:
    """Return the task's metrics of a model on a split, and how many examples that were.

    model: any transformers or PEFT model of the task. The tokenizer is the source model's unless given.
    """
    labels = np.asarray(split.labels)
    return {**TASKS[config.task].metrics(predict(model, config, split, tokenizer), labels), "examples": len(split)}


def predict(model: Any, config: Config, split: Split, tokenizer: Any = None) -> np.ndarray:
    """Return the logits of a model for a split: float32 [M, labels], in the order of the split."""
    torch = _torch()
    if tokenizer is None:
        from edgepeft.backbone.load import resolve_model

        tokenizer = load_tokenizer(resolve_model(config).path)
    rows = encode(tokenizer, split, token_limit(model, config))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    logits: dict[int, np.ndarray] = {}
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(order), EVAL_BATCH):
            chosen = order[start : start + EVAL_BATCH]
            batch = TASKS[config.task].collate([rows[i] for i in chosen], tokenizer.pad_token_id or 0)
            batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
            logits.update(zip(chosen, model(**batch).logits.float().cpu().numpy(), strict=True))
    model.train(was_training)
    return np.stack([logits[i] for i in range(len(rows))])


# --- model and data ----------------------------------------------------------------------------------------------


def _torch() -> Any:
    import torch

    return torch


def load_tokenizer(folder: Path) -> Any:
    """Return the Hugging Face tokenizer of a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def token_limit(model: Any, config: Config) -> int:
    """Return max_length. Raises ConfigError when the model has fewer positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or config.max_length
    if config.max_length > positions:
        found = config.max_length
        raise ConfigError(f"--max-length: expected at most {positions}, the model's positions; found {found}.")
    return config.max_length


def encode(tokenizer: Any, split: Split, limit: int, name: str | None = None) -> list[dict[str, Any]]:
    """Turn a split into rows of token ids, cut at `limit`; tell how many were cut when the split has a name."""
    encoded = tokenizer(list(split.texts), truncation=False, verbose=False)
    cut = sum(len(ids) > limit for ids in encoded["input_ids"])
    if cut:
        encoded = tokenizer(list(split.texts), truncation=True, max_length=limit)
    if name and cut:
        say(f"  {name}: {cut} of {len(split)} texts are longer than {limit} tokens and were cut (--max-length)")
    fields = [field for field in ("input_ids", "token_type_ids", "attention_mask") if field in encoded]
    return [{**{f: encoded[f][i] for f in fields}, "labels": label} for i, label in enumerate(split.labels)]


def _packed_model(quantized: Path, splits: Splits, config: Config) -> Any:
    """Return the model on its packed backbone, the head drawn from the seed."""
    from transformers import set_seed

    from edgepeft.backbone.load import quantized_model

    set_seed(config.seed)
    model = quantized_model(quantized, splits.labels, config)
    model.config.name_or_path = str(quantized)  # PEFT looks here, not on a hub, for the base's config.json
    return model


def heads_of(model: Any) -> tuple[str, ...]:
    """Return the modules that lie outside the backbone and are trained in full."""
    return family_of(model.config.to_dict(), "the model").heads


def adapted(model: Any, config: Config) -> Any:
    """Return the model as a PEFT model: an adapter on every linear of the backbone, the head trained in full."""
    from peft import get_peft_model

    heads, kind = heads_of(model), TASKS[config.task].peft_type
    linears = [name for name, module in model.named_modules() if isinstance(module, _torch().nn.Linear)]
    modules = [name for name in linears if name.split(".")[0] not in heads]
    own = {id(p) for p in model.parameters()}
    peft = get_peft_model(model, METHODS[config.method].peft_config(config, modules, heads, kind))
    loose = [name for name, p in peft.named_parameters() if p.requires_grad and id(p) in own]
    if loose:
        raise RuntimeError(f"parameters of the backbone would be trained: {', '.join(loose[:4])}")
    return peft


def _frozen_digest(model: Any) -> str:
    """Return a digest of everything that training must not change."""
    digest = hashlib.sha256()
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    for name, tensor in sorted([*frozen, *model.named_buffers()], key=lambda item: item[0]):
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
    settings, defaults = peft_config.to_dict(), type(peft_config)().to_dict()
    always = {"peft_type", "task_type", "peft_version", "r", "lora_alpha", "bias"}
    kept = {name: value for name, value in settings.items() if name in always or value != defaults.get(name)}
    base = Path(config.model)
    own = {"base_model_name_or_path": base.name if base.exists() else config.model, "inference_mode": True}
    return {**kept, **own, "modules_to_save": sorted(heads)}


# --- the Trainer -------------------------------------------------------------------------------------------------


def _arguments(config: Config, work: Path, steps_per_epoch: int) -> Any:
    from transformers import TrainingArguments

    steps = steps_per_epoch * config.epochs
    return TrainingArguments(
        output_dir=str(work), num_train_epochs=config.epochs, per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=EVAL_BATCH, learning_rate=config.learning_rate, lr_scheduler_type="linear",
        warmup_steps=min(max(1, int(WARMUP_SHARE * steps)), steps - 1), weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP_NORM, optim="adamw_torch", seed=config.seed, data_seed=config.seed,
        use_cpu=not _torch().cuda.is_available(),
        bf16=False, fp16=False, eval_strategy="epoch", save_strategy="epoch", logging_strategy="steps",
        logging_steps=max(1, steps_per_epoch // LOGS_PER_EPOCH), logging_nan_inf_filter=False, report_to=[],
        disable_tqdm=True, remove_unused_columns=False, label_names=["labels"], dataloader_pin_memory=False,
    )  # fmt: skip


def _trainer(
    model: Any, tokenizer: Any, examples: Mapping[str, list], config: Config, work: Path, progress: Any,
    logs: Path | None, resumed: int | None,
) -> Any:  # fmt: skip
    from transformers import PrinterCallback, Trainer

    from edgepeft.train.watch import GuardedLoss, Sealer, tensorboard

    class BatchedTrainer(Trainer):
        """The Trainer on batches of like length."""

        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            batches = LengthBatches(
                [len(row["input_ids"]) for row in examples["train"]], config.batch_size, config.seed,
                lambda: round(self.state.epoch or 0),
            )  # fmt: skip
            loader = _torch().utils.data.DataLoader
            return loader(examples["train"], batch_sampler=batches, collate_fn=self.data_collator)

    task = TASKS[config.task]
    if logs is not None and resumed is None:
        shutil.rmtree(logs, ignore_errors=True)
    trainer = BatchedTrainer(
        model=model,
        args=_arguments(config, work, -(-len(examples["train"]) // config.batch_size)),
        train_dataset=examples["train"],
        eval_dataset=sorted(examples["validation"], key=lambda row: len(row["input_ids"])),
        data_collator=lambda rows: task.collate(rows, tokenizer.pad_token_id or 0),
        compute_loss_func=GuardedLoss(task, config, lambda: trainer.state.global_step),
        compute_metrics=lambda found: task.metrics(np.asarray(found.predictions), np.asarray(found.label_ids)),
        callbacks=[progress, Sealer(work, task), *(tensorboard(logs) if logs else [])],
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
    counts = ", ".join(f"{name} {len(getattr(splits, name))}" for name in ("train", "validation", "test"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"  {counts} examples of {len(splits.labels)} labels; training {trained:,} parameters, the backbone is frozen")
    if resumed:
        say(f"  going on from the checkpoint of step {resumed}")


def _tell_end(result: Mapping[str, Any]) -> None:
    from edgepeft.train.watch import figures_text

    test = {name: value for name, value in result["test"].items() if name != "examples"}
    say(f"  best epoch {result['best_epoch']}: test {figures_text(test)}")
    memory = result["peak_resident_bytes"] / 2**20
    speed = result["samples_per_second"]
    say(f"  {result['seconds']:.0f} s, peak memory {memory:.0f} MiB" + (f", {speed:.0f} samples/s" if speed else ""))


def _speed(progress: Any, examples: int, config: Config) -> dict[str, float | None]:
    """Return the speed of the training steps this process did; evaluation and checkpoints do not count."""
    if not progress.steps:
        return {"samples_per_second": None, "step_ms": None, "step_cpu_ms": None}
    wall, cpu = progress.step_seconds / progress.steps, progress.step_cpu_seconds / progress.steps
    mean_batch = examples / -(-examples // config.batch_size)
    return {
        "samples_per_second": round(mean_batch / wall, 2),
        "step_ms": round(wall * 1e3, 3),
        "step_cpu_ms": round(cpu * 1e3, 3),
    }


def versions() -> dict[str, str]:
    """Return the versions of what took part."""
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "peft")}}
