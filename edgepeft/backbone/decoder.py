"""One description for every causal language model: what differs between the families, as numbers and flags.

    x = embedding(ids) * embedding_scale
    layer:  x += [norm] o( attention( rope(norm q), rope(norm k), v ) )          of  norm(x);  [norm] where `sandwich`
            x += [norm] down( act(gate) * up )                                   of  norm(x)
    logits = softcap( head( norm(x) ) )          attention: softmax( softcap( scale q·k ) ), at most `window` back

`describe` reads a config.json with the defaults of its transformers class, so a setting that the file leaves out has
the value that the class gives it. Rotary frequencies (plain, linear, llama3, yarn, longrope) are those of the
transformers model itself, asked position by position; longrope has two sets, and changes to the other where a text
outgrows the first, which keys that are kept cannot follow: such a model has no more positions than its first set has. A
setting with no counterpart here is refused, all of them at once; one that the family's class does not read (a window in
a Llama, a cap on attention in a Gemma 3) means nothing here either.

Left out: rotary frequencies that change with the length of the text (dynamic NTK), experts, attention sinks, layers
that share keys, bidirectional attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.errors import ModelError, blaming

if TYPE_CHECKING:
    import numpy as np

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder in numbers. windows: per layer, how many tokens back it sees, itself included; 0 is all.

    ropes: per layer, which of `rope_tables` it uses.  eos: every token that ends an answer.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dims: int
    vocabulary: int
    positions: int
    epsilon: float
    activation: str
    attention_scale: float
    attention_softcap: float
    logits_softcap: float
    embedding_scale: float
    norm_offset: float
    sandwich: bool
    head_norms: bool
    fused: bool
    tied: bool
    windows: tuple[int, ...]
    ropes: tuple[int, ...]
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


def full_config(settings: Mapping[str, Any]) -> Any:
    """Return the transformers configuration of a config.json, defaults filled in. Raises ModelError."""
    import transformers

    with blaming(Path("config.json"), "Copy the model again."):
        return transformers.AutoConfig.for_model(**settings)


def describe(settings: Mapping[str, Any]) -> Decoder:
    """Return the description of a decoder's config.json. Raises ModelError naming all that it cannot express."""
    config = full_config(settings)
    if problems := _problems(config, settings):
        raise ModelError(f"config.json: {config.model_type}: {'; '.join(problems)}.")
    gemma, heads = config.model_type.startswith("gemma"), config.num_attention_heads
    head_dim, kinds = _head_dim(config), rope_kinds(config)
    return Decoder(
        layers=config.num_hidden_layers, hidden=config.hidden_size, inner=config.intermediate_size, heads=heads,
        kv_heads=config.num_key_value_heads, head_dim=head_dim,
        rotary_dims=int(head_dim * _partial(config)),
        vocabulary=config.vocab_size, positions=_positions(config), epsilon=config.rms_norm_eps,
        activation=ACTIVATIONS[_activation(config)],
        attention_scale=float(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
        attention_softcap=float((config.model_type == "gemma2" and config.attn_logit_softcapping) or 0.0),
        logits_softcap=float((gemma and config.final_logit_softcapping) or 0.0),
        embedding_scale=config.hidden_size**0.5 if gemma else 1.0, norm_offset=float(gemma), sandwich=gemma,
        head_norms=config.model_type in ("qwen3", "gemma3_text"), fused=config.model_type == "phi3",
        tied=bool(config.tie_word_embeddings), windows=_windows(config),
        ropes=tuple(kinds.index(kind) for kind in _rope_of_layers(config, kinds)),
        bos=config.bos_token_id, eos=_ids(config.eos_token_id), pad=config.pad_token_id,
    )  # fmt: skip


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def stop_tokens(folder: Path) -> tuple[int, ...]:
    """Return every token that ends an answer: those of a model folder's config.json and generation_config.json."""
    from edgepeft.backbone.load import model_json

    files = [file for name in ("config.json", "generation_config.json") if (file := folder / name).is_file()]
    return tuple(dict.fromkeys(token for file in files for token in _ids(model_json(file).get("eos_token_id"))))


def _activation(config: Any) -> str:
    return config.hidden_activation if config.model_type.startswith("gemma") else config.hidden_act


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _partial(config: Any) -> float:
    """Return the share of a head's dimensions that turns with the position."""
    return float(_rope(config, rope_kinds(config)[0]).get("partial_rotary_factor") or 1.0)


def _positions(config: Any) -> int:
    """Return the most tokens that a model can see with one set of frequencies.

    longrope changes all of them where a text outgrows what the model began with; keys that are kept cannot follow.
    """
    ropes = [_rope(config, kind) for kind in rope_kinds(config)]
    own, longest = getattr(config, "original_max_position_embeddings", None), config.max_position_embeddings
    first = [rope.get("original_max_position_embeddings") for rope in ropes if _rope_type(rope) == "longrope"]
    return min([longest, *(length or own or longest for length in first)])


def _windows(config: Any) -> tuple[int, ...]:
    """Return each layer's window: transformers counts the token itself, as ONNX Runtime's local_window_size does."""
    layers = config.num_hidden_layers
    window = 0 if config.model_type == "llama" else config.sliding_window or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def shapes(about: Decoder) -> dict[str, tuple[int, ...]]:
    """Return the shape of each role's weight, rows first; "head" is the output over the vocabulary."""
    hidden, inner = about.hidden, about.inner
    q, kv = about.heads * about.head_dim, about.kv_heads * about.head_dim
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward", "final")
    return {
        "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "qkv": (q + 2 * kv, hidden), "o": (hidden, q),
        "gate": (inner, hidden), "up": (inner, hidden), "gate_up": (2 * inner, hidden), "down": (hidden, inner),
        **dict.fromkeys(("word", "head"), (about.vocabulary, hidden)), **dict.fromkeys(norms, (hidden,)),
        **dict.fromkeys(("q_norm", "k_norm"), (about.head_dim,)),
    }  # fmt: skip


# --- rotary positions ----------------------------------------------------------------------------------------------


def rope_kinds(config: Any) -> list[str]:
    """Return the kinds of layers that have rotary frequencies of their own; one empty name where all share them."""
    rope = getattr(config, "rope_parameters", None)
    if rope is not None and rope and all(isinstance(value, dict) or value is None for value in rope.values()):
        return sorted({*config.layer_types})
    local = getattr(config, "rope_local_base_freq", None) is not None
    return ["full_attention", "sliding_attention"] if local and rope is None else [""]


def _rope_of_layers(config: Any, kinds: list[str]) -> list[str]:
    return [""] * config.num_hidden_layers if kinds == [""] else list(config.layer_types)


def _rope(config: Any, kind: str) -> dict[str, Any]:
    """Return the rotary settings of a kind of layer, under the names of either transformers release."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        old = {} if kind == "sliding_attention" else getattr(config, "rope_scaling", None) or {}
        rope = {"partial_rotary_factor": getattr(config, "partial_rotary_factor", 1.0), **old}
    return dict(rope[kind] if kind and kind in rope else rope)


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def rope_tables(settings: Mapping[str, Any], length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return per kind of layer (cos, sin), float32 [length, rotary_dims / 2], for positions 0 to length - 1.

    length: the whole context; longrope chooses its frequencies by it.
    """
    import torch
    import transformers

    from edgepeft.backbone.load import weights_on_meta

    config = full_config(settings)
    with weights_on_meta():
        inner = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).model
    place = torch.arange(length)[None]
    tables = []
    for kind in rope_kinds(config):
        local = kind == "sliding_attention" and hasattr(inner, "rotary_emb_local")
        rotary = inner.rotary_emb_local if local else inner.rotary_emb
        several = {"layer_type": kind} if kind and not hasattr(inner, "rotary_emb_local") else {}
        with torch.no_grad():
            cos, sin = (t[0].float() for t in rotary(torch.zeros(1), place, **several))
        half = cos.shape[-1] // 2
        tables.append((cos[:, :half].contiguous().numpy(), sin[:, :half].contiguous().numpy()))
    return tables


