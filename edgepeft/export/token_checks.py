"""What a language model must still do after export: go on from what it holds, prefer the same tokens, keep its loss.

| check | what runs | against | allowed |
|---|---|---|---|
| steps | a text in one run, in parts, token by token, float activations | each other | float32 rounding |
| answers | the model as it will ship, targets of `JUDGED` texts | PyTorch in float | 90 % the same likeliest token |
| metric | the same: mean loss per target | PyTorch in float | a rise of `LOSS_RISE` |
| cache | the same with keys and values in int8 | in float32 | both as above; parts to the whole: a code or so |

`metric` also reports the perplexity, e^loss, of the base without the adapter, and of the float model the base was made
of where there is room for it: what quantization cost, and what the adapter won. `cache` measures the scales of an int8
cache, which a bundle offers beside float32 where it holds what the table says, and leaves out where it does not: for
each channel the largest value in the texts and HEADROOM more, keys by the length of the pair that rotary positions
turn, so that they hold at any place. All that a text's tokens give is
reduced to three numbers a token as it comes, since logits take 4 bytes for each word of the vocabulary.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from edgepeft.adapt import prompts
from edgepeft.artifact import read_json, write_tensors
from edgepeft.backbone.decoder import describe
from edgepeft.errors import EdgePeftError, VerifyError
from edgepeft.export import parity
from edgepeft.export.parity import FLOAT_ERROR, Figures, OnnxModel
from edgepeft.export.subject import TRACED, Skipped, Written
from edgepeft.runtime.session import CACHE_SCALES
from edgepeft.train.chats import IGNORED

AGREEMENT = 0.9
LOSS_RISE = 0.02  # nats a token: 2 % of perplexity
STEP_TOKENS = 64
LARGEST_EXPONENT = 100.0
PARTS = (1, 5)  # tokens a run
FLOAT_BYTES = 4
HEADROOM = 1.25  # times the largest value seen, of what an int8 cache can hold
CODES, TINY = 127, np.float32(1e-6)
CODE_ERROR = 1e-2  # of the logits, by codes that round the other way for the float32 rounding of a run's shape
ROOM = 1.5  # times the float weights: what the float model needs beside the packed one


class Judged(NamedTuple):
    """A model's judgement of all targets: mean loss, and its likeliest tokens in order."""

    loss: float
    likeliest: np.ndarray

    @property
    def perplexity(self) -> float:
        """e^loss."""
        return math.exp(min(self.loss, LARGEST_EXPONENT))


Logits = Callable[[np.ndarray], Iterator[np.ndarray]]


def judge(rows: list[dict[str, Any]], logits: Logits) -> Judged:
    """Return what a model makes of rows of targets; `logits` yields those of ids [1, S] in parts [1, some, V]."""
    losses: list[np.ndarray] = []
    likeliest: list[np.ndarray] = []
    for row in rows:
        target = np.array([*row["labels"][1:], IGNORED])
        start = 0
        for part in logits(np.array([row["input_ids"]], np.int64)):
            here = target[start : start + part.shape[1]]
            start += part.shape[1]
            z_tv, goal = part[0][here != IGNORED], here[here != IGNORED]
            top = z_tv.max(-1, keepdims=True)
            log_sum = np.log(np.exp(z_tv - top, dtype=np.float32).sum(-1)) + top[:, 0]
            losses.append(log_sum - z_tv[np.arange(len(goal)), goal])
            likeliest.append(z_tv.argmax(-1))
    return Judged(float(np.concatenate(losses).mean(dtype=np.float64)), np.concatenate(likeliest))


def of_graph(model: OnnxModel, watch: Callable[[dict[str, np.ndarray]], None] | None = None) -> Logits:
    """Return an exported model's logits, part by part; `watch` is shown each text's keys and values."""
    return lambda ids: model.steps(ids, STEP_TOKENS, watch)


def of_torch(model: Any) -> Logits:
    """Return a PyTorch model's logits, part by part."""

    def logits(ids: np.ndarray) -> Iterator[np.ndarray]:
        import torch

        with torch.inference_mode():
            plain, past = prompts.beginning(model)
            for start in range(0, ids.shape[1], STEP_TOKENS):
                part = torch.from_numpy(ids[:, start : start + STEP_TOKENS])
                found = plain(input_ids=part, past_key_values=past, use_cache=True)
                past = found.past_key_values
                yield found.logits.float().numpy()

    return logits


# --- the checks --------------------------------------------------------------------------------------------------


def check_steps(work: Written) -> Figures:
    """Going on from keys and values gives what reading all at once does."""
    model, batch = work.onnx(work.library is not None, "float"), work.sample(TRACED)
    whole = model.logits(batch)
    names = {size: f"{size} token{'s' * (size > 1)} a run" for size in PARTS}
    errors = {
        name: parity.largest_error(np.concatenate(list(model.steps(batch["input_ids"], size)), 1), whole)
        for size, name in names.items()
    }
    rows = [parity.Difference(name, error, FLOAT_ERROR) for name, error in errors.items()]
    worst = parity.require("a text in parts against the whole", rows, "This is a defect of edgepeft: please report it.")
    return {"largest_error": worst, "tokens": batch["input_ids"].shape[1]}


