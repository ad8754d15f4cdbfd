"""The table of model families: where the parts of a backbone lie, in names, with no code of their own.

A row says, for each role, the module that plays it; `{i}` counts layers. Everything after the checkpoint speaks of
modules by the names the task model has (`bert.encoder.layer.0.attention.self.query`); `Family.rename` brings the names
of a checkpoint there, whether it was saved with a head or without. A tensor that no role claims is refused, since a
part nobody knows would be missing from the exported model.

Left out until a row needs them: decoders, tied weights, experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from edgepeft.errors import ModelError, unknown


@dataclasses.dataclass(frozen=True)
class Family:
    """One family. Module names are relative to `prefix`, the backbone's attribute in the task model.

    class_prefix: what transformers' class names of the family begin with.
    linears, embeddings, norms: role -> module name, `{i}` for the layer.  fresh: linears that a checkpoint may lack and
    that are then drawn anew.  heads: modules of the task model outside the backbone.  ignored: beginnings of checkpoint
    names that belong to other heads or hold no weights.  renames: endings of old checkpoints and what they became.
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

    def modules(self, roles: Mapping[str, str], settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield (module name in the task model, role) in the order of the layers; `settings` is config.json."""
        once = {role: name for role, name in roles.items() if "{i}" not in name}
        per_layer = {role: name for role, name in roles.items() if "{i}" in name}
        for i in range(settings[self.layers_setting]):
            yield from ((f"{self.prefix}.{name.format(i=i)}", role) for role, name in per_layer.items())
        yield from ((f"{self.prefix}.{name}", role) for role, name in once.items())

    def tensors(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Return {tensor name: kind} of the whole backbone; kinds are "linear", "bias", "embedding" and "norm"."""
        result = {}
        for module, _ in self.modules(self.linears, settings):
            result.update({f"{module}.weight": "linear", f"{module}.bias": "bias"})
        for module, _ in self.modules(self.embeddings, settings):
            result[f"{module}.weight"] = "embedding"
        for module, _ in self.modules(self.norms, settings):
            result.update({f"{module}.weight": "norm", f"{module}.bias": "norm"})
        return result

    def rename(self, name: str) -> str | None:
        """Return a checkpoint tensor's name in the task model, or None when it is not part of the backbone."""
        for old, new in self.renames.items():
            name = name[: -len(old)] + new if name.endswith(old) else name
        bare = name.removeprefix(f"{self.prefix}.")
        return None if name.startswith(self.ignored) or bare.startswith(self.ignored) else f"{self.prefix}.{bare}"


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
)

FAMILIES: dict[str, Family] = {row.tag: row for row in (BERT,)}


def family_of(settings: Mapping[str, Any], where: str) -> Family:
    """Return the family of a config.json. Raises ModelError naming the known ones for any other."""
    kind = settings.get("model_type")
    for family in FAMILIES.values():
        if kind in family.model_types:
            missing = family.layers_setting not in settings
            if missing or not isinstance(settings[family.layers_setting], int):
                raise ModelError(f"{where}: config.json has no whole number {family.layers_setting!r}. Copy it again.")
            return family
    known = [name for family in FAMILIES.values() for name in family.model_types]
    raise ModelError(f"{where}: " + unknown("model_type", str(kind), known))
