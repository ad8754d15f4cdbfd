"""A causal language model as one ONNX graph for prompts, parts of prompts and single tokens.

    ids ─ embedding ─ RMSNorm ─► layer × L ─► last tokens ─ head ─► logits

    layer:  q|k|v  one AdapterMatMul_<format>_g3 ─ [RMSNorm of each head] ─ GroupQueryAttention ─ o ─ [RMSNorm]
            ─ SkipRMSNorm ─ gate|up  one AdapterMatMul_<format>_g2 ─ GatedActivation ─ down ─ [RMSNorm] ─ SkipRMSNorm

Rotation, cache and causal mask are GroupQueryAttention's. Each layer's keys and values come in as `past_key_values.<i>`
and go out as `present.<i>`, [batch, kv_heads, tokens, head_dim]: bound to one buffer of any capacity, a step writes its
own tokens and copies nothing. `attention_mask` [batch, past + new tokens] counts: the ones in a row are how many tokens
it has. Rows of a batch are padded on the right in the first run, then grow by one token each; a run of several tokens
on top of a past has one row.

`logits_to_keep` is how many of a row's last tokens get logits (1 unless fed; 0 or a number beyond the run: all). What
follows the last attention is computed for those alone, and every other layer for all tokens. Padding on the right is
not counted, so that a row shorter than others gets the logits of its own last token.

Attention windows: a token sees itself and window - 1 before it. So does `local_window_size` count from ONNX Runtime
1.24 on; older releases, and our kernels in them, see one more, which `edgepeft.runtime` makes up for. One no smaller
than the context is none.

Values are named as `emitter` says; one that the families compute in different places has a colon in its name, as have
those that are no module's. Left out: batches padded on the left, several new tokens on top of a past in more
than one row (ONNX Runtime has neither), key caches of fewer than 32 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.backbone.decoder import Decoder, describe, rope_tables
from edgepeft.backbone.families import Family
from edgepeft.errors import ModelError
from edgepeft.export.emitter import BATCH, SEQUENCE, AdapterFile, Emitter, Weights, parent
from edgepeft.export.graph import BOOL, FLOAT, INT32, INT64, NONE, Dims, Graph, Value

PAST, TOTAL, KEPT = "past_sequence", "total_sequence", "kept"
DIMS_MULTIPLE = 16  # of GroupQueryAttention's heads, and of what it rotates


def build(
    family: Family,
    settings: Mapping[str, Any],
    weights: Weights,
    adapter: AdapterFile,
    activation: str = "int8",
    context: int = 2048,
) -> Graph:
    """Return the graph of a causal language model; `settings` is config.json, `context` the most tokens it can see.

    Raises ModelError when the model has a part that would not come out exactly.
    """
    check_settings(settings, weights.folder / "config.json")
    about = describe(settings)
    if not 1 <= context <= about.positions:
        raise ModelError(f"a context of {context} tokens is not within 1 to {about.positions}, the model's positions.")
    graph = Graph("decoder")
    emit = _Emitter(graph, family, about, weights, adapter, activation)
    emit.inputs(settings, context)
    x = emit.embedded()
    h = emit.norm(emit.module("input", 0), x)
    caches = []
    for i in range(about.layers):
        h, x, cache = emit.layer(i, h, x)
        caches += cache
    for value in (emit.logits(h), *caches):
        graph.output(value)
    return graph


def check_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Raise ModelError that names every number that the graph cannot have."""
    about = describe(settings)
    problems = [
        f"{what} of {found} is no multiple of {DIMS_MULTIPLE}, as ONNX Runtime's attention asks"
        for what, found in (("a head size", about.head_dim), ("a rotated part of the head", about.rotary_dims))
        if found % DIMS_MULTIPLE
    ]
    if 1 in about.windows:
        problems.append("an attention window of one token is none in older releases of ONNX Runtime")
    if problems:
        raise ModelError(f"{file}: cannot be exported: {'; '.join(problems)}.")