def _pair(work: Written) -> tuple[Judged, Judged]:
    """Return what PyTorch and the model as it ships make of the texts."""
    work.adapter("exported")
    watch = functools.partial(_note_amplitudes, work)
    return judge(work.examples, of_torch(work.model)), judge(work.examples, of_graph(work.shipped, watch))


def _note_amplitudes(work: Written, cache: dict[str, np.ndarray]) -> None:
    """Raise the amplitudes [kv_heads, 1, head_dim] of a subject to those of a text's keys and values."""
    rotary = describe(read_json(work.folder / "config.json")).rotary_dims
    for name, array in cache.items():
        size = np.abs(array[0])
        if name.endswith(".key"):
            left, right = size[..., : rotary // 2], size[..., rotary // 2 : rotary]
            size[..., :rotary] = np.concatenate([np.hypot(left, right)] * 2, -1)
        top = size.max(1, keepdims=True)
        work.amplitudes[name] = np.maximum(work.amplitudes.get(name, top), top)


def check_answers(work: Written) -> Figures:
    """The model as it ships prefers the tokens that PyTorch does."""
    wanted, found = _pair(work)
    work.judgements = (wanted, found)
    same = float((wanted.likeliest == found.likeliest).mean())
    if not same >= AGREEMENT:
        raise VerifyError(
            f"answers: {work.shipped.name} prefers PyTorch's token at {same:.2%} of {len(wanted.likeliest)} places, "
            f"expected {AGREEMENT:.0%}. Try --activation float or a finer --format."
        )
    return {"agreement": same, "tokens": len(wanted.likeliest)}


def check_metric(work: Written) -> Figures:
    """The model as it ships keeps the loss of the trained one."""
    wanted, found = work.judgements or _pair(work)
    if not found.loss <= wanted.loss + LOSS_RISE:
        raise VerifyError(
            f"loss on the {work.split_name} split: expected at most {wanted.loss + LOSS_RISE:.4f} ({wanted.loss:.4f} "
            f"in PyTorch and {LOSS_RISE} for rounding), found {found.loss:.4f} in the exported model. Try --activation "
            "float or a finer --format."
        )
    perplexity: dict[str, Any] = {"exported": found.perplexity, "trained": wanted.perplexity}
    perplexity["base"] = judge(work.examples, of_torch(work.bare())).perplexity
    perplexity["float_base"] = _float_perplexity(work)
    where = {"split": work.split_name, "examples": len(work.judged), "tokens": len(wanted.likeliest)}
    return {"loss": found.loss, "trained_loss": wanted.loss, "perplexity": perplexity, **where}


def check_cache(work: Written) -> Figures:
    """Keys and values in int8 do what float32 ones do. Writes their scales; without them a bundle has float32 alone."""
    wanted = (work.judgements or _pair(work))[1]
    scales = {name: np.maximum(top, TINY) * np.float32(HEADROOM / CODES) for name, top in work.amplitudes.items()}
    made = functools.partial(OnnxModel, work.folder, work.library, threads=work.config.threads, cache_scales=scales)
    try:
        model, exact = made(), made(activation="float")
    except VerifyError as error:
        raise Skipped(f"this ONNX Runtime has no int8 cache: {error}") from None
    found = judge(work.examples, of_graph(model))
    same = float((wanted.likeliest == found.likeliest).mean())
    ids = work.sample(TRACED)["input_ids"]
    whole, *parts = (np.concatenate(list(exact.steps(ids, size)), 1) for size in (ids.shape[1], *PARTS))
    rows = [parity.Difference("a text in parts", parity.largest_error(part, whole), CODE_ERROR) for part in parts]
    worst, held = max(row.error for row in rows), not any(row.missed for row in rows)  # NaN is a miss
    figures = {"loss_rise": found.loss - wanted.loss, "agreement": same, "parts_error": worst}
    if not (held and found.loss <= wanted.loss + LOSS_RISE and same >= AGREEMENT):
        raise Skipped(f"an int8 cache changes too much, so there is none: {figures}")
    write_tensors(work.out / CACHE_SCALES, scales)
    return {**figures, "bytes_a_token": sum(top.size for top in scales.values())}


def _float_perplexity(work: Written) -> float | str:
    """Return the perplexity of the float model that was quantized, or why there is none."""
    import transformers

    from edgepeft.backbone.checkpoint import tensor_shapes
    from edgepeft.backbone.load import resolve_model
    from edgepeft.train.watch import quiet

    try:
        source = resolve_model(work.config)
    except EdgePeftError as error:
        return f"not measured: {error}"
    need = ROOM * FLOAT_BYTES * sum(math.prod(shape) for shape in tensor_shapes(source).values())
    room = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > room:
        return f"not measured: it takes about {need / 1e9:.1f} GB, {room / 1e9:.1f} are free"
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(str(source.path), dtype="float32").eval()
    return judge(work.examples, of_torch(model)).perplexity


CHECKS: dict[str, Callable[[Written], Figures]] = {
    "steps": check_steps,
    "answers": check_answers,
    "metric": check_metric,
    "cache": check_cache,
}
