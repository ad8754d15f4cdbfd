"""Prompts: what an adapter puts before every text, as Hugging Face PEFT trains it and as a device holds it.

    prompt tuning   rows [V, hidden] before the embeddings of the tokens, at positions 0 .. V-1
    P-tuning        the same rows, made by a small network while they are trained
    prefix tuning   keys and values of every layer, [V, layers · 2 · kv_heads · head_dim]; tokens begin at position V

A causal model's tokens see what comes before them and change nothing of it, so all three are one thing to a decoder:
keys and values that its cache begins with. They are worked out once, when an adapter is exported, by the packed model
in float; a token then costs what V more tokens of context cost, and the graph stays as it is.

    past_key_values.<layer>.key, .value     float32 [1, kv_heads, V, head_dim], named as the inputs that take them

An encoder's tokens do see each other, so its graph takes the rows themselves, where an adapter has any:

    <word embedding>.prompt                 float32 [V, hidden]; the first of them is the token that is classified
    <k or v of a layer>.prefix              float32 [V, hidden], before the linear's outputs; no query is of them

The network of P-tuning is no part of an adapter: PEFT saves the rows alone, so a training keeps it beside them.

PEFT's file has other names than those of its other kinds, as nothing is injected: `inner` and `outer` translate.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.adapt.terms import PREFIX, PROMPT, STATES
from edgepeft.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

    from edgepeft.adapt.base import Base
    from edgepeft.backbone.families import Family

ROWS = "prompt_embeddings"
WRAPPER = "base_model."
PREFIX_TUNING = "PREFIX_TUNING"
TYPES = ("PROMPT_TUNING", "P_TUNING", PREFIX_TUNING)
SETTINGS = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


# --- PEFT's names ----------------------------------------------------------------------------------------------------


def inner(name: str) -> str:
    """Return a tensor's name as other kinds of adapters have it: base_model.prompt_embeddings, base_model.model.…"""
    bare = _bare(name)
    return WRAPPER + bare if bare == ROWS else PREFIX + bare


def outer(name: str) -> str:
    """Return a tensor's name as PEFT saves it with a prompt: prompt_embeddings, base_model.…"""
    bare = _bare(name)
    return bare if bare == ROWS else WRAPPER + bare


def _bare(name: str) -> str:
    return name.removeprefix(PREFIX).removeprefix(WRAPPER)


# --- what a device holds ---------------------------------------------------------------------------------------------


