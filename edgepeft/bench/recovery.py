"""What an adapter gives back of what quantization took from the hidden states: packed and float backbone side by side.

    edgepeft train --format i4b128 --teacher self --lesson-hidden 30 --output taught
    python -m edgepeft.bench.recovery taught

On the texts of the test split (validation where there is none), which no training has seen, with h' the float32
backbone's last hidden states, which is what a task's head or a search index reads, and h the packed one's:

    error = mean over the tokens of ‖h - h'‖² / ‖h'‖²        recovered = 1 - error with the adapter / error without

`cosine` is that of the texts' mean-pooled states, the sentence embedding of models such as MiniLM. An adapter that was
trained on labels alone goes where the task wants it, so its error may be larger than that of no adapter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepeft.artifact import Run, read_json
from edgepeft.config import Config
from edgepeft.console import progress, table
from edgepeft.errors import EdgePeftError

BATCH = 16


def measure(output: Path, texts: int | None = None) -> list[dict[str, Any]]:
    """Return a row without and a row with the adapter of a run folder, measured on the first `texts` texts."""
    import torch

    from edgepeft.backbone.load import resolve_model
    from edgepeft.export.subject import adapted_model
    from edgepeft.train.data import load_splits
    from edgepeft.train.loop import load_tokenizer
    from edgepeft.train.tasks import TASKS
    from edgepeft.train.teacher import float_model

    config, run = Config(**read_json(output / "config.json")), Run(output)
    source, splits = resolve_model(config), load_splits(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    split, tokenizer = splits.test if len(splits.test) else splits.validation, load_tokenizer(source.path)
    reference = float_model(source, splits.labels, config).eval()
    packed = adapted_model(config, run, splits.labels, run.path("adapter"))
    rows = split.encode(tokenizer, config.max_length)[:texts]
    sums = {"no adapter": [0.0, 0.0], "adapter": [0.0, 0.0]}
    tokens = 0
    for start in progress(range(0, len(rows), BATCH), "texts", -(-len(rows) // BATCH)):
        batch = TASKS[config.task].collate(rows[start : start + BATCH], tokenizer.pad_token_id or 0)
        there = batch["attention_mask"].bool()
        tokens += int(there.sum())
        want = _states(reference, batch)
        for name, found in sums.items():
            with packed.disable_adapter() if name == "no adapter" else contextlib.nullcontext():
                got = _states(packed.get_base_model(), batch)
            error = (got - want).square().sum(-1) / want.square().sum(-1)
            pooled = [(states * there[..., None]).sum(1) for states in (got, want)]
            found[0] += float(error[there].sum())
            found[1] += float(torch.nn.functional.cosine_similarity(*pooled).sum())
    errors = {name: error / tokens for name, (error, _) in sums.items()}
    return [
        {
            "backbone": f"{config.format}, {name}", "error": errors[name], "cosine": cosine / len(rows),
            "recovered": 1 - errors[name] / errors["no adapter"],
        }
        for name, (_, cosine) in sums.items()
    ]  # fmt: skip


def _states(model: Any, batch: dict[str, Any]) -> Any:
    """Return the last hidden states of a batch, [M, S, K]."""
    import torch

    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "shift_labels")}
    with torch.inference_mode():
        return model.base_model(**inputs).last_hidden_state


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="edgepeft.bench.recovery", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path, help="folder of a build or 'edgepeft train' with --adapter separate")
    parser.add_argument("--texts", type=int, help="texts to measure on; all unless given")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    try:
        rows = measure(options.output, options.texts)
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
