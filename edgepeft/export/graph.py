"""A small typed builder for ONNX graphs whose weights are never held in memory.

    graph = Graph("encoder")
    x = graph.input("x", INT64, ("batch", "sequence"))
    w = graph.constant("w", memory_mapped_array)      # planned now, streamed into model.onnx.data by save()
    y = graph.node("MatMul", x, w, shape=(...))       # every value has a dtype and a shape: they become value_info

Constants of 1 KiB and more go to `<model>.data`, each at a multiple of 64 bytes (of 4096 from 64 KiB on), where ONNX
Runtime maps them without a copy and kernels find them aligned. `overridable` adds an initializer that is a graph input
too, with its bytes inside another file of the folder (the adapter), so they exist once. Offsets follow the order of the
calls and nothing depends on time or hashing: equal calls give equal bytes. No limit at 2 GB, as only model.onnx (names,
shapes, offsets) is a protobuf message.

Left out: subgraphs, shape inference (the caller states shapes; ONNX Runtime and the checker test them).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgepeft.export.ops import IR_VERSION, OPSET, VERSION

FLOAT, FLOAT16, INT64, INT32 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT32
BOOL = TensorProto.BOOL
DOMAIN_VERSIONS = {"": OPSET, "com.microsoft": 1, "edgepeft": VERSION}
INLINE_BELOW_BYTES = 1024
CHUNK_BYTES = 1 << 24

Dims = tuple[int | str, ...]


class Value(NamedTuple):
    """A value of the graph: ONNX element type and shape, symbolic dimensions as strings."""

    name: str
    dtype: int
    shape: Dims


NONE = Value("", TensorProto.UNDEFINED, ())


class Place(NamedTuple):
    """Where a tensor's bytes lie in a file of the model's folder."""

    location: str
    offset_bytes: int
    length_bytes: int


@dataclasses.dataclass
class _Stored:
    """One tensor of the data file: parts follow each other."""

    offset_bytes: int
    parts: Sequence[np.ndarray]


def _alignment_bytes(length_bytes: int) -> int:
    return 4096 if length_bytes >= 1 << 16 else 64


class Graph:
    """Nodes, constants and functions of one model; `save` writes it."""

    def __init__(self, name: str, file_name: str = "model.onnx") -> None:
        self.name, self.file_name, self.data_name = name, file_name, file_name + ".data"
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: dict[str, onnx.FunctionProto] = {}
        self.constants: dict[str, Value] = {}
        self._domains = {""}
        self._stored: list[_Stored] = []
        self._defaults: dict[int, Place] = {}  # by the id of an array, which `_stored` keeps
        self.data_bytes = 0

    def input(self, name: str, dtype: int, shape: Dims) -> Value:
        """Add an input that every run must feed."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return Value(name, dtype, shape)

    def output(self, value: Value) -> None:
        """Make a value an output."""
        self.outputs.append(helper.make_tensor_value_info(*value))
        self.values = [v for v in self.values if v.name != value.name]

    def constant(self, name: str, *parts: np.ndarray) -> Value:
        """Add a tensor: the parts stacked along their first axis. A name already there is taken as it is."""
        if name in self.constants:
            return self.constants[name]
        stacked = (sum(len(p) for p in parts), *parts[0].shape[1:]) if parts[0].ndim else ()
        value = Value(name, helper.np_dtype_to_tensor_dtype(parts[0].dtype), stacked)
        length = sum(p.nbytes for p in parts)
        if length < INLINE_BELOW_BYTES:
            self.initializers.append(_inline(value, b"".join(p.tobytes() for p in parts)))
        else:
            place = Place(self.data_name, self._reserve(length, parts), length)
            self.initializers.append(_external(value, place))
        self.constants[name] = value
        return value

    def overridable(self, value: Value, default: Place | np.ndarray | None, dims: Dims) -> Value:
        """Add an input with a default: `dims` is its shape as an input, `value.shape` that of the default.

        The default lies at a place, is an array that goes to the data file, once for all that have it, or is empty.
        """
        self.inputs.append(helper.make_tensor_value_info(value.name, value.dtype, dims))
        if isinstance(default, np.ndarray):
            if id(default) not in self._defaults:
                place = Place(self.data_name, self._reserve(default.nbytes, [default]), default.nbytes)
                self._defaults[id(default)] = place
            default = self._defaults[id(default)]
        empty = default is None or default.length_bytes == 0
        self.initializers.append(_inline(value, b"") if empty or default is None else _external(value, default))
        return Value(value.name, value.dtype, dims)

    def optional(self, name: str, default: np.ndarray, dims: Dims) -> Value:
        """Add an input with a small default, which lies in the graph itself."""
        value = Value(name, helper.np_dtype_to_tensor_dtype(default.dtype), default.shape)
        self.inputs.append(helper.make_tensor_value_info(name, value.dtype, dims))
        self.initializers.append(_inline(value, default.tobytes()))
        return Value(name, value.dtype, dims)

    def node(
        self,
        op: str,
        *inputs: Value,
        shape: Dims,
        name: str,
        dtype: int = FLOAT,
        domain: str = "",
        **attrs: Any,
    ) -> Value:
        """Add a node with one output, named like the node."""
        return self.nodes_outputs(op, inputs, [Value(name, dtype, shape)], name, domain, **attrs)[0]

    def nodes_outputs(
        self, op: str, inputs: Sequence[Value], outputs: Sequence[Value], name: str, domain: str = "", **attrs: Any
    ) -> Sequence[Value]:
        """Add a node with several outputs."""
        names = [v.name for v in inputs]
        self.nodes.append(helper.make_node(op, names, [v.name for v in outputs], name=name, domain=domain, **attrs))
        self._domains.add(domain)
        self.values += [helper.make_tensor_value_info(*v) for v in outputs]
        return outputs

    def function(self, name: str, make: Callable[[], onnx.FunctionProto]) -> None:
        """Make sure that the model carries a function."""
        if name not in self.functions:
            self.functions[name] = make()
            self._domains.update(o.domain for o in self.functions[name].opset_import)

    def model(self) -> onnx.ModelProto:
        """Return the model, its large tensors as references into files."""
        graph = helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, self.initializers, value_info=self.values
        )
        opsets = [helper.make_opsetid(domain, DOMAIN_VERSIONS[domain]) for domain in sorted(self._domains)]
        functions = [self.functions[name] for name in sorted(self.functions)]
        return helper.make_model(
            graph, functions=functions, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgepeft"
        )

    def save(self, folder: Path) -> Path:
        """Write model.onnx and model.onnx.data; returns the path of the first."""
        with open(folder / self.data_name, "wb") as stream:
            for stored in self._stored:
                stream.seek(stored.offset_bytes)
                _write(stream, stored)
            stream.flush()
            os.fsync(stream.fileno())
        path = folder / self.file_name
        path.write_bytes(self.model().SerializeToString(deterministic=True))
        return path

    def _reserve(self, length_bytes: int, parts: Sequence[np.ndarray]) -> int:
        offset = self.data_bytes + -self.data_bytes % _alignment_bytes(length_bytes)
        self._stored.append(_Stored(offset, parts))
        self.data_bytes = offset + length_bytes
        return offset


def _inline(value: Value, raw: bytes) -> onnx.TensorProto:
    """Return a tensor that holds its bytes."""
    return onnx.TensorProto(name=value.name, data_type=value.dtype, dims=[int(d) for d in value.shape], raw_data=raw)


def _external(value: Value, place: Place) -> onnx.TensorProto:
    """Return a tensor whose bytes lie in a file."""
    proto = onnx.TensorProto(name=value.name, data_type=value.dtype, dims=[int(d) for d in value.shape])
    proto.data_location = TensorProto.EXTERNAL
    for key, text in zip(("location", "offset", "length"), place, strict=True):
        proto.external_data.add(key=key, value=str(text))
    return proto


def _write(stream: Any, stored: _Stored) -> None:
    """Write a tensor's bytes a chunk at a time, so that a mapped file never becomes anonymous memory."""
    for part in stored.parts:
        flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        for start in range(0, flat.size, CHUNK_BYTES):
            stream.write(flat[start : start + CHUNK_BYTES].data)
