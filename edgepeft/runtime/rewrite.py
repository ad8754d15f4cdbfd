"""Rewriting attributes of nodes in a serialized model, with no onnx package at hand.

A protobuf message is a row of fields: a varint key (number << 3 | wire type), then a varint (type 0), 8 bytes (1), a
length and bytes (2) or 4 bytes (5). Only the messages on the way are opened, every other field is copied as it is:

    ModelProto.graph = 7 ► GraphProto.node = 1 ► NodeProto.domain = 7, .attribute = 5
                         ► AttributeProto.name = 1, .i = 3, .s = 4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from edgepeft.errors import ArtifactError

DOMAIN = b"edgepeft"
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
