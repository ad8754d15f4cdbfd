"""Which texts a solver looks at: a seeded sample of rows of token ids.

    --calibration FILE    a text file (.txt, .md: cut into rows), or any data file of the task's kind
    nothing given         the training texts of --data

Rows have at most --calibration-tokens tokens and --calibration-rows of them are drawn by the seed; equal files give
equal rows. Labels of a data file are not looked at.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.artifact import file_digest, key_of
from edgepeft.errors import DataError

if TYPE_CHECKING:
    from edgepeft.config import Config

TEXT_KINDS = (".txt", ".md")


def calibrated(config: Config) -> bool:
    """Tell whether quantizing looks at calibration texts."""
    from edgepeft.quant.solvers import SOLVERS

    return bool(SOLVERS[config.solver].calibrated or config.size or config.calibration)


def digest(config: Config) -> str:
    """Return a digest of the texts and of how they are drawn; "none" where quantizing looks at none."""
    if not calibrated(config):
        return "none"
    from edgepeft.train.data import data_digest

    path = Path(config.calibration).expanduser()
    if config.calibration and not path.exists():
        raise DataError(f"{config.calibration}: no such file. Give --calibration a text file or a data file.")
    is_text = config.calibration and path.suffix.lower() in TEXT_KINDS
    bytes_digest = file_digest(path) if is_text else data_digest(_source(config))
    drawn = config.calibration_rows, config.calibration_tokens, config.max_length
    how = *drawn, config.seed, config.text_column, config.label_column, config.task
    return key_of([bytes_digest, *how])


def _source(config: Config) -> Config:
    return config.replace(data=config.calibration) if config.calibration else config


def rows(config: Config, folder: Path) -> list[list[int]]:
    """Return the sample as rows of token ids, tokenized by a model folder. Raises DataError."""
    from edgepeft.train.loop import load_tokenizer

    tokenizer = load_tokenizer(folder)
    path = Path(config.calibration).expanduser()
    if config.calibration and path.suffix.lower() in TEXT_KINDS:
        found = _of_text(path, tokenizer, config)
    elif config.task == "text-generation" or not config.calibration:
        found = _of_data(config, tokenizer)
    else:
        found = _of_column(config, tokenizer)
    found = [row for row in found if len(row) > 1]
    if not found:
        raise DataError(f"{config.calibration or config.data}: nothing to calibrate with: no row has two tokens.")
    return random.Random(config.seed).sample(found, min(len(found), config.calibration_rows))


def _of_text(path: Path, tokenizer: Any, config: Config) -> list[list[int]]:
    """Return a text as full rows; an encoder's rows are its lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found {error.reason}. Save the file as UTF-8.") from None
    limit = config.calibration_tokens
    if config.task != "text-generation":
        lines = [line for line in text.splitlines() if line.strip()]
        return tokenizer(lines, truncation=True, max_length=limit)["input_ids"] if lines else []
    ids = tokenizer(text, verbose=False)["input_ids"]
    return [ids[i : i + limit] for i in range(0, len(ids), limit)]


def _of_data(config: Config, tokenizer: Any) -> list[list[int]]:
    """Return the training rows of a data source, as training writes them."""
    from edgepeft.train.data import load_splits

    limit = min(config.calibration_tokens, config.max_length)
    examples = load_splits(_source(config)).train.encode(tokenizer, limit)
    return [example["input_ids"] for example in examples]


def _of_column(config: Config, tokenizer: Any) -> list[list[int]]:
    """Return the texts of a file for encoders; its labels may be missing."""
    from edgepeft.train.data import decoded, read_tables

    table = read_tables(_source(config))["train"]
    if config.text_column not in table.columns:
        found = ", ".join(map(repr, table.columns)) or "none"
        raise DataError(f"{table.source}: no column {config.text_column!r}; found {found}. Give --text-column.")
    texts = [text for _, values in table.rows if isinstance(text := decoded(values[config.text_column]), str)]
    limit = min(config.calibration_tokens, config.max_length)
    return tokenizer(texts, truncation=True, max_length=limit)["input_ids"] if texts else []
