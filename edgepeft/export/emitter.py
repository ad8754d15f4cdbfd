"""What graphs of any architecture are made of: packed weights, the adapter's file, and the modules that read them.

    linear      y = s_out * ( W (s_in * x) + B (gate * (A x)) ) + bias       one fused op, or MatMuls for a float weight
    embedding   rows of a table by ids, exactly as dequantized

Every value is named after the Hugging Face module that computes it, so that `verify` can lay graph and PyTorch side by
side. Linears are the fused op where they are packed and MatMul + Add where they were kept in float; linears that share
their input share one node, and fall apart into single ones when they cannot (different formats, a row count that is no
multiple of 16, an s_in of their own). Adapter tensors are overridable inputs named as in the adapter's file, whose rank
is symbolic. Their defaults lie in that file, but for B: the file's is PEFT's [N, R], the graph's [R, N]. Where there is
a low-rank part its gate is an input too, neutral by default: [texts, 1.., R] lets the texts of a run have adapters of
their own, stacked along R (see `edgepeft.runtime.mixing`).

An embedding that is also a head lies in tiles, and both read the same constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from edgepeft.adapt.terms import BOTTLENECK, ENDINGS, HALVES, PARALLEL, PREFIX, ROUTER, TERMS_FILE, aliases
from edgepeft.artifact import DTYPES, read_json, read_tensors, tensor_header
from edgepeft.backbone.families import Family
from edgepeft.errors import ModelError
from edgepeft.export import ops
from edgepeft.export.branches import BRANCHES
from edgepeft.export.functions import FUNCTIONS
from edgepeft.export.graph import FLOAT, FLOAT16, Dims, Graph, Place, Value
from edgepeft.quant.formats import TILE_ROWS
from edgepeft.runtime.adapters import UP, for_graph

BATCH, SEQUENCE = "batch", "sequence"
ADAPTER_FILE = "adapters/default/adapter_model.safetensors"


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
    """The adapter's tensors as values, and where they are: places within its file, or B turned.

    swappable: another may take its place at run time.
    """

    values: Mapping[str, Value]
    places: Mapping[str, Place | np.ndarray]
    swappable: bool

    @classmethod
    def read(cls, path: Path | None, location: str = ADAPTER_FILE) -> AdapterFile:
        """Read the header of a PEFT file that will lie at `location` beside the graph, or of the terms beside it.

        None is no adapter at all, as in a merged model.
        """
        if path is None:
            return cls({}, {}, swappable=False)
        if (terms := path.with_name(TERMS_FILE)).exists():
            path, location = terms, f"{location.rpartition('/')[0]}/{TERMS_FILE}"
        header, metadata, base = tensor_header(path)
        stored = {name: name for name in header} | aliases(metadata)
        tensors = read_tensors(path)
        turned = for_graph({name: tensors[source] for name, source in stored.items() if name.endswith(UP)})
        values: dict[str, Value] = {}
        places: dict[str, Place | np.ndarray] = {}
        for name, source in stored.items():
            entry = header[source]
            start, end = entry["data_offsets"]
            dtype = helper.np_dtype_to_tensor_dtype(np.dtype(DTYPES[entry["dtype"]]))
            values[name] = Value(name, dtype, turned[name].shape if name in turned else tuple(entry["shape"]))
            places[name] = turned.get(name, Place(location, base + start, end - start))
        return cls(values, places, swappable=True)

    def term(self, module: str, term: str) -> Value | None:
        """Return the tensor that is one term of a module's adapter, or None."""
        return self.values.get(f"{PREFIX}{module}.{ENDINGS[term]}")

    def beside(self, module: str, ending: str) -> Value | None:
        """Return a tensor of what lies beside a module, or None."""
        return self.values.get(f"{PREFIX}{module}.{ending}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {input of the graph: shape of its default}."""
        return {name: tuple(int(size) for size in value.shape) for name, value in self.values.items()}

    def replaced(self, name: str) -> Value | None:
        """Return the tensor that takes the place of one of the base's, or None."""
        return self.values.get(f"{PREFIX}{name}")


def parent(module: str) -> str:
    """Return the module that a module lies in."""
    return module.rpartition(".")[0]


class Emitter:
    """Adds modules to a graph, one method per kind."""

    def __init__(self, graph: Graph, family: Family, weights: Weights, adapter: AdapterFile, activation: str) -> None:
        self.graph, self.family, self.weights, self.adapter = graph, family, weights, adapter
        self.activation = activation
        self._fed: dict[str, Value] = {}

    def module(self, role: str, layer: int | None = None) -> str:
        """Return the name of the module that plays a role."""
        family = self.family
        return f"{family.prefix}." + {**family.linears, **family.embeddings, **family.norms}[role].format(i=layer)

    def stored(self, module: str) -> str:
        """Return the module under whose name a weight is stored: itself, unless it is tied."""
        return module

    def format(self, module: str) -> str | None:
        """Return the weight format of a module, or None when it was kept in float."""
        return self.weights.format(self.stored(module))

    # --- constants and adapter inputs ---

    def weight(self, name: str) -> Value:
        """Return a stored tensor as a constant, or what the adapter has in its place."""
        own = self.adapter.replaced(name)
        if own is not None:
            return self.fed(own, own.shape)
        return self.graph.constant(name, self.weights[name])

    def one(self) -> Value:
        """Return the neutral scale."""
        return self.graph.constant("one", np.ones(1, np.float32))

    def fed(self, value: Value, dims: Dims) -> Value:
        """Return an adapter tensor as an overridable input."""
        if value.name not in self._fed:
            self._fed[value.name] = self.graph.overridable(value, self.adapter.places.get(value.name), dims)
        return self._fed[value.name]

    def empty(self, module: str, term: str, shape: Dims, dims: Dims) -> Value:
        """Return the rank-0 side of a module without an adapter: an input that another adapter may fill, or nothing."""
        if self.adapter.swappable:
            return self.fed(Value(f"{PREFIX}{module}.{ENDINGS[term]}", FLOAT16, shape), dims)
        zero: Any = shape  # numbers alone, the rank being 0
        return self.graph.constant("empty_" + "x".join(map(str, shape)), np.zeros(zero, np.float16))

    def term(self, module: str, term: str, neutral: Value, dims: Dims) -> Value:
        """Return one term of a module's adapter; a and b keep their type, the others are float32."""
        value = self.adapter.term(module, term)
        if value is None:
            return neutral
        if term not in HALVES and value.dtype != FLOAT:
            raise ModelError(f"{value.name}: expected float32. The adapter's folder was not written by edgepeft.")
        return self.fed(value, dims)

    def low_rank(self, module: str, n: int, k: int) -> list[Value]:
        """Return a [R, K] and b [R, N] of a module; rank 0 where its adapter has none."""
        found, rank = [], f"{module}.rank"
        for term, shape, dims in (("a_rk", (0, k), (rank, k)), ("b_nr", (0, n), (rank, n))):
            value = self.adapter.term(module, term)
            found.append(self.empty(module, term, shape, dims) if value is None else self.fed(value, dims))
        return found

    def gate(self, module: str, x: Value, a: Value) -> Value:
        """Return a module's gate [1.., R] or [1.., 1], which [texts, 1.., R] may override; its experts' shares of x."""
        leading = x.shape[:-1]
        ones = (1,) * len(leading)
        dims = (leading[0], *ones[1:], f"{module}.gates")
        if (router := self.adapter.beside(module, ROUTER)) is not None:
            router = self.fed(router, (f"{module}.experts", router.shape[1]))
            shares = Value(f"{module}:gate", FLOAT, (*leading, f"{module}.gates"))
            return self.call("RouterGate", [x, router, a], [shares])[0]
        if (own := self.adapter.term(module, "gate")) is not None:
            return self.graph.overridable(own._replace(shape=(*ones, *own.shape)), self.adapter.places[own.name], dims)
        if not self.adapter.swappable:
            return self.one()
        return self.graph.optional(f"{PREFIX}{module}.{ENDINGS['gate']}", np.ones((*ones, 1), np.float32), dims)

    def terms(self, module: str, n: int, k: int, x: Value) -> list[Value]:
        """Return a, b, gate and s_out of a module that reads x, neutral where its adapter has none."""
        a, b = self.low_rank(module, n, k)
        return [a, b, self.gate(module, x, a), self.term(module, "s_out", self.one(), (n,))]

    # --- modules ---

    def call(self, name: str, inputs: Sequence[Value], outputs: Sequence[Value], **attrs: Any) -> Sequence[Value]:
        """Add a node of one of our functions, named after its first output."""
        self.graph.function(name, (FUNCTIONS if name in FUNCTIONS else BRANCHES)[name].proto)
        return self.graph.nodes_outputs(name, inputs, outputs, outputs[0].name, ops.DOMAIN, **attrs)

    def embedding(self, module: str, ids: Value, name: str = "") -> Value:
        """Rows of a table [V, K] by ids, exactly as dequantized, and what the adapter adds to them."""
        name = name or module
        if self.adapter.term(module, "a_rk") is None:
            return self.rows(module, ids, name)
        rows, (v, k) = self.rows(module, ids, f"{name}:table"), self.shape_nk(module)
        a, b = self.low_rank(module, k, v)
        rank = a.shape[0]
        picked = self.graph.node(
            "Gather", a, ids, axis=1, dtype=a.dtype, shape=(rank, *ids.shape), name=f"{name}:a"
        )  # fmt: skip
        order = [*range(1, len(ids.shape) + 1), 0]
        picked = self.graph.node(
            "Transpose", self.float32(picked), perm=order, shape=(*ids.shape, rank), name=f"{name}:ranks"
        )  # fmt: skip
        added = self.graph.node("MatMul", picked, self.float32(b), shape=rows.shape, name=f"{name}:b")
        return self.graph.node("Add", rows, added, shape=rows.shape, name=name)

    def rows(self, module: str, ids: Value, name: str) -> Value:
        """Rows of a table [V, K] by ids."""
        tag = self.format(module)
        if tag is None:
            table = self.weight(f"{module}.weight")
            return self.graph.node("Gather", table, ids, shape=(*ids.shape, *table.shape[1:]), name=name)
        kind = "PackedEmbedding" if self.weights.layers[module].get("layout") == "tiles" else "RowEmbedding"
        w, scale = (self.weight(f"{module}.{part}") for part in ("qweight", "qscale"))
        shape = (*ids.shape, self.shape_nk(module)[1])
        return self.call(f"{kind}_{tag}", [ids, w, scale], [Value(name, FLOAT, shape)])[0]

    def linears(self, modules: Sequence[str], x: Value) -> list[Value]:
        """W x + bias + adapter of modules that share x, in as few nodes as they allow."""
        tags = {self.format(module) for module in modules}
        rows = [self.shape_nk(module)[0] for module in modules]
        own_s_in = any(self.adapter.term(module, "s_in") for module in modules)
        alike = len(tags) == len({self.offset_blocks(module) for module in modules}) == 1
        if alike and None not in tags and not own_s_in and all(n % TILE_ROWS == 0 for n in rows):
            return self.packed_linears(modules, x)
        return [self.linear(module, x) for module in modules]

    def linear(self, module: str, x: Value, feedforward: Value | None = None, name: str = "") -> Value:
        """W x + bias + adapter of one module, as `name` or the module's.

        feedforward: what went into the feed-forward that it ends.
        """
        behind, beside = (self.adapter.beside(module, endings[0]) for endings in (BOTTLENECK, PARALLEL))
        name = f"{module}:linear" if behind or beside else name or module
        if self.format(module) is None:
            y = self.float_linear(module, x, name)
        else:
            y = self.packed_linears([module], x, [name])[0]
        if behind:
            return self.bottleneck(module, y, y, BOTTLENECK)
        if beside and feedforward is not None:
            return self.bottleneck(module, y, feedforward, PARALLEL)
        return y

    def bottleneck(self, module: str, y: Value, h: Value, endings: Sequence[str]) -> Value:
        """y and a module's bottleneck over h."""
        width, n = f"{module}.width", y.shape[-1]
        dims = ((width, h.shape[-1]), (width,), (n, width), (n,))
        found = [self.adapter.beside(module, ending) for ending in endings]
        parts = [self.fed(part, each) for part, each in zip(found, dims, strict=True) if part is not None]
        return self.call("Bottleneck", [y, h, *parts], [Value(module, FLOAT, y.shape)])[0]

    def shape_nk(self, module: str) -> tuple[int, int]:
        """Return N and K of a module's weight."""
        stored = self.stored(module)
        packed = self.weights.layers.get(stored)
        n, k = packed["shape"] if packed else self.weights[f"{stored}.weight"].shape
        return n, k

    def offset_blocks(self, module: str) -> int:
        """Return J of a module whose weight has offsets, else 0."""
        return self.weights.layers.get(self.stored(module), {}).get("offset_blocks", 0)

    def packed_linears(self, modules: Sequence[str], x: Value, names: Sequence[str] = ()) -> list[Value]:
        """One fused op over modules whose weights stack along N; values get `names`, or the modules'."""
        graph = self.graph
        stored = [self.stored(module) for module in modules]
        tag = self.weights.layers[stored[0]]["format"]
        shapes = [self.shape_nk(module) for module in modules]
        rows, k = [n for n, _ in shapes], shapes[0][1]
        w, scale = (
            graph.constant(f"{'|'.join(stored)}.{part}", *(self.weights[f"{m}.{part}"] for m in stored))
            for part in ("qweight", "qscale")
        )
        offset = []
        if self.offset_blocks(modules[0]):
            turned = np.concatenate([self.weights[f"{m}.qoffset"] for m in stored]).T
            offset.append(graph.constant(f"{'|'.join(stored)}.qoffset", turned))
        s_in = self.term(modules[0], "s_in", self.one(), (k,))
        inputs = [x, w, scale, s_in]
        for module, n in zip(modules, rows, strict=True):
            inputs += [*self.terms(module, n, k, x), self.bias(module, n)]
        inputs += offset
        outputs = [Value(m, FLOAT, (*x.shape[:-1], n)) for m, n in zip(names or modules, rows, strict=True)]
        kind = ops.op_type(tag, len(modules), bool(offset))
        graph.function(kind, lambda: ops.function_proto(tag, len(modules), bool(offset)))
        attrs = ops.attributes(k, rows, self.activation)
        return list(graph.nodes_outputs(kind, inputs, outputs, "|".join(names or modules), ops.DOMAIN, **attrs))

    def bias(self, module: str, n: int) -> Value:
        """Return the bias of a module's linear, the neutral zero where it has none."""
        own = self.own_bias(module, n)
        return self.graph.constant("zero", np.zeros(1, np.float32)) if own is None else own

    def own_bias(self, module: str, n: int) -> Value | None:
        """Return the bias of a module, its adapter's where it has one, or None."""
        value = self.adapter.term(module, "bias")
        if value is not None:
            return self.fed(value, (n,))
        return self.weight(f"{module}.bias") if f"{module}.bias" in self.weights.tensors else None

    def float_linear(self, module: str, x: Value, out_name: str) -> Value:
        """The same equation in float, for a weight that was kept."""
        graph, (n, k) = self.graph, self.shape_nk(module)
        out, low = (*x.shape[:-1], n), (*x.shape[:-1], f"{module}.rank")
        scaled = self.times(x, self.term(module, "s_in", self.one(), (k,)), f"{module}:s_in")
        y = self.matmul(scaled, self.weight(f"{self.stored(module)}.weight"), out, f"{module}:base")
        a, b, gate, s_out = self.terms(module, n, k, x)
        if self.adapter.swappable:
            t = self.times(self.matmul(x, a, low, f"{module}:a"), gate, f"{module}:gated")
            added = graph.node("MatMul", t, self.float32(b), shape=out, name=f"{module}:b")
            y = graph.node("Add", y, added, shape=out, name=f"{module}:sum")
        y = self.times(y, s_out, f"{module}:s_out")
        if (bias := self.own_bias(module, n)) is None:
            return graph.node("Identity", y, shape=out, name=out_name)
        return graph.node("Add", y, bias, shape=out, name=out_name)

    def times(self, x: Value, factor: Value, name: str) -> Value:
        """x * factor, or x where the factor is the neutral one."""
        return x if factor == self.one() else self.graph.node("Mul", x, factor, shape=x.shape, name=name)

    def float32(self, value: Value) -> Value:
        """Return a value as float32."""
        if value.dtype == FLOAT:
            return value
        return self.graph.node("Cast", value, to=FLOAT, shape=value.shape, name=f"{value.name}:float32")

    def matmul(self, x: Value, matrix: Value, shape: Dims, name: str) -> Value:
        """x matrix^T in float32."""
        matrix, flipped = self.float32(matrix), matrix.shape[::-1]
        turned = self.graph.node("Transpose", matrix, perm=[1, 0], shape=flipped, name=f"{name}:transposed")
        return self.graph.node("MatMul", x, turned, shape=shape, name=name)
