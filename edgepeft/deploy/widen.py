"""Widening a bundle's graph: inputs for what a new adapter changes and the ones before it did not.

Every separate export has inputs for A and B of every linear. The others are there where the shipped adapter has them:

    s_in, s_out, bias of a fused linear       the node's constant input becomes an overridable one
    a tensor of the base (norm, bias, head)   its constant becomes one, under the adapter's name
    A and B of an embedding                   the nodes that `export.emitter` has for them, behind the table's rows

Defaults are neutral: ones, rank 0, or the base's own values, which go into adapters/base.safetensors as well, for
adapters that leave them alone. Nothing else of the graph changes, so the shipped adapter computes what it did, bit for
bit.

Needs the onnx package. Left out, and refused: an s_in of one linear of several that share a node, scales of a linear
that was kept in float, norms that are stored with an offset: they take other nodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepeft.adapt.terms import PREFIX
from edgepeft.artifact import read_json, read_tensors, write_bytes, write_tensors
from edgepeft.errors import ArtifactError
from edgepeft.export.ops import DOMAIN, GROUP_INPUTS, NAME, SHARED_INPUTS
from edgepeft.runtime.adapters import DOWN, UP

OWN = "base.safetensors"
PACKED = "is packed, so a whole new one has no place; adapt it by LoRA (target_modules in place of modules_to_save)"
EXPORT_AGAIN = "Build with this adapter's method, and add the bundle's present adapter to that one."


class _Wide:
    """A model.onnx to be widened. `own`: the base's values of what became an input."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        self.graph = self.model.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.fused = {
            module: (node, group)
            for node in self.graph.node if node.domain == DOMAIN and node.op_type.startswith(NAME)
            for group, module in enumerate(node.output)
        }  # fmt: skip
        self.own: dict[str, np.ndarray] = {}

    def add(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Add the input of one of an adapter's tensors; return why that cannot be done, or None."""
        inner = name.removeprefix(PREFIX)
        module, _, term = inner.rpartition(".")
        if inner in self.constants:
            return self._replace(name, inner, shape)
        if inner.endswith(f".{DOWN}"):
            return self._adapt_table(inner.removesuffix(f".{DOWN}"), shape)
        if inner.endswith(f".{UP}") and name in self.constants:  # it came with A
            return None
        if term in ("s_in", "s_out", "bias") and module in self.fused:
            return self._feed(name, module, term, shape)
        packed = term == "weight" and f"{module}.qweight" in self.constants
        return f"{inner}: {PACKED}" if packed or module in self.fused else f"{inner}: the graph has no place for it"

    def _replace(self, name: str, inner: str, shape: tuple[int, ...]) -> str | None:
        """Turn a constant into an input."""
        value = self._value(self.constants[inner])
        if value.shape != shape or value.dtype != np.float32:
            return f"{inner}: expected {list(shape)}, the graph has {value.dtype} {list(value.shape)}"
        if inner.endswith("norm.weight") and self._offset_norms():
            return f"{inner}: norms of this family are stored with an offset"
        for node in self.graph.node:
            for i, found in enumerate(node.input):
                if found == inner:
                    node.input[i] = name
        self.graph.initializer.remove(self.constants.pop(inner))
        self.own[name] = value
        self._input(name, value)
        return None

    def _offset_norms(self) -> bool:
        return str(read_json(self.folder / "config.json").get("model_type")).startswith("gemma")

    def _feed(self, name: str, module: str, term: str, shape: tuple[int, ...]) -> str | None:
        """Give a term's place at a fused node to an input."""
        node, group = self.fused[module]
        if term == "s_in" and len(node.output) > 1:
            return f"{module}: shares its input's scale with {', '.join(m for m in node.output if m != module)}"
        place = len(SHARED_INPUTS) + len(GROUP_INPUTS) * group
        place = SHARED_INPUTS.index(term) if term == "s_in" else place + GROUP_INPUTS.index(term)
        value = np.zeros(shape, np.float32) if term == "bias" else np.ones(shape, np.float32)
        if shape != self._size(node, group, term):
            return f"{module}: {term} is {list(shape)}, expected {list(self._size(node, group, term))}"
        if term == "bias":
            self.own[name] = value
        node.input[place] = name
        self._input(name, value)
        return None

    def _adapt_table(self, module: str, shape: tuple[int, ...]) -> str | None:
        """Add B·A[:, ids] to the rows of an embedding; shape: of A [R, V]."""
        nodes = list(self.graph.node)
        place = next((i for i, node in enumerate(nodes) if _is_table(node, module)), None)
        if place is None:
            return f"{module}: the graph has no place for its adapter"
        table, out = nodes[place], nodes[place].output[0]
        ids = table.input[1 if table.op_type == "Gather" else 0]
        sizes, of_ids, rank = self._sizes(out), self._sizes(ids), f"{module}.rank"
        a, b = (f"{PREFIX}{module}.{side}" for side in (DOWN, UP))
        table.output[0] = table.name = f"{out}:table"
        order = [*range(1, len(of_ids) + 1), 0]
        made: list[tuple[str, tuple[str, ...], str, int, list[Any], dict[str, Any]]] = [
            # operator, inputs, output, its type and sizes, attributes
            ("Gather", (a, ids), f"{out}:a", TensorProto.FLOAT16, [rank, *of_ids], {"axis": 1}),
            ("Cast", (f"{out}:a",), f"{out}:a:float32", TensorProto.FLOAT, [rank, *of_ids], {"to": TensorProto.FLOAT}),
            ("Transpose", (f"{out}:a:float32",), f"{out}:ranks", TensorProto.FLOAT, [*of_ids, rank], {"perm": order}),
            ("Cast", (b,), f"{b}:float32", TensorProto.FLOAT, [rank, sizes[-1]], {"to": TensorProto.FLOAT}),
            ("MatMul", (f"{out}:ranks", f"{b}:float32"), f"{out}:b", TensorProto.FLOAT, sizes, {}),
            ("Add", (f"{out}:table", f"{out}:b"), out, TensorProto.FLOAT, sizes, {}),
        ]
        self.graph.value_info.append(helper.make_tensor_value_info(f"{out}:table", TensorProto.FLOAT, sizes))
        for _, _, name, kind, dims, _ in made[:-1]:
            self.graph.value_info.append(helper.make_tensor_value_info(name, kind, dims))
        nodes[place + 1 : place + 1] = [
            helper.make_node(op, inputs, [name], name=name, **attributes) for op, inputs, name, _, _, attributes in made
        ]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        for name, size in ((a, shape[1]), (b, sizes[-1])):
            self._input(name, np.zeros((0, size), np.float16), [rank, size])
        return None

    def _sizes(self, name: str) -> list[Any]:
        """Return the sizes of a value, each a number or a name."""
        found = next(v for v in (*self.graph.value_info, *self.graph.input) if v.name == name)
        return [dim.dim_param or dim.dim_value for dim in found.type.tensor_type.shape.dim]

    def _size(self, node: onnx.NodeProto, group: int, term: str) -> tuple[int, ...]:
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        return (numbers["K"] if term == "s_in" else numbers[f"n{group}"],)

    def _input(self, name: str, value: np.ndarray, sizes: Sequence[Any] | None = None) -> None:
        """Add an overridable input; sizes: where one of them may be any, its name."""
        tensor = numpy_helper.from_array(value, name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        self.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, sizes or value.shape))

    def _value(self, tensor: onnx.TensorProto) -> np.ndarray:
        """Return a constant's value, read from its file where it lies in one."""
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        where = {entry.key: entry.value for entry in tensor.external_data}
        with open(self.folder / where["location"], "rb") as stream:
            stream.seek(int(where.get("offset", 0)))
            raw = stream.read(int(where["length"]))
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.frombuffer(raw, kind).reshape(tuple(tensor.dims))

    def save(self) -> None:
        """Write model.onnx, and the base's own tensors beside the adapters."""
        write_bytes(self.folder / "model.onnx", self.model.SerializeToString(deterministic=True))
        if not self.own:
            return
        path = self.folder / "adapters" / OWN
        before = {name: np.array(array) for name, array in (read_tensors(path) if path.exists() else {}).items()}
        write_tensors(path, {**before, **self.own}, self._metadata())

    def _metadata(self) -> dict[str, str]:
        values = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        return {"format": "pt", "edgepeft.base": values["base_digest"], "edgepeft.format": values["format"]}


def _is_table(node: onnx.NodeProto, module: str) -> bool:
    """Tell whether a node gives the rows of an embedding, before they are scaled where a family does so."""
    rows = node.op_type == "Gather" or node.op_type.startswith(("PackedEmbedding", "RowEmbedding"))
    return rows and node.output[0] in (module, f"{module}:rows")


def widen(folder: Path, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Give the graph of a bundle's folder an input for each wanted name, with a neutral default.

    Raises ArtifactError that names all that no input can be made for; nothing is written then.
    """
    wide = _Wide(folder)
    problems = list(_problems(wide, wanted))
    if problems:
        advice = "" if all(problem.endswith(PACKED) for problem in problems) else f" {EXPORT_AGAIN}"
        raise ArtifactError("model.onnx: " + "; ".join(problems[:5]) + f".{advice}")
    wide.save()


def _problems(wide: Any, wanted: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in sorted(wanted.items()):
        if problem := wide.add(name, shape):
            yield problem
