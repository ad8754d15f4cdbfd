"""The graph for GPUs beside the one for CPUs: the same weights, and nothing that WebGPU's execution provider lacks.

    model.onnx ─► model.webgpu.onnx, the default adapter inside in float32           model.onnx.data serves both

| in model.onnx | in model.webgpu.onnx | why |
|---|---|---|
| AdapterMatMul_<format>_g<G> | MatMulNBits + (x A) B, the groups' A and B packed | A side by side: one product, not G |
| offsets C | + (x S) C, S the sums over C's blocks | |
| q, k, v of one node into attention | one value | attention takes them packed: no split |
| SkipRMSNorm, RMSNorm | Skip-/SimplifiedLayerNormalization | one shader |
| SkipLayerNorm | SkipLayerNormalization | |
| PackedEmbedding, RowEmbedding | GatherBlockQuantized | the same |
| attention_mask, logits_to_keep, Range | seqlens_k, total_sequence_length, logits_index, position_ids | counts |
| PaddedAttention and its mask | products of heads, attention_bias | see `webgpu_attention` |
| capped GroupQueryAttention | the same, positions and attention_bias.<window> | |
| rows before a text | see `webgpu_prompts` | |

Counting whole numbers is the CPU's in ONNX Runtime, so the device runtime does it and the graph takes what comes out.
A packed adapter is A [K, S] and B [S, N] in float32, S the ranks of all groups, B zero outside of its group's block;
the metadata "edgepeft.packed" says of what. Weights stay in tiles on disk and become MatMulNBits' layout when the graph
is loaded, nf4's MatMulBnb4's. Routers' shares of a token multiply x A.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepeft.artifact import write_bytes
from edgepeft.errors import ModelError
from edgepeft.export.ops import DOMAIN, GROUP_INPUTS, NAME, OFFSET, OPSET, SHARED_INPUTS
from edgepeft.export.webgpu_attention import capped, padded
from edgepeft.export.webgpu_prompts import Prompts
from edgepeft.export.webgpu_weights import block_of, embedding, row_embedding, unpacked
from edgepeft.quant.formats import FORMATS
from edgepeft.runtime.webgpu import FILE, PACKED, ROWS, pack, pack_routers, widened

MICROSOFT = "com.microsoft"
NF4 = 1  # MatMulBnb4's quant_type
FED = {  # values of model.onnx that become inputs, under which name, type and shape
    "seqlens_k": ("seqlens_k", TensorProto.INT32, ("batch",)),
    "total_sequence_length": ("total_sequence_length", TensorProto.INT32, ()),
    "logits_to_keep:index": ("logits_index", TensorProto.INT64, ("batch", "kept", 1)),
    "position_ids": ("position_ids", TensorProto.INT64, ("queries",)),
}
BIASES = {  # inputs that take the place of a mask, by the operator that reads it
    "PaddedAttention": ("attention_bias", TensorProto.FLOAT, ("batch", 1, "queries", "keys")),
    "PaddedAttention_one": ("attention_bias_first", TensorProto.FLOAT, ("batch", 1, 1, "keys")),
}
REPLACED = ("attention_mask", "logits_to_keep")


def write(folder: Path) -> Path:
    """Write the graph for GPUs beside an exported one; return its file. Raises ModelError for what it cannot hold.

    A language model gets a branch of its own for single tokens, see `webgpu_steps`. Written anew, it has room for the
    adapters that are there then.
    """
    from edgepeft.export.webgpu_steps import Steps

    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    decodes = any(node.op_type == "GroupQueryAttention" for node in model.graph.node)
    made = (Steps if decodes else Pass)(folder, model).run()
    path = folder / FILE
    write_bytes(path, made.SerializeToString(deterministic=True))
    return path


def check_sizes(folder: Path, most_mib: int) -> None:
    """Raise ModelError for a tensor of the graph that is larger than what a shader of the target may bind, in MiB."""
    model = onnx.load(str(folder / FILE), load_external_data=False)
    sizes = {
        t.name: int(np.prod(t.dims)) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        for t in model.graph.initializer
    }
    name = max(sizes, key=lambda one: sizes[one])
    if sizes[name] > most_mib << 20:
        raise ModelError(
            f"{name}: takes {sizes[name] / 2**20:.0f} MiB, a shader of this target binds {most_mib} at most. Take a "
            "smaller format (--format, --embedding-format) or another target."
        )


class Pass:
    """One model on its way."""

    def __init__(self, folder: Path, model: onnx.ModelProto) -> None:
        self.folder, self.model, self.graph = folder, model, model.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.overridable = {value.name for value in self.graph.input} & set(self.constants)
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.nodes: list[onnx.NodeProto] = []
        self.layout: list[onnx.NodeProto] = []  # of weights, folded when the graph is loaded
        self.prompts = Prompts(self)
        self.inputs: list[onnx.ValueInfoProto] = []
        self.fed = {name: FED[name][0] for node in self.graph.node for name in node.output if name in FED}
        biases = (BIASES[node.op_type] for node in self.graph.node if node.op_type in BIASES)
        for value in (*(FED[name] for name in self.fed), *biases):
            self.takes(*value)
        self.tensors: list[onnx.TensorProto] = []
        self.functions: dict[str, onnx.FunctionProto] = {}
        self.laid_out: set[str] = set()
        self.made: set[str] = set()  # names of constants
        self.packed: dict[str, list[dict[str, Any]]] = {}
        self.routers: dict[str, str] = {}  # by the gate they make
        self.one_row = any(node.op_type == "GroupQueryAttention" for node in self.graph.node)  # language models

    def run(self) -> onnx.ModelProto:
        """Return the new model."""
        return self.model_of(self.branch())

    def branch(self) -> list[onnx.NodeProto]:
        """Return the nodes that stand for the model's, those that something reads."""
        self.names, self.nodes = dict(self.fed), []
        for node in self.graph.node:
            if not set(node.output) & set(self.fed):
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                self.node(copy)
        outputs = {value.name for value in self.graph.output}
        for name in sorted(outputs & self.names.keys()):
            self.add("Identity", [self.names[name]], [name])
        return _read(self.nodes, outputs)

    def model_of(self, nodes: list[onnx.NodeProto], read: Iterable[str] = ()) -> onnx.ModelProto:
        """Return the model of nodes; `read`: what they read beside their own inputs."""
        names = {name for node in nodes for name in node.input} | set(read)
        nodes = [*_read(self.layout, names), *nodes]
        names = {name for node in nodes for name in node.input} | names
        kept = names - {*REPLACED, *self.made}
        first = [v for v in self.graph.input if v.name in kept]
        graph = helper.make_graph(
            nodes, self.graph.name, [*first, *self.inputs], list(self.graph.output),
            [*(t for t in self.graph.initializer if t.name in kept), *(t for t in self.tensors if t.name in names)],
        )  # fmt: skip
        functions = [f for f in self.model.functions if not f.name.startswith(NAME)] + list(self.functions.values())
        domains = [helper.make_opsetid(d, v) for d, v in (("", OPSET), (MICROSOFT, 1), (DOMAIN, self.version()))]
        model = helper.make_model(graph, opset_imports=domains, functions=functions, ir_version=self.model.ir_version)
        helper.set_model_props(model, self.about())
        return model

    def about(self) -> dict[str, str]:
        """Return what the device runtime has to know."""
        rows = {} if self.prompts.rows is None else {ROWS: str(self.prompts.rows)}
        return {PACKED: json.dumps(self.packed), **rows}

    def version(self) -> int:
        """Return the version of this project's operators."""
        return next(entry.version for entry in self.model.opset_import if entry.domain == DOMAIN)

    def add(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attrs: Any) -> str:
        """Add a node; return its first output."""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attrs))
        return outputs[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a constant, once for all branches."""
        if name not in self.made:
            self.made.add(name)
            self.tensors.append(numpy_helper.from_array(value, name))
        return name

    # --- node by node ---

    def node(self, node: onnx.NodeProto) -> None:
        """Add what stands for one node."""
        for i, name in enumerate(node.input):
            node.input[i] = self.names.get(name, name)
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if self.prompts.node(self, node):
            return
        if node.domain == DOMAIN and node.op_type.startswith(NAME):
            self.linear(node, attrs)
        elif node.op_type == "SkipRMSNorm":
            y, total = node.output
            self.add("SkipSimplifiedLayerNormalization", list(node.input), [y, "", "", total], MICROSOFT, **attrs)
        elif node.op_type == "RMSNorm":
            self.add(
                "SimplifiedLayerNormalization", list(node.input), list(node.output), axis=-1, stash_type=1, **attrs
            )
        elif node.op_type == "SkipLayerNorm":
            self.add("SkipLayerNormalization", list(node.input), list(node.output), MICROSOFT, **attrs)
        elif node.op_type == "Cast" and node.input[0] in self.overridable:
            self.names[node.output[0]] = self.widened(node.input[0])
        elif node.op_type == "GroupQueryAttention" and attrs.get("softcap"):
            capped(self, node, attrs)
        elif node.op_type == "GroupQueryAttention":
            node.domain = MICROSOFT
            self.nodes.append(node)
        elif node.op_type.startswith("PackedEmbedding_"):
            embedding(self, node)
        elif node.op_type.startswith("RowEmbedding_"):
            row_embedding(self, node)
        elif node.op_type == "RouterGate":
            self.routers[node.output[0]] = node.input[1]
        elif node.op_type == "Bottleneck":
            node.input[2:] = [self.widened(name) for name in node.input[2:]]
            self.nodes.append(node)
        elif node.op_type in BIASES:
            padded(self, node, attrs["num_heads"], BIASES[node.op_type][0])
        else:
            self.nodes.append(node)

    def takes(self, name: str, kind: int, dims: tuple[Any, ...]) -> str:
        """Let the graph have an input that the device runtime feeds; return its name."""
        if name not in {value.name for value in self.inputs}:
            sizes = [self.prompts.sizes.get(dim, dim) for dim in dims]
            self.inputs.append(helper.make_tensor_value_info(name, kind, sizes))
        return name

    def linear(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> None:
        """Add one fused node as MatMulNBits and its packed adapter."""
        tag = node.op_type.removeprefix(f"{NAME}_").rsplit("_g", 1)[0]
        groups = len(node.output)
        x, w, scale, s_in = node.input[: len(SHARED_INPUTS)]
        sizes = [int(attrs[f"n{g}"]) for g in range(groups)]
        name, k, n = "|".join(node.output), int(attrs["K"]), int(attrs["N"])
        scaled = x if s_in == "one" else self.add("Mul", [x, s_in], [f"{name}:gpu_s_in"])
        parts = [node.input[len(SHARED_INPUTS) + len(GROUP_INPUTS) * g :][: len(GROUP_INPUTS)] for g in range(groups)]
        parts = [list(part) for part in parts]
        parts, bias = (parts, "") if tag.startswith("nf4") else self.bias(name, parts, sizes, n)
        base = self.base(tag, name, [scaled, w, scale, bias], k, n)
        if node.op_type.endswith(f"_{OFFSET}"):
            base = self.offsets(name, scaled, node.input[-1], base, k)
        if n != sum(sizes):  # rows that fill a tile
            cut = self.constant(f"{name}:gpu_rows", np.array([sum(sizes), n - sum(sizes)], np.int64))
            base = self.add("Split", [base, cut], [f"{name}:gpu_real", f"{name}:gpu_filling"], axis=-1)
        self.ends(node, name, self.adapter(name, x, base, parts, sizes, k), parts, sizes)

    def bias(self, name: str, parts: list[list[str]], sizes: list[int], n: int) -> tuple[list[list[str]], str]:
        """Return the parts of a node without their biases, and these as one constant of n rows; "" where they are none.

        They stay where they are if an adapter has them, or scales an output before them.
        """
        names = [bias for *_, bias in parts]
        fixed = all(s_out == "one" for *_, s_out, _ in parts) and not set(names) & self.overridable
        if not fixed or set(names) == {"zero"}:
            return parts, ""
        whole = np.zeros(n, np.float32)
        whole[: sum(sizes)] = np.concatenate(
            [np.broadcast_to(self.value(bias), size) for bias, size in zip(names, sizes, strict=True)]
        )
        return [[*part[:-1], "zero"] for part in parts], self.constant(f"{name}:gpu_bias", whole)

    def widened(self, name: str) -> str:
        """Let an input of an adapter be float32 and not empty, as not every GPU takes others; return its name."""
        if name in self.overridable and name not in self.made:
            self.constant(name, widened(self.value(name)))
            old = next(value for value in self.graph.input if value.name == name)
            dims = [dim.dim_param or dim.dim_value for dim in old.type.tensor_type.shape.dim]
            self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
        return name

    def base(self, tag: str, name: str, inputs: list[str], k: int, n: int) -> str:
        """Add W x + bias by MatMulNBits or, without a bias, MatMulBnb4; inputs: x, w, its scales, bias or ""."""
        sizes = {"K": k, "N": n, "block_size": block_of(tag)}
        rows, out = self.unpacked(tag, inputs[1:3], k, n), f"{name}:gpu_base"
        if tag.startswith("nf4"):
            return self.add("MatMulBnb4", [inputs[0], *rows], [out], MICROSOFT, quant_type=NF4, **sizes)
        bias = ["", "", inputs[3]] if inputs[3] else []
        return self.add("MatMulNBits", [inputs[0], *rows, *bias], [out], MICROSOFT, bits=FORMATS[tag].bits, **sizes)

    def unpacked(self, tag: str, weight: list[str], k: int, n: int) -> list[str]:
        """Add the codes and scales of a weight as MatMulNBits reads them, once for all that read the weight."""
        rows = [f"{weight[0]}:gpu_codes", f"{weight[0]}:gpu_scales"]
        if weight[0] not in self.laid_out:
            self.laid_out.add(weight[0])
            kind = f"Unpacked_{tag}"
            self.functions.setdefault(kind, unpacked(tag, kind))
            self.layout.append(helper.make_node(kind, weight, rows, name=rows[0], domain=DOMAIN, K=k, N=n))
        return rows

    def adapter(self, name: str, x: str, base: str, parts: list[list[str]], sizes: list[int], k: int) -> str:
        """Add base + (x A) B of the packed adapters, where there are any."""
        if not any(a in self.overridable or self.value(a).size for a, *_ in parts):
            return base
        about, values = self.about_groups(parts, sizes)
        a_ks, b_sn = pack(about, values, k)
        names = [f"{name}.lora_A", f"{name}.lora_B"]
        if any(a in self.overridable for a, *_ in parts) and name not in self.packed:
            rank = f"{name}.rank"
            shapes: list[Any] = [(k, rank), (rank, sum(sizes))]
            for packed, dims in zip(names, shapes, strict=True):
                self.inputs.append(helper.make_tensor_value_info(packed, TensorProto.FLOAT, dims))
            self.packed[name] = about
        self.constant(names[0], a_ks)
        self.constant(names[1], b_sn)
        low, out = self.add("MatMul", [x, names[0]], [f"{name}:gpu_low"]), f"{name}:gpu_adapted"
        if any("router" in group for group in about):
            low = self.routed(name, x, low, about, values)
        return self.plus(base, low, names[1], out)

    def plus(self, base: str, low: str, up: str, out: str) -> str:
        """Add base + low up."""
        if not self.one_row:
            return self.add("Add", [base, self.add("MatMul", [low, up], [f"{out}_up"])], [out])
        low, flat = (self.axes("Squeeze", value) for value in (low, base))
        return self.axes("Unsqueeze", self.add("Gemm", [low, up, flat], [f"{out}_sum"]), out)

    def offsets(self, name: str, x: str, offset: str, base: str, k: int) -> str:
        """Add base + C s for the offsets C [J, N] of a weight, s the sums of x over J blocks."""
        blocks = int(self.constants[offset].dims[0])
        ones = np.repeat(np.eye(blocks, dtype=np.float32), k // blocks, axis=0)
        sums = self.add("MatMul", [x, self.constant(f"gpu_ones_{k}_{blocks}", ones)], [f"{name}:gpu_sums"])
        if (wide := f"{offset}:gpu_float32") not in self.laid_out:
            self.laid_out.add(wide)
            self.layout.append(helper.make_node("Cast", [offset], [wide], name=wide, to=TensorProto.FLOAT))
        return self.plus(base, sums, wide, f"{name}:gpu_offset")

    def about_groups(
        self, parts: list[list[str]], sizes: list[int]
    ) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Return what `pack` asks of a node's linears, and the values that the graph has for them."""
        about: list[dict[str, Any]] = []
        values: dict[str, np.ndarray] = {}
        for (a, b, gate, _, _), n in zip(parts, sizes, strict=True):
            router = self.routers.get(gate)
            entry = {"a": a, "b": b, "gate": gate if gate in self.overridable else None, "n": n}
            about.append({**entry, "router": router} if router else entry)
            values |= {part: self.value(part) for part in (a, b, router or gate)}
        return about, values

    def routed(self, name: str, x: str, low: str, about: list[dict[str, Any]], values: Mapping[str, np.ndarray]) -> str:
        """Add low times each expert's share of a token: softmax(router x), spread over the expert's ranks."""
        shares = []
        for g, spread in pack_routers(about, values).items():
            router = self.widened(about[g]["router"])
            turned = self.add("Transpose", [router], [f"{name}:gpu_router{g}"], perm=[1, 0])
            scores = self.add("MatMul", [x, turned], [f"{name}:gpu_scores{g}"])
            share = self.add("Softmax", [scores], [f"{name}:gpu_share{g}"], axis=-1)
            if (given := f"{name}.lora_R{g}") not in self.made:
                dims = [f"{name}.experts{g}", f"{name}.rank"]
                self.inputs.append(helper.make_tensor_value_info(self.constant(given, spread), TensorProto.FLOAT, dims))
            shares.append(self.add("MatMul", [share, given], [f"{name}:gpu_gate{g}"]))
        whole = shares[0]
        for g, share in enumerate(shares[1:]):
            whole = self.add("Add", [whole, share], [f"{name}:gpu_gates{g}"])
        return self.add("Mul", [low, whole], [f"{name}:gpu_gated"])

    def axes(self, op: str, value: str, name: str = "") -> str:
        """Take the one row of a language model off a value, or put it back, which costs a GPU nothing."""
        first = self.constant("gpu_first_axis", np.zeros(1, np.int64))
        return self.add(op, [value, first], [name or f"{value}:gpu_{op.lower()}"])

    def ends(self, node: onnx.NodeProto, name: str, y: str, parts: list[list[str]], sizes: list[int]) -> None:
        """Add scales and biases of outputs, and the split; name the outputs."""
        plain = all(s_out == "one" and bias == "zero" for *_, s_out, bias in parts)
        readers = [reader for out in node.output for reader in self.readers.get(out, [])]
        attention = {id(r) for r in readers}
        if len(sizes) == 3 and plain and len(attention) == 1 and readers[0].op_type == "GroupQueryAttention":
            self.names |= {node.output[0]: y, node.output[1]: "", node.output[2]: ""}
            return
        outs = [f"{out}:gpu_alone" for out in node.output]
        if len(sizes) == 1:
            outs = [y]
        else:
            cut = self.constant(f"{name}:gpu_sizes", np.array(sizes, np.int64))
            self.add("Split", [y, cut], outs, axis=-1)
        for out, wanted, (*_, s_out, bias) in zip(outs, node.output, parts, strict=True):
            if s_out != "one":
                out = self.add("Mul", [out, s_out], [f"{wanted}:gpu_scaled"])
            if bias != "zero":
                out = self.add("Add", [out, bias], [f"{wanted}:gpu_biased"])
            self.names[wanted] = out

    def value(self, name: str) -> np.ndarray:
        """Return a constant's value, read from its file where it lies in one."""
        tensor = self.constants[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        where = {entry.key: entry.value for entry in tensor.external_data}
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        count = int(where["length"]) // kind.itemsize
        raw = np.fromfile(self.folder / where["location"], kind, count, offset=int(where.get("offset", 0)))
        return raw.reshape(tuple(tensor.dims))


def _read(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """Return the nodes of which something is wanted, in order."""
    wanted, kept = set(wanted), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]
