"""Who teaches, and the writing down of what it says about the training rows before the student trains.

| --teacher | who | teaches |
|---|---|---|
| none | | |
| self | the float backbone of the model itself, untuned | hidden states; of a language model the next tokens too |
| tuned | the float backbone, tuned first on the same data, by the same settings | answers, hidden states |
| a folder | a model of the same task, tokens and labels, of any size | answers, hidden states |

`self` gives back what quantization took, in the words of the task; `tuned` and a folder teach the task as well. A
classifier's backbone has no classes yet, so there `self` teaches hidden states alone.

Memory: the float teacher is held while it is tuned or speaks, beside the student's packed bits, and is gone before the
student's first step. What it says is written once, whole or not at all, below the training's work folder: float32
[labels] per text, float16 [K] per target of a language model, and with --lesson-hidden float16 [layers, K] per position
of at most MATCHED layers. A training that goes on finds it there; so is the tuned teacher's own training resumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepeft import ranks
from edgepeft.artifact import staging, write_json
from edgepeft.backbone.decoder import describe
from edgepeft.backbone.families import check_task, family_of
from edgepeft.backbone.load import ModelSource, open_folder, resolve_model
from edgepeft.config import teacher_folder
from edgepeft.console import progress, say
from edgepeft.errors import ArtifactError, ConfigError, ModelError, blaming
from edgepeft.train.chats import IGNORED
from edgepeft.train.lesson import ABOUT, ANSWERS, HEAD, HIDDEN, STARTS, Lesson
from edgepeft.train.tasks import TASKS

if TYPE_CHECKING:
    from edgepeft.config import Config
    from edgepeft.train.data import Splits

Row = Mapping[str, Any]
NONE, SELF, TUNED = "none", "self", "tuned"
MATCHED = 4  # layers whose hidden states are compared, evenly spaced, the last one among them
LARGEST_HALF = 65504.0


def lesson_for(
    student: Any, rows: Sequence[Row], splits: Splits[Any], tokenizer: Any, config: Config, work: Path
) -> Lesson:
    """Return what the configured teacher says about the training rows, as `batches.pack` left them.

    work: where the teacher trains and what it says is kept. Raises ConfigError or ModelError for a teacher that cannot
    teach this student.
    """
    place = work / "lesson"
    if not ranks.led(lambda: (place / ABOUT).exists()):
        teacher = _teacher(splits, tokenizer, config, work / "teacher")
        ranks.led(lambda: _write(place, teacher, student, rows, tokenizer, config))
    return Lesson.open(place, config)


def check_source(config: Config, described: Mapping[str, Any]) -> None:
    """Raise ArtifactError where training reads the float model and its folder holds other weights by now.

    described: quantized.json.  Raises ConfigError for a start from weights whose columns a solver has scaled.
    """
    if config.teacher not in (SELF, TUNED) and config.start == "default":
        return
    base_digest = described["source_digest"]
    if config.start != "default" and base_digest != described["base_digest"]:
        raise ConfigError(
            f"--start {config.start}: expected packed weights of the float ones, found columns that --solver "
            f"{described['solver']} scaled. Take --start default, or --solver gptq."
        )
    source = resolve_model(config)
    if source.digest != base_digest:
        raise ArtifactError(
            f"{source.path}: expected the weights that were quantized ({base_digest[:12]}…), found others "
            f"({source.digest[:12]}…). Run 'edgepeft quantize' again."
        )


# --- the teacher ---------------------------------------------------------------------------------------------------


def _teacher(splits: Splits[Any], tokenizer: Any, config: Config, work: Path) -> Any:
    """Return the float teacher, ready to answer."""
    from edgepeft.train import loop

    if folder := teacher_folder(config):
        return _other_teacher(folder, splits.labels, tokenizer, config)
    model = float_model(resolve_model(config), splits.labels, config)
    if config.teacher == TUNED:
        say("  the teacher: the same training on the float backbone first")
        work.mkdir(exist_ok=True)
        config = config.replace(teacher=NONE, start="default")
        model = loop.adapted(model, config)
        loop.fit(model, tokenizer, splits, config, work)
        say("  the student:")
    return model.eval()


def float_model(source: ModelSource, labels: Sequence[str], config: Config) -> Any:
    """Return the task model in float32; a head that the checkpoint lacks is drawn."""
    import transformers

    from edgepeft.train.watch import quiet

    auto_class = getattr(transformers, TASKS[config.task].auto_class)
    how: dict[str, Any] = {"num_labels": len(labels)} if labels else {}
    if source.settings.get("attn_logit_softcapping"):
        how["attn_implementation"] = "eager"
    with quiet(), blaming(source.path / "config.json", "Save the model again with transformers."):
        return auto_class.from_pretrained(str(source.path), dtype=torch.float32, local_files_only=True, **how)


def _other_teacher(folder: Path, labels: Sequence[str], tokenizer: Any, config: Config) -> Any:
    """Return the model of another folder, its classes in our order. Raises ModelError for other tokens or labels."""
    from edgepeft.train.loop import load_tokenizer, token_limit

    source = open_folder(folder)
    check_task(family_of(source.settings, str(folder)), config.task, str(folder))
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ModelError(f"{folder}: expected a teacher with the student's tokens, found another vocabulary.")
    theirs = {str(name): int(i) for i, name in (source.settings.get("id2label") or {}).items()}
    if missing := [label for label in labels if label not in theirs]:
        raise ModelError(
            f"{folder}: expected a teacher that knows the labels of the data; its config.json lacks {len(missing)} of "
            f"{len(labels)}: {', '.join(missing[:4])}. Give a model trained on them, or take --teacher tuned."
        )
    model = float_model(source, list(theirs), config)
    token_limit(model, config)
    if labels:
        _check_head(source, model)
        _reorder(model, [theirs[label] for label in labels])
    return model.eval()


def _check_head(source: ModelSource, model: Any) -> None:
    """Raise ModelError for a head that is not in the checkpoint: transformers would have drawn it."""
    from edgepeft.backbone.checkpoint import tensor_shapes

    heads = family_of(source.settings, str(source.path)).heads
    names = tensor_shapes(source)
    if missing := [head for head in heads if f"{head}.weight" not in names]:
        raise ModelError(f"{source.path}: expected a teacher with a trained head, found no {', '.join(missing)}.")


def _reorder(model: Any, order: Sequence[int]) -> None:
    """Let a classifier's logits come in another order, or fewer of them."""
    head = model.classifier
    head.weight = torch.nn.Parameter(head.weight.detach()[list(order)])
    head.bias = torch.nn.Parameter(head.bias.detach()[list(order)])