def names(layers: int) -> list[str]:
    """Return the inputs of a graph that take keys and values, in their order."""
    return [f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")]


def problems(rows: np.ndarray | None, settings: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> list[str]:
    """Return, in words, what is wrong with a prompt's tensor; `about` is the base's config.json."""
    if rows is None:
        return [f"{ROWS} is missing: it would load and do nothing. Save it with PEFT's save_pretrained."]
    numbers = {name: settings.get(name) for name in SETTINGS}
    if odd := [name for name, value in numbers.items() if not isinstance(value, int) or value < 1]:
        return [f"{name} should be a whole number above 0, found {numbers[name]!r}." for name in odd]
    count, width, layers = (int(settings[name]) for name in SETTINGS[:3])
    prefix = settings["peft_type"] == PREFIX_TUNING
    wanted, found = (count, 2 * layers * width if prefix else width), []
    if rows.shape != wanted:
        found.append(f"{ROWS} is {list(rows.shape)}, its settings say {list(wanted)}.")
    if settings["num_transformer_submodules"] != 1:
        found.append("num_transformer_submodules = 2 is of a model with two halves; here are none.")
    if about is not None and not found:
        found += _against(about, prefix, layers, int(settings["num_attention_heads"]), width)
    return found


def _against(about: Mapping[str, Any], prefix: bool, layers: int, heads: int, width: int) -> list[str]:
    """Return what does not fit the base: the width of a row, or how many keys there are."""
    if not prefix:
        hidden = about["hidden_size"]
        return [] if width == hidden else [f"{ROWS} is for a model of width {hidden}, found {width}."]
    size = about.get("head_dim") or about["hidden_size"] // about["num_attention_heads"]
    own = (about["num_hidden_layers"], about.get("num_key_value_heads") or about["num_attention_heads"], size)
    found = (layers, heads, width // heads)
    same = own == found and width % heads == 0
    return [] if same else [f"{ROWS} is for layers, heads of keys and their size {list(found)}, the base has {own}."]


def held(rows: np.ndarray, settings: Mapping[str, Any], base: Base | None) -> dict[str, np.ndarray]:
    """Return {input of the graph: array} of a prompt [V, ..]. Raises ArtifactError for what has no such form."""
    prefix = settings["peft_type"] == PREFIX_TUNING
    if base is not None and base.family.kind == "encoder":
        return _encoded(rows, base.family, int(settings["num_layers"]) if prefix else 0)
    if prefix:
        return _cached(rows, int(settings["num_layers"]), int(settings["num_attention_heads"]))
    if base is None or base.folder is None:
        raise ArtifactError(
            f"{ROWS}: a device holds the keys and values that the base makes of them, and the packed base was not "
            "given. Build with --adapter-from FOLDER, on the same base and --format, and add what comes out."
        )
    return computed(base.folder, rows)


def _encoded(rows: np.ndarray, family: Family, layers: int) -> dict[str, np.ndarray]:
    """Return rows before the words' [V, hidden], or of a prefix those before the outputs of every layer's k and v."""
    from numpy import ascontiguousarray, split

    if not layers:
        return {f"{PREFIX}{family.prefix}.{family.embeddings['word']}.{PROMPT}": rows}
    modules = [family.linears[role].format(i=i) for i in range(layers) for role in "kv"]
    parts = zip(modules, split(rows, len(modules), axis=1), strict=True)
    return {f"{PREFIX}{family.prefix}.{module}.{STATES}": ascontiguousarray(part) for module, part in parts}


def _cached(rows: np.ndarray, layers: int, heads: int) -> dict[str, np.ndarray]:
    """Return the keys and values of a prefix as a cache has them."""
    from numpy import ascontiguousarray

    parts = rows.reshape(len(rows), 2 * layers, heads, -1).transpose(1, 2, 0, 3)
    return {name: ascontiguousarray(part[None]) for name, part in zip(names(layers), parts, strict=True)}


def computed(folder: Path, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the keys and values that a packed language model makes of rows [V, hidden]."""
    import torch
    from numpy import array

    from edgepeft.backbone.load import quantized_model
    from edgepeft.config import Config

    model = quantized_model(folder, [], Config(task="text-generation"))
    with torch.inference_mode():
        cache = cached(model, torch.from_numpy(array(rows))[None])
    parts = [getattr(layer, part) for layer in cache.layers for part in ("keys", "values")]
    return {name: part.numpy().copy() for name, part in zip(names(len(cache.layers)), parts, strict=True)}


# --- in PyTorch ------------------------------------------------------------------------------------------------------


def cached(model: Any, rows: Any) -> Any:
    """Return a causal model's cache after rows [1, V, hidden], every column of it, windows or not."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model.model(inputs_embeds=rows, past_key_values=cache, use_cache=True)
    return cache


def _settings(model: Any) -> Any:
    """Return the settings of a PEFT model's prompt, or None for another model, or where it is switched off."""
    settings = getattr(model, "active_peft_config", None)
    return None if settings is None or not settings.is_prompt_learning or model._adapters_disabled else settings


def columns(model: Any) -> int:
    """Return how many positions a model's prompt takes; 0 without one."""
    settings = _settings(model)
    return 0 if settings is None else settings.num_virtual_tokens


def beginning(model: Any) -> tuple[Any, Any]:
    """Return a causal model to go on with token by token, and the cache to begin with: None without a prompt."""
    if (settings := _settings(model)) is None:
        return model, None
    prompt, plain = model.get_prompt(1), model.get_base_model()
    return plain, prompt if settings.peft_type == PREFIX_TUNING else cached(plain, prompt)


def embeds(peft: Any) -> Any:
    """Tell a PEFT model which of a packed model's modules embeds the words, which it cannot see; return the model."""
    if columns(peft):
        peft.word_embeddings = peft.get_base_model().get_input_embeddings()
    return peft