# --- refusing ------------------------------------------------------------------------------------------------------


def _problems(config: Any, settings: Mapping[str, Any]) -> list[str]:
    """Return every setting with no exact counterpart here, in words."""
    import transformers

    problems = _size_problems(config)
    if "rope_parameters" in settings and transformers.__version__.startswith("4."):
        problems.append("rope_parameters is read by transformers 5 or newer: install that")
    if _activation(config) not in ACTIVATIONS:
        problems.append(f"activation {_activation(config)!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    for kind in rope_kinds(config):
        rope = _rope(config, kind)
        if (found := _rope_type(rope)) not in ROPE_TYPES:
            problems.append(f"rotary positions of type {found!r} are not supported; known: {', '.join(ROPE_TYPES)}")
    if config.model_type != "phi3" and _partial(config) != 1.0:
        problems.append(f"partial_rotary_factor {_partial(config):g} is supported for phi3 alone")
    if getattr(config, "use_bidirectional_attention", None):
        problems.append("use_bidirectional_attention is set: only causal models are supported")
    return problems


def _size_problems(config: Any) -> list[str]:
    """Return what is wrong with the sizes, in words."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    odd = {name: getattr(config, name) for name in (*names, "max_position_embeddings")}
    odd = {name: value for name, value in odd.items() if type(value) is not int or value < 1}
    if odd:
        return [f"{name}: expected a whole number of at least 1, found {value!r:.60}" for name, value in odd.items()]
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    problems = [f"num_key_value_heads {groups} does not divide num_attention_heads {heads}"] if heads % groups else []
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        problems.append(f"num_attention_heads {heads} does not divide hidden_size {config.hidden_size}")
    return problems
