"""A BERT-like encoder with a classification head as an ONNX graph, from packed weights and adapter tensors.

    ids ─ word + type + position embeddings ─ LayerNorm ─► layer × L ─► pooler(token 0) ─ tanh ─ classifier ─► logits

    layer:  q|k|v  one AdapterMatMul_<format>_g3 ─ PaddedAttention ─ dense ─ SkipLayerNorm
            ─ dense ─ activation ─ dense ─ SkipLayerNorm

The classifier sees the first token alone, so the last layer computes that one: its q, and all that follows, has one row
for a text; only k and v still see every token.

The classifier is overridable like the adapter's tensors, and its number of labels symbolic; linears, embeddings and the
names of values are `emitter`'s.

Padding: -10000 is added to the scores of padded keys, which leaves them exactly 0 after the softmax. Attention, norms,
GELU and packed embeddings are functions of ours (`functions`), with bodies of ONNX Runtime's own.
Left out: relative positions, sequences beyond the position table (the runtime refuses those).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.backbone.families import Family
from edgepeft.errors import ModelError
from edgepeft.export.emitter import BATCH, SEQUENCE, AdapterFile, Emitter, Weights, parent
from edgepeft.export.functions import FUNCTIONS
from edgepeft.export.graph import FLOAT, INT64, Dims, Graph, Value

LABELS = "labels"
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("ErfGelu", {}),
    "gelu_python": ("ErfGelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
    "tanh": ("Tanh", {}),
}


def build(
    family: Family, settings: Mapping[str, Any], weights: Weights, adapter: AdapterFile, activation: str = "int8"
) -> Graph:
    """Return the graph of a sequence classifier; `settings` is config.json.

    Raises ModelError when the model has a part that would not come out exactly.
    """
    check_settings(settings, weights.folder / "config.json")
    graph = Graph("encoder")
    tokens = (BATCH, SEQUENCE)
    names = ("input_ids", "attention_mask", "token_type_ids")
    ids, mask, types = (graph.input(name, INT64, tokens) for name in names)
    emit = _Emitter(graph, family, settings, weights, adapter, activation)
    x = emit.embeddings(ids, types)
    layers = settings[family.layers_setting]
    for i in range(layers):
        x = emit.layer(i, x, mask, first_token=i == layers - 1)
    graph.output(emit.classifier(family.heads[0], x))
    return graph


def check_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Raise ModelError that names every setting with no exact counterpart here."""
    problems = []
    if settings.get("hidden_act", "gelu") not in tuple(ACTIVATIONS):
        problems.append(f"hidden_act {settings['hidden_act']!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    if settings.get("position_embedding_type", "absolute") != "absolute":
        problems.append(f"position_embedding_type {settings['position_embedding_type']!r}: only 'absolute' will do")
    for flag in ("is_decoder", "add_cross_attention"):
        if settings.get(flag):
            problems.append(f"{flag} is set: only encoders are supported")
    if problems:
        raise ModelError(f"{file}: cannot be exported: {'; '.join(problems)}.")


class _Emitter(Emitter):
    """Adds the modules of an encoder."""

    def __init__(
        self,
        graph: Graph,
        family: Family,
        settings: Mapping[str, Any],
        weights: Weights,
        adapter: AdapterFile,
        activation: str,
    ) -> None:
        super().__init__(graph, family, weights, adapter, activation)
        self.settings = settings
        self.hidden: int = settings["hidden_size"]
        self.tokens: Dims = (BATCH, SEQUENCE, self.hidden)

    def embeddings(self, ids: Value, types: Value) -> Value:
        word = self.embedding(self.module("word"), ids)
        kind = self.embedding(self.module("type"), types)
        place = self.embedding(self.module("position"), self.positions(ids))
        both = self.graph.node("Add", kind, place, shape=self.tokens, name="embeddings:type+position")
        return self.skip_norm(self.module("embeddings"), word, both)

    def positions(self, ids: Value) -> Value:
        """Return 0, 1, ... up to the sequence's length."""
        count = self.graph.node("Shape", ids, start=1, end=2, dtype=INT64, shape=(1,), name="sequence_length:1d")
        count = self.graph.node("Squeeze", count, dtype=INT64, shape=(), name="sequence_length")
        zero, one = (self.graph.constant(f"position_{i}", np.array(i, np.int64)) for i in (0, 1))
        return self.graph.node("Range", zero, count, one, dtype=INT64, shape=(SEQUENCE,), name="position_ids")

    def skip_norm(self, module: str, x: Value, skip: Value) -> Value:
        """LayerNorm(x + skip)."""
        inputs = [x, skip, self.weight(f"{module}.weight"), self.weight(f"{module}.bias")]
        epsilon = self.settings.get("layer_norm_eps", 1e-12)
        return self.call("SkipLayerNorm", inputs, [Value(module, FLOAT, x.shape)], epsilon=epsilon)[0]

    def layer(self, i: int, x: Value, mask: Value, first_token: bool) -> Value:
        """One layer over every token, or over the first of each text, which still attends to every token."""
        name = functools.partial(self.module, layer=i)
        q, k, v = (name(role) for role in "qkv")
        if first_token:
            whole, zero = x, self.graph.constant("first", np.zeros(1, np.int64))
            x = self.graph.node("Gather", x, zero, axis=1, shape=(BATCH, 1, self.hidden), name=f"{q}:first_token")
            inputs = [self.linear(q, x), *self.linears([k, v], whole), mask]
        else:
            inputs = [*self.linears([q, k, v], x), mask]
        kind, out = f"PaddedAttention{'_one' if first_token else ''}", Value(parent(q), FLOAT, x.shape)
        mixed = self.call(kind, inputs, [out], num_heads=self.settings["num_attention_heads"])[0]
        x = self.skip_norm(name("attention"), self.linear(name("o"), mixed), x)
        wide = self.act(parent(name("up")), self.linear(name("up"), x))
        return self.skip_norm(name("layer"), self.linear(name("down"), wide, x), x)

    def act(self, name: str, x: Value) -> Value:
        op, attrs = ACTIVATIONS[self.settings.get("hidden_act", "gelu")]
        if op in FUNCTIONS:
            return self.call(op, [x], [Value(name, FLOAT, x.shape)])[0]
        return self.graph.node(op, x, shape=x.shape, name=name, **attrs)

    def classifier(self, head: str, x: Value) -> Value:
        """tanh(dense(first token)) times the head, whose weights come with the adapter when it has them."""
        dense = self.module("pooler")
        zero = self.graph.constant("position_0", np.array(0, np.int64))
        shape = (BATCH, self.hidden)
        first = self.graph.node("Gather", x, zero, axis=1, shape=shape, name="first_token")
        pooled = self.graph.node("Tanh", self.linear(dense, first), shape=shape, name=parent(dense))
        weight, bias = self.head(f"{head}.weight", (LABELS, self.hidden)), self.head(f"{head}.bias", (LABELS,))
        return self.graph.node("Gemm", pooled, weight, bias, transB=1, shape=(BATCH, LABELS), name="logits")

    def head(self, name: str, dims: Dims) -> Value:
        value = self.adapter.replaced(name)
        return self.fed(value, dims) if value is not None else self.weight(name)
