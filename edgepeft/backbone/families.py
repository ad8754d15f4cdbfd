"""The table of model families: where the parts of a backbone lie, in names, with no code of their own.

A row says, for each role, the module that plays it; `{i}` counts layers. Everything after the checkpoint speaks of
modules by the names the task model has (`bert.encoder.layer.0.attention.self.query`); `Family.rename` brings the names
of a checkpoint there, whether it was saved with a head or without. A tensor that no role claims is refused, since a
part nobody knows would be missing from the exported model.

A decoder's head (`lm_head`) lies outside the prefix and is frozen like the rest; where config.json ties it to the word
embedding, the checkpoint holds one tensor for both and so does everything after it.

Left out until a row needs them: experts, backbones with both an encoder and a decoder.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from edgepeft.errors import ConfigError, ModelError, unknown

CAUSAL = "AutoModelForCausalLM"


@dataclasses.dataclass(frozen=True)
class Family:
    """One family. Module names are relative to `prefix`, the backbone's attribute in the task model.

    class_prefix: what transformers' class names of the family begin with.
    linears, embeddings, norms: role -> module name, `{i}` for the layer.  fresh: linears that a checkpoint may lack and
    that are then drawn anew.  heads: modules of the task model outside the backbone.  ignored: beginnings of checkpoint
    names, or of a part of them, that belong to other heads or hold no weights.  renames: endings of old checkpoints and
    what they became.
    head: a frozen linear outside the prefix, a decoder's output.  norm_bias: whether norms have a bias.
    biases: role -> whether that linear has a bias, or the setting of config.json that turns it on; the rest have one.
    sizes: role -> the settings that are its weight's shape, rows first.  divides: settings that must divide another.
    """

    tag: str
    model_types: tuple[str, ...]
    class_prefix: str
    prefix: str
    layers_setting: str
    linears: Mapping[str, str]
    embeddings: Mapping[str, str]
    norms: Mapping[str, str]
    fresh: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("classifier",)
    ignored: tuple[str, ...] = ()
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kind: str = "encoder"
    head: str = ""
    norm_bias: bool = True
    biases: Mapping[str, bool | str] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    divides: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def feedforward(self) -> tuple[str, str]:
        """The linears that a feed-forward begins and ends with, as module names with `{i}` for the layer."""
        return self.linears.get("up") or self.linears["gate_up"], self.linears["down"]

    def modules(self, roles: Mapping[str, str], settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield (module name in the task model, role) in the order of the layers; `settings` is config.json."""
        once = {role: name for role, name in roles.items() if "{i}" not in name}
        per_layer = {role: name for role, name in roles.items() if "{i}" in name}
        for i in range(settings[self.layers_setting]):
            yield from ((f"{self.prefix}.{name.format(i=i)}", role) for role, name in per_layer.items())
        yield from ((f"{self.prefix}.{name}", role) for role, name in once.items())

    def tensors(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Return {tensor name: kind} of the whole backbone; kinds are "linear", "bias", "embedding", "norm", "head"."""
        result = {}
        for module, role in self.modules(self.linears, settings):
            result[f"{module}.weight"] = "linear"
            if self.has_bias(role, settings):
                result[f"{module}.bias"] = "bias"
        for module, _ in self.modules(self.embeddings, settings):
            result[f"{module}.weight"] = "embedding"
        for module, _ in self.modules(self.norms, settings):
            result[f"{module}.weight"] = "norm"
            if self.norm_bias:
                result[f"{module}.bias"] = "norm"
        if self.head and not self.tied(settings):
            result[f"{self.head}.weight"] = "head"
        return result

    def shapes(self, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return {tensor name: shape} of weights and biases, as far as the family tells their sizes."""
        result, of_role = {}, self._shape_of_role(settings)
        for module, role in self.modules({**self.linears, **self.embeddings, **self.norms}, settings):
            if shape := of_role.get(role):
                result.update({f"{module}.weight": shape, f"{module}.bias": shape[:1]})
        return {**result, f"{self.head}.weight": of_role["head"]} if self.head else result

    def _shape_of_role(self, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return {role: shape of its weight}; a decoder's follow from its description."""
        if self.kind == "decoder":
            from edgepeft.backbone import decoder

            return decoder.shapes(decoder.describe(settings))
        return {role: tuple(settings[name] for name in names) for role, names in self.sizes.items()}

    def wrong_sizes(self, settings: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with the sizes in a config.json, in words."""
        names = dict.fromkeys((self.layers_setting, *itertools.chain(*self.sizes.values()), *self.divides))
        odd = {name: settings.get(name) for name in names if not _is_size(settings.get(name))}
        if odd:
            return [f"{name}: expected a whole number, at least 1; found {value!r:.60}" for name, value in odd.items()]
        return [
            f"{part} {settings[part]} does not divide {whole} {settings[whole]}"
            for part, whole in self.divides.items()
            if settings[whole] % settings[part]
        ]

    def has_bias(self, role: str, settings: Mapping[str, Any]) -> bool:
        """Tell whether the linears of a role have a bias."""
        found = self.biases.get(role, True)
        return bool(settings.get(found, False)) if isinstance(found, str) else found

    def tied(self, settings: Mapping[str, Any]) -> bool:
        """Tell whether the head is the word embedding; families differ in what a silent config.json means."""
        from edgepeft.backbone.decoder import describe

        return bool(self.head) and describe(settings).tied

    def rename(self, name: str) -> str | None:
        """Return a checkpoint tensor's name in the task model, or None when it is not part of the backbone."""
        for old, new in self.renames.items():
            name = name[: -len(old)] + new if name.endswith(old) else name
        if self.head and name == f"{self.head}.weight":
            return name
        bare = name.removeprefix(f"{self.prefix}.")
        ignored = any(bare.startswith(part) or f".{part}" in bare for part in self.ignored)
        return None if ignored else f"{self.prefix}.{bare}"


BERT = Family(
    tag="bert",
    model_types=("bert",),
    class_prefix="Bert",
    prefix="bert",
    layers_setting="num_hidden_layers",
    linears={
        "q": "encoder.layer.{i}.attention.self.query",
        "k": "encoder.layer.{i}.attention.self.key",
        "v": "encoder.layer.{i}.attention.self.value",
        "o": "encoder.layer.{i}.attention.output.dense",
        "up": "encoder.layer.{i}.intermediate.dense",
        "down": "encoder.layer.{i}.output.dense",
        "pooler": "pooler.dense",
    },
    embeddings={
        "word": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "type": "embeddings.token_type_embeddings",
    },
    norms={
        "embeddings": "embeddings.LayerNorm",
        "attention": "encoder.layer.{i}.attention.output.LayerNorm",
        "layer": "encoder.layer.{i}.output.LayerNorm",
    },
    fresh=("pooler",),
    ignored=("cls.", "classifier.", "qa_outputs.", "embeddings.position_ids", "embeddings.token_type_ids"),
    renames={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    sizes={
        **dict.fromkeys(("q", "k", "v", "o", "pooler"), ("hidden_size", "hidden_size")),
        "up": ("intermediate_size", "hidden_size"),
        "down": ("hidden_size", "intermediate_size"),
        "word": ("vocab_size", "hidden_size"),
        "position": ("max_position_embeddings", "hidden_size"),
        "type": ("type_vocab_size", "hidden_size"),
        **dict.fromkeys(("embeddings", "attention", "layer"), ("hidden_size",)),
    },
    divides={"num_attention_heads": "hidden_size"},
)

ATTENTION = {role: f"layers.{{i}}.self_attn.{role}_proj" for role in "qkvo"}
GATED = {role: f"layers.{{i}}.mlp.{role}_proj" for role in ("gate", "up", "down")}
FUSED = {
    "qkv": "layers.{i}.self_attn.qkv_proj",
    "o": ATTENTION["o"],
    "gate_up": "layers.{i}.mlp.gate_up_proj",
    "down": GATED["down"],
}
NORMS = {
    "input": "layers.{i}.input_layernorm",
    "post_attention": "layers.{i}.post_attention_layernorm",
    "final": "norm",
}
FEEDFORWARD_NORMS = {f"{side}_feedforward": f"layers.{{i}}.{side}_feedforward_layernorm" for side in ("pre", "post")}
HEAD_NORMS = {f"{role}_norm": f"layers.{{i}}.self_attn.{role}_norm" for role in "qk"}
NO_BIAS = dict.fromkeys((*ATTENTION, *GATED, *FUSED), False)
ATTENTION_BIAS = {**NO_BIAS, **dict.fromkeys(ATTENTION, "attention_bias")}


def _decoder(model_type: str, class_prefix: str, **flags: Any) -> Family:
    """Return the row of a causal language model; the flags are what it does not share with Llama's relatives."""
    same: dict[str, Any] = {
        "linears": {**ATTENTION, **GATED}, "embeddings": {"word": "embed_tokens"}, "norms": NORMS, "heads": (),
        "biases": NO_BIAS, "ignored": ("score.", "rotary_emb."), "norm_bias": False,
    }  # fmt: skip
    return Family(
        tag=model_type, model_types=(model_type,), class_prefix=class_prefix, prefix="model",
        layers_setting="num_hidden_layers", kind="decoder", head="lm_head", **{**same, **flags},
    )  # fmt: skip


DECODERS = (
    _decoder("llama", "Llama", biases={**ATTENTION_BIAS, **dict.fromkeys(GATED, "mlp_bias")}),
    _decoder("qwen2", "Qwen2", biases={**NO_BIAS, **dict.fromkeys("qkv", True)}),
    _decoder("qwen3", "Qwen3", biases=ATTENTION_BIAS, norms={**NORMS, **HEAD_NORMS}),
    _decoder("mistral", "Mistral"),
    _decoder("gemma2", "Gemma2", biases=ATTENTION_BIAS, norms={**NORMS, **FEEDFORWARD_NORMS}),
    _decoder("gemma3_text", "Gemma3", biases=ATTENTION_BIAS, norms={**NORMS, **FEEDFORWARD_NORMS, **HEAD_NORMS}),
    _decoder("phi3", "Phi3", linears=FUSED),
)

FAMILIES: dict[str, Family] = {row.tag: row for row in (BERT, *DECODERS)}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_task(family: Family, task: str, where: str) -> None:
    """Raise ConfigError when models of the family cannot be tuned for the task."""
    from edgepeft.train.tasks import TASKS

    fits = [tag for tag, row in TASKS.items() if (row.auto_class == CAUSAL) == (family.kind == "decoder")]
    if task not in fits:
        what = "a causal language model" if family.kind == "decoder" else "an encoder"
        raise ConfigError(f"--task {task}: {where} is {what} ({family.tag}). Give --task {' or '.join(fits)}.")


def _check_decoder(settings: Mapping[str, Any], where: str) -> None:
    """Raise ModelError when a decoder's settings cannot be described."""
    from edgepeft.backbone.decoder import describe

    try:
        describe(settings)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None


def family_of(settings: Mapping[str, Any], where: str, tensors: Iterable[str] = ()) -> Family:
    """Return the family of a config.json. Raises ModelError naming the known ones for any other, and for odd sizes.

    tensors: the names in the checkpoint, so that an unknown model's parts can be told from known ones.
    """
    kind = settings.get("model_type")
    for family in FAMILIES.values():
        if kind in family.model_types:
            if problems := family.wrong_sizes(settings):
                raise ModelError(f"{where}: config.json: {'; '.join(problems)}. Take the one that the model came with.")
            if family.kind == "decoder":
                _check_decoder(settings, where)
            return family
    known = [name for family in FAMILIES.values() for name in family.model_types]
    strange = unknown_parts(tensors)
    parts = f" Parts that no family has: {', '.join(strange[:4])}{', ...' if strange[4:] else ''}." if strange else ""
    raise ModelError(f"{where}: {unknown('model_type', str(kind), known)}{parts}")


def unknown_parts(tensors: Iterable[str]) -> list[str]:
    """Return the modules of a checkpoint, `{i}` for the layer, that have no role in any family."""
    rows = FAMILIES.values()
    known = {name for row in rows for roles in (row.linears, row.embeddings, row.norms) for name in roles.values()}
    known |= {row.head for row in rows}
    found = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name.rpartition(".")[0]) for name in tensors)
    return [module for module in found if not {module, module.partition(".")[2]} & known]
