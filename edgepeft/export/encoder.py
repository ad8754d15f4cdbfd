"""A BERT-like encoder with a classification head as an ONNX graph, from packed weights and adapter tensors.

    ids ─ word + type + position embeddings ─ LayerNorm ─► layer × L ─► pooler(token 0) ─ tanh ─ classifier ─► logits

    layer:  q|k|v  one AdapterMatMul_<format>_g3 ─ PaddedAttention ─ dense ─ SkipLayerNorm
            ─ dense ─ activation ─ dense ─ SkipLayerNorm

The classifier sees the first token alone, so the last layer computes that one: its q, and all that follows, has one row
for a text; only k and v still see every token.

The classifier is overridable like the adapter's tensors, and its number of labels symbolic; linears, embeddings and the
names of values are `emitter`'s.

An adapter's prompt comes before the words' embeddings, and all that follows has its tokens too; the first of them is
the one that is classified, as in Hugging Face PEFT. A prefix comes before keys and values alone: positions begin behind
it, and queries are filled up to its length for the time of attention, as a mask fits no fewer of them. Either is there
where the exported adapter has one, with 0 rows for adapters that have none.

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

from edgepeft.adapt.terms import PROMPT, STATES
from edgepeft.backbone.families import Family
from edgepeft.errors import ModelError
from edgepeft.export.emitter import BATCH, SEQUENCE, AdapterFile, Emitter, Weights, parent
from edgepeft.export.functions import FUNCTIONS
from edgepeft.export.graph import FLOAT, INT64, Dims, Graph, Value

LABELS, ROWS, TOTAL = "labels", "prompt", "prompted"
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
    mask = emit.widened(mask, 1)
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
        self.prompt = adapter.beside(self.module("word"), PROMPT)
        first = self.prompt or adapter.beside(self.module("k", 0), STATES)
        self.columns = None if first is None else self.count(self.fed(first, (ROWS, self.hidden)), 0, "prompt_length")

    def count(self, x: Value, axis: int, name: str) -> Value:
        """Return a size, [1]."""
        return self.graph.node("Shape", x, start=axis, end=axis + 1, dtype=INT64, shape=(1,), name=name)

    def widened(self, x: Value, fill: int) -> Value:
        """Return x [batch, sequence, ..] with as many columns of `fill` in front as the adapter has rows."""
        if self.columns is None:
            return x
        graph, dims = self.graph, (BATCH, TOTAL, *x.shape[2:])
        zeros = [graph.constant(f"zeros_{n}", np.zeros(n, np.int64)) for n in (1, 2 * len(dims) - 2)]
        pads = graph.node(
            "Concat", zeros[0], self.columns, zeros[1], axis=0, dtype=INT64, shape=(2 * len(dims),),
            name=f"{x.name}:pads",
        )  # fmt: skip
        kind = np.dtype(np.float32 if x.dtype == FLOAT else np.int64)
        value = graph.constant(f"fill_{fill}_{kind}", np.array(fill, kind))
        return graph.node("Pad", x, pads, value, mode="constant", dtype=x.dtype, shape=dims, name=f"{x.name}:prompted")

    def behind(self, module: str, ending: str, x: Value) -> Value:
        """Return x behind the rows that an adapter has for a module, if it has any."""
        rows = self.adapter.beside(module, ending)
        if rows is None:
            return x
        out = [Value(f"{module}:{ending}", FLOAT, (BATCH, TOTAL, self.hidden))]
        return self.call("Before", [x, self.fed(rows, (ROWS, self.hidden))], out)[0]

    def embeddings(self, ids: Value, types: Value) -> Value:
        word = self.behind(self.module("word"), PROMPT, self.embedding(self.module("word"), ids))
        if self.prompt is not None:
            self.tokens, types = (BATCH, TOTAL, self.hidden), self.widened(types, 0)
        kind = self.embedding(self.module("type"), types)
        place = self.embedding(self.module("position"), self.positions(types))
        both = self.graph.node("Add", kind, place, shape=self.tokens, name="embeddings:type+position")
        return self.skip_norm(self.module("embeddings"), word, both)

    def positions(self, ids: Value) -> Value:
        """Return a position for each token, from 0 on, or from where a prefix ends."""
        count = self.count(ids, 1, "sequence_length:1d")
        first, one = (self.graph.constant(f"position_{i}", np.array(i, np.int64)) for i in (0, 1))
        if self.columns is not None and self.prompt is None:
            count = self.graph.node("Add", count, self.columns, dtype=INT64, shape=(1,), name="sequence_end:1d")
            first = self.graph.node("Squeeze", self.columns, dtype=INT64, shape=(), name="position_first")
        count = self.graph.node("Squeeze", count, dtype=INT64, shape=(), name="sequence_length")
        return self.graph.node("Range", first, count, one, dtype=INT64, shape=self.tokens[1:2], name="position_ids")

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
            query, seen = self.linear(q, x), self.linears([k, v], whole)
        else:
            query, *seen = self.linears([q, k, v], x)
        seen = [self.behind(module, STATES, y) for module, y in zip((k, v), seen, strict=True)]
        mixed = self.attention(parent(q), [query, *seen, mask], first_token)
        x = self.skip_norm(name("attention"), self.linear(name("o"), mixed), x)
        wide = self.act(parent(name("up")), self.linear(name("up"), x))
        return self.skip_norm(name("layer"), self.linear(name("down"), wide, x), x)

    def act(self, name: str, x: Value) -> Value:
        op, attrs = ACTIVATIONS[self.settings.get("hidden_act", "gelu")]
        if op in FUNCTIONS:
            return self.call(op, [x], [Value(name, FLOAT, x.shape)])[0]
        return self.graph.node(op, x, shape=x.shape, name=name, **attrs)

    def attention(self, name: str, inputs: list[Value], first_token: bool) -> Value:
        """Return what the heads mix of queries, keys, values and mask: of one query, or as many as there are keys."""
        query, heads = inputs[0], {"num_heads": self.settings["num_attention_heads"]}
        if first_token:
            return self.call("PaddedAttention_one", inputs, [query._replace(name=name)], **heads)[0]
        if self.columns is None or self.prompt is not None:
            return self.call("PaddedAttention", inputs, [query._replace(name=name)], **heads)[0]
        wide = self.widened(query, 0)
        out = [wide._replace(name=f"{name}:prompted")]
        mixed = self.call("PaddedAttention", [wide, *inputs[1:]], out, **heads)[0]
        end, axis = (self.graph.constant(f"slice_{n}", np.array([n], np.int64)) for n in (2**62, 1))
        return self.graph.node("Slice", mixed, self.columns, end, axis, shape=query.shape, name=name)

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
