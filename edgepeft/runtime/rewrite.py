"""Rewriting nodes and tensors of a serialized model, with no onnx package at hand.

A protobuf message is a row of fields: a varint key (number << 3 | wire type), then a varint (type 0), 8 bytes (1), a
length and bytes (2) or 4 bytes (5). Only the messages on the way are opened, every other field is copied as it is:

    ModelProto.graph = 7 ► GraphProto.node = 1 ► NodeProto.input = 1, .op_type = 4, .domain = 7, .attribute = 5
                         ► AttributeProto.name = 1, .i = 3, .s = 4, .type = 20
    GraphProto.initializer = 5 ► TensorProto.dims = 1, .data_type = 2, .name = 8, .raw_data = 9
    GraphProto.input = 11, .output = 12 ► ValueInfoProto.name = 1, .type = 2 ► .tensor_type = 1 ► .elem_type = 1
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from edgepeft.errors import ArtifactError

DOMAIN, MICROSOFT = b"edgepeft", b"com.microsoft"
ATTENTION, PAST, PRESENT = b"GroupQueryAttention", b"past_key_values.", b"present."
FLOAT, INT8, FLOAT16 = 1, 3, 10  # element types
INTEGER, STRING = 2, 3  # attribute types
KEY_SCALE = 12  # its place among the inputs of attention; that of the values' follows
NEW_WINDOWS = (1, 24)  # ONNX Runtime that counts attention windows as the export does


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return (value, offset after it)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview, memoryview | None]]:
    """Yield (field number, the whole field, its payload where it has a length)."""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        payload = None
        if key & 7 == 0:
            _, at = _varint(data, at)
        elif key & 7 == 2:
            length, at = _varint(data, at)
            payload = data[at : at + length]
            at += length
        else:
            at += {1: 8, 5: 4}[key & 7]
        yield key >> 3, data[start:at], payload


def _rewrite(data: memoryview, number: int, change: Callable[[memoryview], bytes]) -> bytes:
    """Return a message with every field of one number (which has a length) changed."""
    out = []
    for found, whole, payload in _fields(data):
        if found == number and payload is not None:
            new = change(payload)
            out.append(_to_varint(number << 3 | 2) + _to_varint(len(new)) + new)
        else:
            out.append(bytes(whole))
    return b"".join(out)


def _with_attributes(model: bytes, change: Callable[[bytes, bytes, memoryview], bytes]) -> bytes:
    """Return the model with every attribute of its graph's nodes replaced by change(domain, name, attribute)."""

    def node(data: memoryview) -> bytes:
        domain = _text(data, 7)
        return _rewrite(data, 5, lambda attribute: change(domain, _text(attribute, 1), attribute))

    return _rewrite(memoryview(model), 7, lambda graph: _rewrite(graph, 1, node))


def _text(data: memoryview, number: int) -> bytes:
    """Return the first string of a message with that number, or nothing."""
    return next((bytes(payload) for found, _, payload in _fields(data) if found == number and payload is not None), b"")


def with_activation(model: bytes, activation: str) -> bytes:
    """Return the model with every edgepeft node's activation set. Raises ArtifactError when it has none."""
    count = 0

    def change(domain: bytes, name: bytes, attribute: memoryview) -> bytes:
        nonlocal count
        if (domain, name) != (DOMAIN, b"activation"):
            return bytes(attribute)
        count += 1
        return _rewrite(attribute, 4, lambda _: activation.encode())

    out = _with_attributes(model, change)
    if not count:
        raise ArtifactError("the model has no edgepeft node whose activation could be chosen.")
    return out


def with_older_windows(model: bytes) -> bytes:
    """Return the model with the attention windows that mean the same on ONNX Runtime before 1.24: one token less.

    A window of w let a token see itself and w before it there, and since then itself and w - 1.
    """

    def change(_: bytes, name: bytes, attribute: memoryview) -> bytes:
        return _less_one(attribute) if name == b"local_window_size" else bytes(attribute)

    return _with_attributes(model, change)


def _less_one(attribute: memoryview) -> bytes:
    """Return an AttributeProto with its integer one less, or as it is where that is not positive."""
    out = []
    for number, whole, _ in _fields(attribute):
        value = _varint(whole, 1)[0] if number == 3 else 0
        out.append(bytes(whole[:1]) + _to_varint(value - 1) if 0 < value < 1 << 63 else bytes(whole))
    return b"".join(out)


def with_float16_cache(model: bytes) -> bytes:
    """Return the model with keys and values kept as float16, for attention that takes them so."""
    change = functools.partial(_kept_as, kind=FLOAT16)
    return _rewrite(memoryview(model), 7, lambda graph: _rewrite(memoryview(_rewrite(graph, 11, change)), 12, change))


# --- keys and values in 8 bits -----------------------------------------------------------------------------------


def with_int8_cache(model: bytes, scales: Mapping[str, np.ndarray]) -> bytes:
    """Return the model with keys and values kept as int8 codes: value = code * scale.

    scales: float32 [kv_heads, 1, head_dim] of every `past_key_values.<i>.key` and `.value`, which become constants.
    """

    def graph(data: memoryview) -> bytes:
        out = _rewrite(data, 1, _int8_attention)
        for number in (11, 12):
            out = _rewrite(memoryview(out), number, functools.partial(_kept_as, kind=INT8))
        return out + b"".join(_field(5, _tensor(_scale_name(name.encode()), array)) for name, array in scales.items())

    return _rewrite(memoryview(model), 7, graph)


def _field(number: int, payload: bytes) -> bytes:
    return _to_varint(number << 3 | 2) + _to_varint(len(payload)) + payload


def _number(number: int, value: int) -> bytes:
    return _to_varint(number << 3) + _to_varint(value)


def _scale_name(past: bytes) -> bytes:
    return past + b":scale"


def _tensor(name: bytes, array: np.ndarray) -> bytes:
    """Return a float32 TensorProto."""
    dims = b"".join(_number(1, size) for size in array.shape)
    return dims + _number(2, FLOAT) + _field(8, name) + _field(9, array.astype("<f4").tobytes())


def _int8_attention(node: memoryview) -> bytes:
    """Return a NodeProto as ONNX Runtime's own with keys and values of int8 if it is attention, else as it is."""
    if _text(node, 4) != ATTENTION:
        return bytes(node)
    node = memoryview(_rewrite(node, 7, lambda _: MICROSOFT))
    inputs = [bytes(payload) for number, _, payload in _fields(node) if number == 1 and payload is not None]
    pasts = [name for name in inputs if name.startswith(PAST)]
    more = [*[b""] * (KEY_SCALE - len(inputs)), *map(_scale_name, pasts)]
    kinds = [
        _field(1, name) + _field(4, b"PER_CHANNEL") + _number(20, STRING) for name in (b"k_quant_type", b"v_quant_type")
    ]
    width = _field(1, b"kv_cache_bit_width") + _number(3, 8) + _number(20, INTEGER)
    return b"".join([bytes(node), *(_field(1, name) for name in more), *(_field(5, a) for a in (*kinds, width))])


def _kept_as(value: memoryview, kind: int) -> bytes:
    """Return a ValueInfoProto of another element type if it is of keys or values, else as it is."""
    if not _text(value, 1).startswith((PAST, PRESENT)):
        return bytes(value)
    return _rewrite(value, 2, lambda type: _rewrite(type, 1, lambda tensor: bytes(tensor) + _number(1, kind)))
