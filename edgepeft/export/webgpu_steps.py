"""The graph for GPUs with a branch of its own for single tokens, in which an adapter costs almost no shaders.

    one_token ─► If ─┬─► a token: three products of one normed input, and then the adapter's way up, are a shader each
                     └─► a prompt: norms and products one by one

    a token's layer        shaders
    norm, q|k|v, A x             1   MatMulNBitsQkv: three outputs of one (Skip)SimplifiedLayerNormalization
      + B (A x)                  1   MatMulNBits, whose bias is what it adds to
    turn, store, attend          3   GroupQueryAttention
    o, A x;  + B (A x)           2   MatMulNBitsQkv again, with a norm that changes nothing: see ONE_SCALE
    norm, gate, up, A x          1
      act(gate + ..)(up + ..)    1   MatMulNBitsMlp, whose biases are what it adds to
    down, A x;  + B (A x)        2

MatMulNBitsQkv binds 13 buffers for a norm with a sum before it and 11 for one without; where a GPU grants a shader
fewer, it runs that norm by itself: 13 shaders with 11 or 12 buffers, 15 with 10. No other operator multiplies one input
by two weights without a gate between them, and none two inputs, so each of the four linears then takes three.

These operators multiply 4-bit weights in blocks of 32 alone, so adapters come in 4-bit digits, see
`edgepeft.runtime.digits`, and linears of other formats, or with scales of their input, are as in `webgpu`. Biases of
products are for one row, hence two branches; both read the same weights and digits, "edgepeft.digits" says of what.
Ranks are fixed when the graph is made: an adapter has at most those of the ones in the folder.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgepeft.deploy.adapter_source import tensor_shapes
from edgepeft.export.ops import SHARED_INPUTS
from edgepeft.export.webgpu import GROUP_INPUTS, MICROSOFT, Pass
from edgepeft.runtime import digits
from edgepeft.runtime.adapters import TENSORS
from edgepeft.runtime.webgpu import DIGITS, ONE_TOKEN, pack_digits

FORMAT = "i4b32"
# x / sqrt(mean(x^2) + epsilon) * sqrt(epsilon) is x to the last bit of float32 while mean(x^2) is below 2^16.
ONE_EPSILON, ONE_SCALE = 2.0**40, np.float32(2.0**20)
NORMS = {"RMSNorm": "SimplifiedLayerNormalization", "SkipRMSNorm": "SkipSimplifiedLayerNormalization"}


class Steps(Pass):
    """A language model on its way. step: whether the branch at hand is that of single tokens."""

    def run(self) -> onnx.ModelProto:
        """Return the new model."""
        self.digits: dict[str, dict[str, Any]] = {}
        self.shapes = [tensor_shapes(file.parent) for file in sorted(self.folder.glob(f"adapters/*/{TENSORS}"))]
        self.step = False
        if not any(map(self.in_digits, self.graph.node)):
            return super().run()
        logits = self.graph.output[0].type.tensor_type.shape
        logits.dim[1].dim_param = "kept"  # a branch's output has to be as it is declared
        branches, read = {}, set()
        for name, self.step in (("then_branch", True), ("else_branch", False)):
            self.norms: dict[str, onnx.NodeProto] = {}
            nodes = self.branch()
            read |= {value for node in nodes for value in node.input} - {v for node in nodes for v in node.output}
            branches[name] = self.closed(nodes, name)
        outputs = [value.name for value in self.graph.output]
        self.inputs.append(helper.make_tensor_value_info(ONE_TOKEN, TensorProto.BOOL, ()))
        return self.model_of([helper.make_node("If", [ONE_TOKEN], outputs, name="step", **branches)], read)

    def closed(self, nodes: list[onnx.NodeProto], name: str) -> onnx.GraphProto:
        """Return nodes as a branch, whose outputs have names of their own."""
        own = {value.name: f"{name}.{value.name}" for value in self.graph.output}
        for node in nodes:
            for names in (node.input, node.output):
                names[:] = [own.get(value, value) for value in names]
        outputs = []
        for value in self.graph.output:
            copy = onnx.ValueInfoProto()
            copy.CopyFrom(value)
            copy.name = own[value.name]
            outputs.append(copy)
        return helper.make_graph(nodes, name, [], outputs)

    def about(self) -> dict[str, str]:
        """Return what the device runtime has to know."""
        return {**super().about(), DIGITS: json.dumps(self.digits)}

    # --- norms that a product takes in ---

    def node(self, node: onnx.NodeProto) -> None:
        """Add what stands for one node, or keep a norm for the product that takes it in."""
        if self.step and node.op_type in NORMS and self.taken_in(node.output[0]):
            self.norms[node.output[0]] = node
        elif not (node.op_type.startswith("GatedActivation_") and node.output[0] in self.names):
            super().node(node)

    def taken_in(self, name: str) -> bool:
        """Tell whether a value has one reader, and that a product in digits."""
        readers = self.readers.get(name, [])
        return len(readers) == 1 and readers[0].input[0] == name and self.in_digits(readers[0])

    def in_digits(self, node: onnx.NodeProto) -> bool:
        """Tell whether a node is a fused linear whose adapter, if any, comes in digits."""
        if not node.op_type.startswith(f"AdapterMatMul_{FORMAT}_g") or node.op_type.endswith("_offset"):
            return False
        downs = [group[0] for group in self.groups(node)]
        if not all(group[2] in self.constants for group in self.groups(node)):  # a router's
            return False
        return node.input[3] == "one" and all(a in self.overridable for a in downs) and any(map(self.rank, downs))

    def rank(self, a: str) -> int:
        """Return the most ranks that an adapter of the folder has in a linear."""
        return max(len(self.value(a)), *(shapes.get(a, (0,))[0] for shapes in self.shapes))

    def groups(self, node: onnx.NodeProto) -> list[list[str]]:
        """Return the adapter's inputs of each linear of a node."""
        first, width = len(SHARED_INPUTS), len(GROUP_INPUTS)
        return [list(node.input[first + width * g :][:width]) for g in range(len(node.output))]

    # --- products ---

    def linear(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> None:
        """Add one fused node."""
        if not self.in_digits(node):
            return super().linear(node, attrs)
        parts, k = self.groups(node), int(attrs["K"])
        sizes = [int(attrs[f"n{g}"]) for g in range(len(parts))]
        name, act = "|".join(node.output), self.gate_of(node)
        down, ups = self.adapter_inputs(name, parts, sizes, k, apart=bool(act))
        weights = self.weights(node, k, sizes if act else [sum(sizes)], int(attrs["N"]))
        if self.step:
            low, base = self.three(node, name, down, weights, k)
        else:
            low, base = self.one_by_one(node, name, down, weights, k)
        if act and self.step:
            return self.gated(act, low, base, ups)
        outs = [self.risen(n, low, b, up) for n, b, up in zip(self.part_names(node, act), base, ups, strict=True)]
        if act:
            self.names |= dict(zip(node.output, outs, strict=True))
        else:
            parts, bias = self.bias(name, parts, sizes, sum(sizes))
            y = self.add("Add", [outs[0], bias], [f"{name}:gpu_biased"]) if bias else outs[0]
            self.ends(node, name, y, parts, sizes)
        return None

    @staticmethod
    def part_names(node: onnx.NodeProto, act: onnx.NodeProto | None) -> list[str]:
        """Return the names of a node's products: of each linear, or of all as one."""
        return list(node.output) if act else ["|".join(node.output)]

    def gate_of(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return the silu(gate) * up that alone reads a node's two outputs, which have no scales and biases."""
        readers = [reader for out in node.output for reader in self.readers.get(out, [])]
        plain = all(group[3] == "one" and group[4] == "zero" for group in self.groups(node))
        act = readers[0] if readers else None
        fits = len(node.output) == 2 == len(readers) and readers[0] is readers[1] and plain
        return act if act is not None and fits and act.op_type == "GatedActivation_silu" else None

    def adapter_inputs(
        self, name: str, parts: list[list[str]], sizes: list[int], k: int, apart: bool
    ) -> tuple[list[str], list[list[str]]]:
        """Return the inputs (codes, scales) of A's digits, and of B's: one for each linear, or for all."""
        about = [
            {"a": a, "b": b, "gate": gate if gate in self.overridable else None, "n": n}
            for (a, b, gate, _, _), n in zip(parts, sizes, strict=True)
        ]
        values = {part: self.value(part) for group in parts for part in group[:3]}
        entry = {"groups": about, "k": k, "ranks": sum(self.rank(a) for a, *_ in parts), "apart": apart}
        arrays = pack_digits(name, entry, values)
        if name not in self.digits:
            self.digits[name] = entry
            for given, array in arrays.items():
                self.constant(given, array)
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                self.inputs.append(helper.make_tensor_value_info(given, kind, array.shape))
        names = list(arrays)
        return names[:2], [names[i : i + 2] for i in range(2, len(names), 2)]

    def weights(self, node: onnx.NodeProto, k: int, sizes: list[int], n: int) -> list[list[str]]:
        """Return (codes, scales, rows) of a node's weight, cut into `sizes` rows."""
        codes, scales = self.unpacked(FORMAT, list(node.input[1:3]), k, n)
        if sizes == [n]:
            return [[codes, scales, str(n)]]
        cut, ends = [], np.cumsum([0, *sizes])
        for start, end in itertools.pairwise(ends):
            cut.append([self.rows(value, int(start), int(end)) for value in (codes, scales)] + [str(end - start)])
        return cut

    def rows(self, value: str, start: int, end: int) -> str:
        """Return some rows of a weight, cut when the graph is loaded."""
        name = f"{value}:{start}:{end}"
        if name not in self.laid_out:
            self.laid_out.add(name)
            ends = [self.constant(f"gpu_{place}", np.array([place], np.int64)) for place in (start, end, 0)]
            self.layout.append(helper.make_node("Slice", [value, *ends], [name], name=name))
        return name

    def three(
        self, node: onnx.NodeProto, name: str, down: list[str], weights: list[list[str]], k: int
    ) -> tuple[str, list[str]]:
        """Add A x and the base's products by one shader, with the norm before them."""
        x, skip, weight, epsilon, total = self.normed(node, k)
        columns = str(digits.columns(self.digits[name]["ranks"]))
        low, base = f"{name}:gpu_low", [f"{name}:gpu_base{i}" for i in range(len(weights))]
        own = [*down, columns]
        q, kk, v = (own, *weights) if len(weights) == 2 else (weights[0], own, own)
        outputs = [low, *base] if len(weights) == 2 else [base[0], low, f"{name}:gpu_again"]
        inputs = [x, skip, weight, q[0], q[1], "", kk[0], kk[1], "", v[0], v[1], ""]
        sizes = {"K": k, "Nq": int(q[2]), "Nkv": int(kk[2]), "bits": 4, "block_size": digits.BLOCK}
        outputs += [total] if total else []
        self.add("MatMulNBitsQkv", inputs, outputs, MICROSOFT, epsilon=epsilon, **sizes)
        return low, base

    def normed(self, node: onnx.NodeProto, k: int) -> tuple[str, str, str, float, str]:
        """Return (x, skip, weight, epsilon, name of x + skip) of the norm before a node, or of one that is none."""
        norm = self.norms.get(node.input[0])
        if norm is None:
            return node.input[0], "", self.constant(f"gpu_one_{k}", np.full(k, ONE_SCALE)), ONE_EPSILON, ""
        epsilon = float(helper.get_attribute_value(norm.attribute[0]))
        inputs = [self.names.get(name, name) for name in norm.input]
        if norm.op_type == "RMSNorm":
            return inputs[0], "", inputs[1], epsilon, ""
        return inputs[0], inputs[1], inputs[2], epsilon, norm.output[1]

    def one_by_one(
        self, node: onnx.NodeProto, name: str, down: list[str], weights: list[list[str]], k: int
    ) -> tuple[str, list[str]]:
        """Add A x and the base's products by a shader each."""
        own = [*down, str(digits.columns(self.digits[name]["ranks"]))]
        found = [
            self.product(node.input[0], part, k, f"{name}:gpu_{what}")
            for what, part in [("low", own), *((f"base{i}", part) for i, part in enumerate(weights))]
        ]
        return found[0], found[1:]

    def product(self, x: str, weight: list[str], k: int, out: str, bias: str = "") -> str:
        """Add a product with 4-bit weights (codes, scales, rows)."""
        inputs = [x, weight[0], weight[1], *(["", "", bias] if bias else [])]
        sizes = {"K": k, "N": int(weight[2]), "bits": 4, "block_size": digits.BLOCK}
        return self.add("MatMulNBits", inputs, [out], MICROSOFT, **sizes)

    def risen(self, name: str, low: str, base: str, up: list[str]) -> str:
        """Add base + B low."""
        n, wide = self.shape_of(up[0])
        if self.step:
            return self.product(low, [*up, str(n)], wide, f"{name}:gpu_risen", self.flat(base, n))
        return self.add("Add", [base, self.product(low, [*up, str(n)], wide, f"{name}:gpu_up")], [f"{name}:gpu_risen"])

    def gated(self, act: onnx.NodeProto, low: str, base: list[str], ups: list[list[str]]) -> None:
        """Add silu(gate + B low) * (up + B low) by one shader."""
        n, wide = self.shape_of(ups[0][0])
        inputs = [low, "", "", *ups[0], self.flat(base[0], n), *ups[1], self.flat(base[1], n)]
        sizes = {"K": wide, "N": n, "bits": 4, "block_size": digits.BLOCK}
        out = f"{act.output[0]}:gpu"
        self.names[act.output[0]] = self.add("MatMulNBitsMlp", inputs, [out], MICROSOFT, activation="silu", **sizes)

    def flat(self, value: str, n: int) -> str:
        """Return a token's n values as a vector, which costs a GPU nothing."""
        return self.add("Reshape", [value, self.constant(f"gpu_{n}", np.array([n], np.int64))], [f"{value}:gpu_flat"])

    def shape_of(self, codes: str) -> tuple[int, int]:
        """Return (rows, columns) of the codes of one of B's inputs."""
        dims = next(tensor.dims for tensor in self.tensors if tensor.name == codes)
        return int(dims[0]), int(dims[1]) * digits.BLOCK
