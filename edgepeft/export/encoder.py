"""A BERT-like encoder with a classification head as an ONNX graph, from packed weights and adapter tensors.

    ids ─ word + type + position embeddings ─ LayerNorm ─► layer × L ─► pooler(token 0) ─ tanh ─ classifier ─► logits

    layer:  q|k|v  one AdapterMatMul_<format>_g3 ─ MultiHeadAttention ─ dense ─ sum ─ LayerNorm
            ─ dense ─ activation ─ dense ─ sum ─ LayerNorm

The classifier sees the first token alone, so the last layer computes that one: its q, and all that follows, has one row
for a text; only k and v still see every token. The residual is a Sum, which ONNX Runtime leaves as it is: an Add would
be fused into SkipLayerNormalization, whose CPU kernel takes three times as long as the two it replaces.

Every value is named after the Hugging Face module that computes it, so that `verify` can lay graph and PyTorch side by
side. Linears are the fused op where they are packed and MatMul + Add where they were kept in float; q, k and v fall
apart into single nodes when they cannot share one (different formats, a row count that is no multiple of 16, an s_in of
their own). Adapter tensors and the classifier are overridable inputs named as in the adapter's file, whose rank and
number of labels are symbolic. 4-bit embeddings are signed INT4 (code - 8), 8-bit ones INT8 (code - 128), both one XOR
away from the stored bytes, as the oldest supported ONNX Runtime has no unsigned zero point for them without a tensor;
scales become float32 at load, so that a row comes out exact.

Padding: -10000 is added to the scores of padded keys, which leaves them exactly 0 after the softmax: by ONNX Runtime's
key_padding_mask, or as an attention bias where there are fewer queries than keys: ONNX Runtime 1.20 misreads the mask
there, and a bias that is not spelt out for each head.
Left out: decoders, relative positions, sequences beyond the position table (the runtime refuses those).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from edgepeft.adapt.methods import METHODS, PREFIX
from edgepeft.artifact import DTYPES, read_json, read_tensors, tensor_header
from edgepeft.backbone.families import Family
from edgepeft.errors import ModelError
from edgepeft.export import ops
from edgepeft.export.graph import FLOAT, INT32, INT64, NONE, Dims, Graph, Place, Value
from edgepeft.quant.formats import EMBEDDING_FORMATS, TILE_ROWS

BATCH, SEQUENCE, LABELS = "batch", "sequence", "labels"
ADAPTER_FILE = "adapters/default/adapter_model.safetensors"
MICROSOFT = "com.microsoft"
HIDDEN = -10000.0  # added to a score: as ONNX Runtime does for a mask
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_python": ("Gelu", {"approximate": "none"}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
    "tanh": ("Tanh", {}),
}


class Weights:
    """A folder of packed weights (quantized/ or merged/), mapped, and `extra` tensors; `about` is quantized.json."""

    def __init__(self, folder: Path, extra: Mapping[str, np.ndarray] | None = None) -> None:
        self.folder = folder
        self.tensors = {**(extra or {}), **read_tensors(folder / "weights.safetensors")}
        self.about: dict[str, Any] = read_json(folder / "quantized.json")
        self.layers: dict[str, dict[str, Any]] = {layer["name"]: layer for layer in self.about["layers"]}

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelError(f"{self.folder}: no tensor {name}. The folder does not hold the model it names.") from None

    def format(self, module: str) -> str | None:
        """Return the weight format of a module, or None when it was kept in float."""
        return self.layers[module]["format"] if module in self.layers else None


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The adapter's tensors as values and places within its file; `path` is None for no adapter at all."""

    values: Mapping[str, Value]
    places: Mapping[str, Place]
    endings: Mapping[str, str]

    @classmethod
    def read(cls, path: Path | None, method: str = "lora", location: str = ADAPTER_FILE) -> AdapterFile:
        """Read the header of an adapter file that will lie at `location` beside the graph."""
        if path is None:
            return cls({}, {}, {})
        header, _, base = tensor_header(path)
        values, places = {}, {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            dtype = helper.np_dtype_to_tensor_dtype(np.dtype(DTYPES[entry["dtype"]]))
            values[name] = Value(name, dtype, tuple(entry["shape"]))
            places[name] = Place(location, base + start, end - start)
        return cls(values, places, METHODS[method].tensors)

    def term(self, module: str, term: str) -> Value | None:
        """Return the tensor that is one term of a module's adapter, or None."""
        return self.values.get(f"{PREFIX}{module}.{self.endings[term]}") if term in self.endings else None


def build(
    family: Family, settings: Mapping[str, Any], weights: Weights, adapter: AdapterFile, activation: str = "int8"
) -> Graph:
    """Return the graph of a sequence classifier; `settings` is config.json.

    Raises ModelError when the model has a part that would not come out exactly.
    """
    _check(settings)
    graph = Graph("encoder")
    tokens = (BATCH, SEQUENCE)
    names = ("input_ids", "attention_mask", "token_type_ids")
    ids, mask, types = (graph.input(name, INT64, tokens) for name in names)
    emit = _Emitter(graph, family, settings, weights, adapter, activation)
    x = emit.embeddings(ids, types)
    masks = emit.masks(mask)
    layers = settings[family.layers_setting]
    for i in range(layers):
        x = emit.layer(i, x, masks, first_token=i == layers - 1)
    graph.output(emit.classifier(family.heads[0], x))
    return graph


def _check(settings: Mapping[str, Any]) -> None:
    """Raise ModelError that names every setting with no exact counterpart here."""
    problems = []
    if settings.get("hidden_act", "gelu") not in ACTIVATIONS:
        problems.append(f"hidden_act {settings['hidden_act']!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    if settings.get("position_embedding_type", "absolute") != "absolute":
        problems.append(f"position_embedding_type {settings['position_embedding_type']!r}: only 'absolute' will do")
    for flag in ("is_decoder", "add_cross_attention"):
        if settings.get(flag):
            problems.append(f"{flag} is set: only encoders are supported")
    if problems:
        raise ModelError("export: " + "; ".join(problems) + ".")


def parent(module: str) -> str:
    """Return the module that a module lies in."""
    return module.rpartition(".")[0]


class _Emitter:
    """Adds modules to a graph, one method per kind."""

    def __init__(
        self,
        graph: Graph,
        family: Family,
        settings: Mapping[str, Any],
        weights: Weights,
        adapter: AdapterFile,
        activation: str,
    ) -> None:
        self.graph, self.settings, self.weights, self.adapter = graph, settings, weights, adapter
        self.family, self.activation = family, activation
        self.hidden: int = settings["hidden_size"]
        self.tokens: Dims = (BATCH, SEQUENCE, self.hidden)

    def module(self, role: str, layer: int | None = None) -> str:
        """Return the name of the module that plays a role."""
        family = self.family
        return f"{family.prefix}." + {**family.linears, **family.embeddings, **family.norms}[role].format(i=layer)

    # --- constants and adapter inputs ---

    def weight(self, name: str, **as_what: Any) -> Value:
        return self.graph.constant(name, self.weights[name], **as_what)

    def one(self) -> Value:
        return self.graph.constant("one", np.ones(1, np.float32))

    def empty(self, *shape: int) -> Value:
        """Return the shared half of a rank-0 adapter."""
        return self.graph.constant("empty_" + "x".join(map(str, shape)), np.zeros(shape, np.float16))

    def fed(self, value: Value, dims: Dims) -> Value:
        """Return an adapter tensor as an overridable input."""
        return self.graph.overridable(value, self.adapter.places[value.name], dims)

    def term(self, module: str, term: str, neutral: Value, dims: Dims) -> Value:
        """Return one term of a module's adapter; a and b keep their type, the others become float32."""
        value = self.adapter.term(module, term)
        if value is None:
            return neutral
        value = self.fed(value, dims)
        if term in ("a_rk", "b_nr") or value.dtype == FLOAT:
            return value
        return self.graph.node("Cast", value, to=FLOAT, shape=value.shape, name=f"{value.name}:float32")

    def terms(self, module: str, n: int, k: int) -> list[Value]:
        """Return a, b, gate and s_out of a module, neutral where its adapter has none."""
        rank = f"{module}.rank"
        return [
            self.term(module, "a_rk", self.empty(0, k), (rank, k)),
            self.term(module, "b_nr", self.empty(n, 0), (n, rank)),
            self.term(module, "gate", self.one(), (rank,)),
            self.term(module, "s_out", self.one(), (n,)),
        ]

    # --- modules ---

    def embeddings(self, ids: Value, types: Value) -> Value:
        word = self.embedding(self.module("word"), ids)
        kind = self.embedding(self.module("type"), types)
        place = self.embedding(self.module("position"), self.positions(ids))
        both = self.graph.node("Add", word, kind, shape=self.tokens, name="embeddings:word+type")
        total = self.graph.node("Add", both, place, shape=self.tokens, name="embeddings:sum")
        return self.norm(self.module("embeddings"), total)

    def positions(self, ids: Value) -> Value:
        """Return 0, 1, ... up to the sequence's length."""
        count = self.graph.node("Shape", ids, start=1, end=2, dtype=INT64, shape=(1,), name="sequence_length:1d")
        count = self.graph.node("Squeeze", count, dtype=INT64, shape=(), name="sequence_length")
        zero, one = (self.graph.constant(f"position_{i}", np.array(i, np.int64)) for i in (0, 1))
        return self.graph.node("Range", zero, count, one, dtype=INT64, shape=(SEQUENCE,), name="position_ids")

    def embedding(self, module: str, ids: Value) -> Value:
        """Rows of a table [V, K] by ids, exactly as dequantized."""
        tag = self.weights.format(module)
        if tag is None:
            table = self.weight(f"{module}.weight")
            return self.graph.node("Gather", table, ids, shape=(*ids.shape, *table.shape[1:]), name=module)
        return self.packed_embedding(module, tag, ids)

    def packed_embedding(self, module: str, tag: str, ids: Value) -> Value:
        spec, (rows, k) = EMBEDDING_FORMATS[tag], self.weights.layers[module]["shape"]
        shape, graph = (*ids.shape, k), self.graph
        scales = self.weight(f"{module}.qscale")
        if spec.bits == 4:
            signed: dict[str, Any] = {"dtype": TensorProto.INT4, "transform": lambda b: b ^ 0x88}
            codes = self.weight(f"{module}.qweight", shape=(rows, k), **signed)
            scales = graph.node("Cast", scales, to=FLOAT, shape=scales.shape, name=f"{scales.name}:float32")
            attrs: dict[str, Any] = {
                "block_size": spec.block,
                "gather_axis": 0,
                "quantize_axis": 1,
                "domain": MICROSOFT,
            }
            return graph.node("GatherBlockQuantized", codes, ids, scales, shape=shape, name=module, **attrs)
        codes = self.weight(f"{module}.qweight", dtype=TensorProto.INT8, transform=lambda b: b ^ 0x80)
        row = graph.node("Gather", codes, ids, dtype=TensorProto.INT8, shape=shape, name=f"{module}:codes")
        blocks = (*ids.shape, k // spec.block)
        scale = graph.node("Gather", scales, ids, dtype=scales.dtype, shape=blocks, name=f"{module}:scales")
        scale = graph.node("Cast", scale, to=FLOAT, shape=blocks, name=f"{module}:scales:float32")
        attrs = {"axis": -1, "block_size": spec.block}
        return graph.node("DequantizeLinear", row, scale, shape=shape, name=module, **attrs)

    def linears(self, modules: Sequence[str], x: Value) -> list[Value]:
        """W x + bias + adapter of modules that share x, in as few nodes as they allow."""
        tags = {self.weights.format(module) for module in modules}
        rows = [self.shape_nk(module)[0] for module in modules]
        own_s_in = any(self.adapter.term(module, "s_in") for module in modules)
        if len(tags) == 1 and None not in tags and not own_s_in and all(n % TILE_ROWS == 0 for n in rows):
            return self.packed_linears(modules, x)
        return [self.linear(module, x) for module in modules]

    def linear(self, module: str, x: Value) -> Value:
        if self.weights.format(module) is None:
            return self.float_linear(module, x)
        return self.packed_linears([module], x)[0]

    def shape_nk(self, module: str) -> tuple[int, int]:
        if module in self.weights.layers:
            n, k = self.weights.layers[module]["shape"]
            return n, k
        n, k = self.weights[f"{module}.weight"].shape
        return n, k

    def packed_linears(self, modules: Sequence[str], x: Value) -> list[Value]:
        """One fused op over modules whose weights stack along N."""
        graph, together = self.graph, "|".join(modules)
        tag = self.weights.layers[modules[0]]["format"]
        shapes = [self.shape_nk(module) for module in modules]
        rows, k = [n for n, _ in shapes], shapes[0][1]
        stacked = [
            graph.constant(f"{together}.{part}", *(self.weights[f"{m}.{part}"] for m in modules))
            for part in ("qweight", "qscale")
        ]
        s_in = self.term(modules[0], "s_in", self.one(), (k,))
        inputs = [x, *stacked, self.bias(together, modules, rows), s_in]
        for module, n in zip(modules, rows, strict=True):
            inputs += self.terms(module, n, k)
        outputs = [Value(m, FLOAT, (*x.shape[:-1], n)) for m, n in zip(modules, rows, strict=True)]
        kind = ops.op_type(tag, len(modules))
        graph.function(kind, lambda: ops.function_proto(tag, len(modules)))
        attrs = ops.attributes(k, rows, self.activation)
        return list(graph.nodes_outputs(kind, inputs, outputs, together, ops.DOMAIN, **attrs))

    def bias(self, together: str, modules: Sequence[str], rows: Sequence[int]) -> Value:
        """Return the biases in a row, zero where a module has none, padded to whole tiles."""
        padded = np.zeros(-(-sum(rows) // TILE_ROWS) * TILE_ROWS, np.float32)
        for module, n, end in zip(modules, rows, np.cumsum(rows), strict=True):
            if f"{module}.bias" in self.weights.tensors:
                padded[end - n : end] = self.weights[f"{module}.bias"][:n]
        return self.graph.constant(f"{together}.bias", padded)

    def float_linear(self, module: str, x: Value) -> Value:
        """The same equation in float, for a weight that was kept."""
        graph, (n, k) = self.graph, self.shape_nk(module)
        out, low = (*x.shape[:-1], n), (*x.shape[:-1], f"{module}.rank")
        scaled = self.times(x, self.term(module, "s_in", self.one(), (k,)), f"{module}:s_in")
        y = self.matmul(scaled, self.weight(f"{module}.weight"), out, f"{module}:base")
        a, b, gate, s_out = self.terms(module, n, k)
        if self.adapter.term(module, "a_rk") is not None:
            t = self.times(self.matmul(x, a, low, f"{module}:a"), gate, f"{module}:gate")
            y = graph.node("Add", y, self.matmul(t, b, out, f"{module}:b"), shape=out, name=f"{module}:sum")
        y = self.times(y, s_out, f"{module}:s_out")
        if f"{module}.bias" not in self.weights.tensors:
            return graph.node("Identity", y, shape=out, name=module)
        return graph.node("Add", y, self.weight(f"{module}.bias"), shape=out, name=module)

    def times(self, x: Value, factor: Value, name: str) -> Value:
        """x * factor, or x where the factor is the neutral one."""
        return x if factor == self.one() else self.graph.node("Mul", x, factor, shape=x.shape, name=name)

    def matmul(self, x: Value, matrix: Value, shape: Dims, name: str) -> Value:
        """x matrix^T in float32."""
        if matrix.dtype != FLOAT:
            matrix = self.graph.node("Cast", matrix, to=FLOAT, shape=matrix.shape, name=f"{matrix.name}:float32")
        flipped = matrix.shape[::-1]
        turned = self.graph.node("Transpose", matrix, perm=[1, 0], shape=flipped, name=f"{name}:transposed")
        return self.graph.node("MatMul", x, turned, shape=shape, name=name)

    def norm(self, module: str, x: Value) -> Value:
        gamma, beta = self.weight(f"{module}.weight"), self.weight(f"{module}.bias")
        attrs = {"axis": -1, "epsilon": self.settings.get("layer_norm_eps", 1e-12)}
        return self.graph.node("LayerNormalization", x, gamma, beta, shape=x.shape, name=module, **attrs)

    def skip_norm(self, module: str, x: Value, skip: Value) -> Value:
        """LayerNorm(x + skip)."""
        return self.norm(module, self.graph.node("Sum", x, skip, shape=x.shape, name=f"{module}:sum"))

    def masks(self, mask: Value) -> tuple[Value, Value]:
        """Return what hides padded keys: the mask of a whole layer, and the bias [B, heads, 1, S] of a single query."""
        graph, tokens, heads = self.graph, mask.shape, self.settings["num_attention_heads"]
        whole = graph.node("Cast", mask, to=INT32, dtype=INT32, shape=tokens, name="key_padding_mask")
        padding = graph.node("Cast", mask, to=FLOAT, shape=tokens, name="attention_bias:mask")
        padding = graph.node("Sub", self.one(), padding, shape=tokens, name="attention_bias:padding")
        axes = graph.constant("axes_1_2", np.array([1, 2], np.int64))
        padding = graph.node("Unsqueeze", padding, axes, shape=(BATCH, 1, 1, SEQUENCE), name="attention_bias:scores")
        hidden = graph.constant("hidden", np.full((1, heads, 1, 1), HIDDEN, np.float32))
        return whole, graph.node("Mul", padding, hidden, shape=(BATCH, heads, 1, SEQUENCE), name="attention_bias:heads")

    def layer(self, i: int, x: Value, masks: tuple[Value, Value], first_token: bool) -> Value:
        """One layer over every token, or over the first of each text, which still attends to every token."""
        name = functools.partial(self.module, layer=i)
        q, k, v = (name(role) for role in "qkv")
        if first_token:
            whole, zero = x, self.graph.constant("first", np.zeros(1, np.int64))
            x = self.graph.node("Gather", x, zero, axis=1, shape=(BATCH, 1, self.hidden), name=f"{q}:first_token")
            inputs = [self.linear(q, x), *self.linears([k, v], whole), NONE, NONE, masks[1]]
        else:
            inputs = [*self.linears([q, k, v], x), NONE, masks[0]]
        heads = {"num_heads": self.settings["num_attention_heads"], "domain": MICROSOFT}
        mixed = self.graph.node("MultiHeadAttention", *inputs, shape=x.shape, name=parent(q), **heads)
        x = self.skip_norm(name("attention"), self.linear(name("o"), mixed), x)
        wide = self.linear(name("up"), x)
        op, attrs = ACTIVATIONS[self.settings.get("hidden_act", "gelu")]
        wide = self.graph.node(op, wide, shape=wide.shape, name=parent(name("up")), **attrs)
        return self.skip_norm(name("layer"), self.linear(name("down"), wide), x)

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
        value = self.adapter.values.get(f"{PREFIX}{name}")
        return self.fed(value, dims) if value is not None else self.weight(name)