class _Emitter(Emitter):
    """Adds the modules of a decoder."""

    def __init__(
        self, graph: Graph, family: Family, about: Decoder, weights: Weights, adapter: AdapterFile, activation: str
    ) -> None:
        super().__init__(graph, family, weights, adapter, activation)
        self.about = about
        self.tokens: Dims = (BATCH, SEQUENCE, about.hidden)

    def stored(self, module: str) -> str:
        """Return where a weight is stored: a tied head is the word embedding."""
        return self.module("word") if self.about.tied and module == self.family.head else module

    # --- inputs ---

    def inputs(self, settings: Mapping[str, Any], context: int) -> None:
        """Add the graph's inputs and what all layers make of them."""
        graph, about = self.graph, self.about
        self.ids = graph.input("input_ids", INT64, (BATCH, SEQUENCE))
        mask = graph.input("attention_mask", INT64, (BATCH, TOTAL))
        shape = (BATCH, about.kv_heads, PAST, about.head_dim)
        self.pasts = [
            [graph.input(f"past_key_values.{i}.{part}", FLOAT, shape) for part in ("key", "value")]
            for i in range(about.layers)
        ]
        keep = graph.optional("logits_to_keep", np.ones(1, np.int64), (1,))
        self.lengths = self.counted(mask)
        self.kept = self.kept_tokens(keep)
        self.ropes = [
            [graph.constant(f"rope_{kind}.{name}", table) for name, table in zip(("cos", "sin"), pair, strict=True)]
            for kind, pair in enumerate(rope_tables(settings, context))
        ]
        self.windows = [window if 0 < window < context else -1 for window in about.windows]

    def counted(self, mask: Value) -> tuple[Value, Value]:
        """Return what GroupQueryAttention asks for: each row's tokens less one, and the longest row's."""
        graph = self.graph
        minus_one = graph.constant("minus_one", np.full(1, -1, np.int64))
        axis = graph.constant("axis_1", np.ones(1, np.int64))
        count = graph.node("ReduceSum", mask, axis, keepdims=0, dtype=INT64, shape=(BATCH,), name="tokens")
        self.last = graph.node("Add", count, minus_one, dtype=INT64, shape=(BATCH,), name="tokens:last")
        last = graph.node("Cast", self.last, to=INT32, dtype=INT32, shape=(BATCH,), name="seqlens_k")
        total = graph.node("Shape", mask, start=1, end=2, dtype=INT64, shape=(1,), name="total:1d")
        total = graph.node("Squeeze", total, dtype=INT64, shape=(), name="total")
        return last, graph.node("Cast", total, to=INT32, dtype=INT32, shape=(), name="total_sequence_length")

    def kept_tokens(self, keep: Value) -> Value:
        """Return which columns of the run get logits, int64 [batch, kept, 1]: a row's last ones.

        Its last token is the run's last column, or where a first run is padded the one before the padding.
        """
        graph, minus_one = self.graph, self.graph.constant("minus_one", np.full(1, -1, np.int64))

        def number(op: str, *inputs: Value, name: str, dims: Dims = (1,), **attrs: Any) -> Value:
            return graph.node(op, *inputs, dtype=INT64, shape=dims, name=f"logits_to_keep:{name}", **attrs)

        zero, axis = graph.constant("zero_1d", np.zeros(1, np.int64)), graph.constant("axis_1", np.ones(1, np.int64))
        columns = number("Shape", self.ids, name="columns", start=1, end=2)
        none = graph.node("Equal", keep, zero, dtype=BOOL, shape=(1,), name="logits_to_keep:all")
        count = number("Min", number("Where", none, columns, keep, name="asked"), columns, name="count")
        ends = [number("Add", one, minus_one, name=f"last_{name}") for name, one in (("run", columns), ("kept", count))]
        last = number(
            "Max", number("Min", self.last, ends[0], name="own", dims=(BATCH,)), ends[1], name="last", dims=(BATCH,)
        )
        first = number("Sub", last, ends[1], name="first", dims=(BATCH,))
        start, step = (graph.constant(f"{name}_0d", np.array(one)) for name, one in (("zero", 0), ("one", 1)))
        end = number("Squeeze", count, name="to", dims=())
        place = number("Range", start, end, step, name="places", dims=(KEPT,))
        place = number(
            "Add",
            number("Unsqueeze", first, axis, name="rows", dims=(BATCH, 1)),
            place,
            name="column",
            dims=(BATCH, KEPT),
        )
        return number("Unsqueeze", place, minus_one, name="index", dims=(BATCH, KEPT, 1))

    def embedded(self) -> Value:
        """Return the tokens' embeddings, scaled where the family does so."""
        module, scale = self.module("word"), self.about.embedding_scale
        if scale == 1:
            return self.embedding(module, self.ids)
        rows = self.embedding(module, self.ids, f"{module}:rows")
        factor = self.graph.constant("embedding_scale", np.array(scale, np.float32))
        return self.graph.node("Mul", rows, factor, shape=self.tokens, name=f"{module}:scaled")

    # --- layers ---

    def norm_weight(self, module: str) -> Value:
        """Return a norm's weight as it multiplies."""
        name, offset = f"{module}.weight", np.float32(self.about.norm_offset)
        own = self.adapter.replaced(name)
        if own is None:
            return self.graph.constant(name, self.weights[name] + offset)
        own = self.fed(own, own.shape)
        if not offset:
            return own
        plus = self.graph.constant("norm_offset", np.array(offset, np.float32))
        return self.graph.node("Add", own, plus, shape=own.shape, name=f"{own.name}:offset")

    def norm(self, module: str, x: Value, name: str = "") -> Value:
        """Return the norm of x along its last axis."""
        out = [Value(name or module, FLOAT, x.shape)]
        return self.call("RMSNorm", [x, self.norm_weight(module)], out, epsilon=self.about.epsilon)[0]

    def skip_norm(self, module: str, x: Value, skip: Value, sum_name: str) -> tuple[Value, Value]:
        """Return the norm of x + skip, and x + skip."""
        out = [Value(module, FLOAT, x.shape), Value(sum_name, FLOAT, x.shape)]
        inputs = [x, skip, self.norm_weight(module)]
        normed, total = self.call("SkipRMSNorm", inputs, out, epsilon=self.about.epsilon)
        return normed, total

    def layer(self, i: int, h: Value, x: Value) -> tuple[Value, Value, list[Value]]:
        """Return one layer's sum, behind the norm that comes next, and alone; and its cache. `h` is the norm of x."""
        name, sandwich = functools.partial(self.module, layer=i), self.about.sandwich
        mixed, cache = self.attention(i, h)
        last_layer = i == self.about.layers - 1
        if last_layer:
            mixed, x = self.last_tokens(mixed), self.last_tokens(x)
        out = self.linear(name("o"), mixed)
        out = self.norm(name("post_attention"), out) if sandwich else out
        before = name("pre_feedforward" if sandwich else "post_attention")
        h, x = self.skip_norm(before, x, out, f"{parent(before)}:attention")
        out = self.feedforward(i, h)
        out = self.norm(name("post_feedforward"), out) if sandwich else out
        after = self.module("final") if last_layer else self.module("input", i + 1)
        h, x = self.skip_norm(after, x, out, parent(before))
        return h, x, cache

    def last_tokens(self, x: Value) -> Value:
        """Return the tokens that get logits."""
        shape = (BATCH, KEPT, *x.shape[2:])
        return self.graph.node("GatherND", x, self.kept, batch_dims=1, shape=shape, name=f"{x.name}:last")

    def attention(self, i: int, h: Value) -> tuple[Value, list[Value]]:
        """Return the heads' mixture [batch, sequence, heads * head_dim] before o, and the new keys and values."""
        about, module = self.about, parent(self.module("o", i))
        cache_shape = (BATCH, about.kv_heads, TOTAL, about.head_dim)
        cache = [Value(f"present.{i}.{part}", FLOAT, cache_shape) for part in ("key", "value")]
        mixed = Value(f"{module}:mixed", FLOAT, (BATCH, SEQUENCE, about.heads * about.head_dim))
        inputs = [*self.queries_keys_values(i, h), *self.pasts[i], *self.lengths, *self.ropes[about.ropes[i]]]
        attrs: dict[str, Any] = {
            "num_heads": about.heads, "kv_num_heads": about.kv_heads, "scale": about.attention_scale,
            "softcap": about.attention_softcap, "local_window_size": self.windows[i], "do_rotary": 1,
            "rotary_interleaved": 0,
        }  # fmt: skip
        self.call("GroupQueryAttention", inputs, [mixed, *cache], **attrs)
        return mixed, cache

    def queries_keys_values(self, i: int, h: Value) -> list[Value]:
        """Return q, k and v; or all three in one value and nothing else."""
        if self.about.fused:
            return [self.linear(self.module("qkv", i), h), NONE, NONE]
        q, k, v = self.linears([self.module(role, i) for role in "qkv"], h)
        if self.about.head_norms:
            q = self.head_norm(self.module("q_norm", i), q, self.about.heads)
            k = self.head_norm(self.module("k_norm", i), k, self.about.kv_heads)
        return [q, k, v]

    def head_norm(self, module: str, x: Value, heads: int) -> Value:
        """Return the norm of each head by itself."""
        graph, apart = self.graph, (0, 0, heads, self.about.head_dim)
        shape = graph.constant(f"shape_{heads}_heads", np.array(apart, np.int64))
        x = graph.node("Reshape", x, shape, shape=(BATCH, SEQUENCE, *apart[2:]), name=f"{module}:heads")
        flat = graph.constant("shape_flat", np.array((0, 0, -1), np.int64))
        together = (BATCH, SEQUENCE, heads * self.about.head_dim)
        normed = self.norm(module, x, f"{module}:normed")  # some families turn the heads before
        return graph.node("Reshape", normed, flat, shape=together, name=f"{module}:flat")

    def feedforward(self, i: int, h: Value) -> Value:
        """Return down(act(gate) * up)."""
        down = self.module("down", i)
        gate, up = self.gate_and_up(i, h)
        out = [Value(f"{parent(down)}:gated", FLOAT, gate.shape)]
        return self.linear(down, self.call(f"GatedActivation_{self.about.activation}", [gate, up], out)[0], h)

    def gate_and_up(self, i: int, h: Value) -> list[Value]:
        if not self.about.fused:
            return self.linears([self.module("gate", i), self.module("up", i)], h)
        both = self.module("gate_up", i)
        half = (*h.shape[:-1], self.about.inner)
        outs = [Value(f"{both}:{part}", FLOAT, half) for part in ("gate", "up")]
        attrs: dict[str, Any] = {"axis": -1, "num_outputs": 2}
        return list(self.graph.nodes_outputs("Split", [self.linear(both, h)], outs, f"{both}:split", **attrs))

    # --- the head ---

    def logits(self, h: Value) -> Value:
        """Return softcap(head(h)), declared as it comes by default: onnxruntime-genai reads the 1 there."""
        cap, shape = self.about.logits_softcap, (BATCH, 1, self.about.vocabulary)
        if not cap:
            return self.linear(self.family.head, h, name="logits")._replace(shape=shape)
        out, graph = self.linear(self.family.head, h), self.graph
        limit = graph.constant("logits_softcap", np.array(cap, np.float32))
        out = graph.node("Div", out, limit, shape=out.shape, name="logits:over_softcap")
        out = graph.node("Tanh", out, shape=out.shape, name="logits:tanh")
        return graph.node("Mul", out, limit, shape=shape, name="logits")
