"""Whether a model folder holds together: settings, tensors and tokenizer, asked before anything is made of it.

What does not fit would show late otherwise: an activation without an operator at the export, a token beyond the
embedding at the first text that has it. So a build asks at its start, and a dry run too: of the headers alone, and
without torch or transformers where there is a tokenizer.json (a decoder's settings take transformers' defaults).

Left out: settings that have no part in a shape or in the graph (dropout, for one); transformers looks at those when the
model is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepeft.adapt.methods import METHODS
from edgepeft.backbone.checkpoint import backbone_names, backbone_shapes, same_tensor, tensor_shapes
from edgepeft.backbone.families import Family, family_of
from edgepeft.backbone.load import ModelSource, model_json
from edgepeft.config import Config, own_settings
from edgepeft.errors import ConfigError, ModelError, blaming

SHOWN, LEAST_TOKENS, FLOAT_BITS = 4, 4, 32
SAVE_TOKENIZER = "Save the model's tokenizer there again, as a fast one: tokenizer.save_pretrained(FOLDER)."


def check_model(source: ModelSource) -> Family:
    """Return the family of a model folder. Raises ModelError naming what in it does not fit the rest."""
    family = family_of(source.settings, str(source.path), tensor_shapes(source))
    from edgepeft.export import decoder, encoder

    graph = encoder if family.kind == "encoder" else decoder
    graph.check_settings(source.settings, source.path / "config.json")
    shapes = backbone_shapes(source, family)
    _check_tensors(source, family, shapes)
    _check_tied(source, family)
    _check_tokenizer(source, shapes[f"{family.prefix}.{family.embeddings['word']}.weight"][0])
    return family


def check_bindable(config: Config, source: ModelSource, family: Family, most_mib: int) -> None:
    """Raise ModelError for tensors whose codes are more than a shader of the target binds, in MiB.

    Formats that --size chooses are not known yet: the export looks at those.
    """
    from edgepeft.quant.stage import format_for

    if config.size:
        return
    kinds, tied, large = family.tensors(source.settings), family.tied(source.settings), []
    for name, shape in backbone_shapes(source, family).items():
        fmt, _ = format_for(config, kinds[name], shape, tied)
        size = math.prod(shape) * (fmt.bits if fmt else FLOAT_BITS) / 8 / 2**20
        if size > most_mib:
            large.append(f"{name}: {size:.0f} MiB as {fmt.tag if fmt else 'float32'}")
    if large:
        raise ModelError(
            f"{source.path}: a shader of --target {config.target} binds {most_mib} MiB at most: {', '.join(large)}. "
            "Take a smaller format (--format, --embedding-format) or another target."
        )


def text_limit(config: Config, positions: int | None, prompt: int) -> int:
    """Return the most tokens of a text: max_length, or what a model has where that is less than the task's default.

    positions: the model's, None where it has no limit, of which a prompt takes some. Raises ConfigError for a
    max_length of the user's own that is more.
    """
    if not positions or config.max_length <= (limit := positions - prompt):
        return config.max_length
    if config.max_length == own_settings(config.task).get("max_length") and limit >= LEAST_TOKENS:
        return limit
    if prompt and limit < LEAST_TOKENS:
        most = positions - LEAST_TOKENS
        raise ConfigError(f"--prompt-tokens: expected at most {most}, as the model has {positions}; found {prompt}.")
    what = "the model's positions" + (f" less {prompt} of the prompt" if prompt else "")
    raise ConfigError(f"--max-length: expected at most {limit}, {what}; found {config.max_length}.")


def check_length(config: Config, source: ModelSource) -> int:
    """Return `text_limit` for a model folder, before there is a model."""
    prompt = config.prompt_tokens if METHODS[config.method].prompt else 0
    return text_limit(config, source.settings.get("max_position_embeddings"), prompt)


def _check_tensors(source: ModelSource, family: Family, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError when the checkpoint lacks a part of the backbone, or holds one of another name or shape."""
    kinds, expected = family.tensors(source.settings), family.shapes(source.settings)
    fresh = tuple(f"{family.prefix}.{family.linears[role]}." for role in family.fresh)
    other = [name for name, shape in shapes.items() if shape != expected.get(name, shape)]
    matrices = [name for name in shapes if kinds.get(name) in ("linear", "embedding") and name not in expected]
    problems = {
        "missing": [name for name in kinds if name not in shapes and not name.startswith(fresh)],
        "not known to the family": [name for name in shapes if name not in kinds],
        "of another shape": [f"{name} is {list(shapes[name])}, not {list(expected[name])}" for name in other],
        "not a matrix": [name for name in matrices if len(shapes[name]) != 2],
    }
    told = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    if told:
        raise ModelError(
            f"{source.path}: does not hold a {family.tag} model as its config.json describes it: {'; '.join(told)}. "
            "Take config.json and weights of one model."
        )


def _check_tied(source: ModelSource, family: Family) -> None:
    """Raise ModelError when config.json ties head and embedding and the checkpoint holds two different tensors."""
    head, names = f"{family.head}.weight", backbone_names(source, family)
    if head in names or head not in tensor_shapes(source):
        return
    word = next(old for old, new in names.items() if new.endswith(f".{family.embeddings['word']}.weight"))
    if not same_tensor(source, word, head):
        raise ModelError(
            f"{source.path}: config.json says that {family.head} is the word embedding (tie_word_embeddings), but the "
            f"weights hold another {head}. Set tie_word_embeddings to false there if both were trained."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _check_tokenizer(source: ModelSource, rows: int) -> None:
    """Raise ModelError when the tokenizer is damaged or has an id without a row in the word embedding."""
    for file in source.tokenizer_files:
        if file.suffix == ".json":
            model_json(file)
    tokenizer = fast_tokenizer(source.path)
    file = source.path / "tokenizer.json"
    with blaming(file, SAVE_TOKENIZER):
        padding = (tokenizer.padding or {}).get("pad_id", 0)
        largest = max([padding, *tokenizer.encode("a").ids, *tokenizer.get_vocab().values()])
    if largest >= rows:
        raise ModelError(
            f"{file}: expected ids below {rows}, the rows of the model's word embedding, found {largest} (token "
            f"{tokenizer.id_to_token(largest)!r}). Take the tokenizer that the model was saved with, or save the model "
            "again after model.resize_token_embeddings(len(tokenizer))."
        )


def fast_tokenizer(folder: Path) -> Any:
    """Return a folder's `tokenizers.Tokenizer`, made by transformers where there is no tokenizer.json."""
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        with blaming(file, SAVE_TOKENIZER):
            return Tokenizer.from_file(str(file))
    from transformers import AutoTokenizer

    with blaming(file, f"It is missing and cannot be made of the other files. {SAVE_TOKENIZER}"):
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