# --- what it says --------------------------------------------------------------------------------------------------


def matched_layers(student: int, teacher: int) -> list[tuple[int, int]]:
    """Return pairs of layers, counted from 1, evenly spaced: the last of both, and those at equal shares of depth."""
    count = min(MATCHED, student, teacher)
    own = [math.ceil(student * i / count) for i in range(1, count + 1)]
    return [(layer, max(1, round(layer * teacher / student))) for layer in own]


def _write(place: Path, teacher: Any, student: Any, rows: Sequence[Row], tokenizer: Any, config: Config) -> None:
    """Write the lesson folder."""
    causal = "labels" in rows[0] and isinstance(rows[0]["labels"], list)
    speaks = config.lesson_weight > 0 and (causal or config.teacher != SELF)
    pairs = matched_layers(*(model.config.num_hidden_layers for model in (student, teacher)))
    _check_sizes(student.config, teacher.config, config, causal)
    starts = np.cumsum([0, *(_positions(row, causal) for row in rows)])
    with staging(place) as out:
        notes = _Notes(out, starts, causal, [theirs for _, theirs in pairs] if config.lesson_hidden else [], speaks)
        notes.take(teacher, rows, tokenizer.pad_token_id or 0, config)
        softcap = describe(teacher.config.to_dict()).logits_softcap if causal else 0.0
        if causal and speaks:
            np.save(out / HEAD, teacher.get_output_embeddings().weight.detach().float().cpu().numpy())
        np.save(out / STARTS, starts)
        size = sum(file.stat().st_size for file in out.iterdir())
        write_json(out / ABOUT, {"layers": [own for own, _ in pairs], "softcap": softcap, "bytes": size})
    say(f"  teacher {config.teacher}: what it says about {len(rows)} rows takes {size / 1e6:.1f} MB on disk")


def _positions(row: Row, causal: bool) -> int:
    return sum(label != IGNORED for label in row["labels"][1:]) if causal else len(row["input_ids"])


def _check_sizes(student: Any, teacher: Any, config: Config, causal: bool) -> None:
    """Raise ConfigError where hidden states or vocabularies cannot be compared."""
    if config.lesson_hidden and student.hidden_size != teacher.hidden_size:
        raise ConfigError(
            f"--lesson-hidden: expected a teacher with {student.hidden_size} numbers per hidden state, found "
            f"{teacher.hidden_size}. Take --lesson-hidden 0."
        )
    if causal and student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"--teacher: expected {student.vocab_size} tokens as the student has, found {teacher.vocab_size}."
        )


class _Notes:
    """The arrays that a teacher's answers go into, on disk."""

    def __init__(self, out: Path, starts: np.ndarray, causal: bool, layers: Sequence[int], speaks: bool) -> None:
        self.out, self.starts, self.causal, self.layers, self.speaks = out, starts, causal, layers, speaks
        self.arrays: dict[str, np.ndarray] = {}

    def take(self, teacher: Any, rows: Sequence[Row], pad_id: int, config: Config) -> None:
        """Ask the teacher about all rows, those of like length together."""
        task = TASKS[config.task]
        size = task.eval_batch or config.batch_size
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        device = next(teacher.parameters()).device
        with torch.inference_mode():
            for start in progress(range(0, len(order), size), "teacher", -(-len(order) // size)):
                chosen = order[start : start + size]
                batch = {name: t.to(device) for name, t in task.collate([rows[i] for i in chosen], pad_id).items()}
                self._note(chosen, batch, *self._ask(teacher, batch))

    def _ask(self, teacher: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Return the logits of a classifier, or what goes into a language model's head, and all hidden states."""
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "shift_labels")}
        if not self.causal:
            found = teacher(**inputs, output_hidden_states=bool(self.layers))
            return found.logits, found.hidden_states or ()
        base = teacher.get_base_model() if hasattr(teacher, "get_base_model") else teacher
        found = base.model(**inputs, use_cache=False, output_hidden_states=bool(self.layers))
        return found.last_hidden_state, found.hidden_states or ()

    def _note(
        self, chosen: Sequence[int], batch: Mapping[str, torch.Tensor], answer: torch.Tensor,
        states: Sequence[torch.Tensor],
    ) -> None:  # fmt: skip
        wanted = batch["shift_labels"] != IGNORED if self.causal else batch["attention_mask"].bool()
        places = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in chosen])
        if self.speaks:
            where = places if self.causal else np.asarray(chosen)
            rows = len(self.starts) - 1 if not self.causal else self.starts[-1]
            self._put(ANSWERS, where, answer[wanted] if self.causal else answer, rows, self.causal)
        if self.layers:
            hidden = torch.stack([states[layer][wanted] for layer in self.layers], dim=1)
            self._put(HIDDEN, places, hidden, self.starts[-1], True)

    def _put(self, name: str, where: np.ndarray, values: torch.Tensor, rows: int, half: bool) -> None:
        """Write some rows of an array. Raises ModelError for what float16 cannot hold."""
        found = values.float().cpu().numpy()
        if half and not np.abs(found).max(initial=0.0) <= LARGEST_HALF:
            raise ModelError(f"the teacher's hidden states reach {np.abs(found).max():.3g}; float16 ends at 65504.")
        if name not in self.arrays:
            kind = np.float16 if half else np.float32
            self.arrays[name] = np.lib.format.open_memmap(
                self.out / name, mode="w+", dtype=kind, shape=(int(rows), *found.shape[1:])
            )
        self.arrays[name][where] = found
