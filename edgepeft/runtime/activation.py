"""Rewriting the `activation` attribute of our nodes in a serialized model, with no onnx package at hand.

A protobuf message is a row of fields: a varint key (number << 3 | wire type), then a varint (type 0), 8 bytes (1), a
length and bytes (2) or 4 bytes (5). Only the messages on the way are opened, every other field is copied as it is:

    ModelProto.graph = 7 ► GraphProto.node = 1 ► NodeProto.domain = 7, .attribute = 5 ► AttributeProto.name = 1, .s = 4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from edgepeft.errors import ArtifactError

DOMAIN = b"edgepeft"


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


def with_activation(model: bytes, activation: str) -> bytes:
    """Return the model with every edgepeft node's activation set. Raises ArtifactError when it has none."""
    count = 0

    def attribute(data: memoryview) -> bytes:
        nonlocal count
        if (1, b"activation") not in ((n, bytes(p)) for n, _, p in _fields(data) if p is not None):
            return bytes(data)
        count += 1
        return _rewrite(data, 4, lambda _: activation.encode())

    def node(data: memoryview) -> bytes:
        ours = any(n == 7 and p is not None and bytes(p) == DOMAIN for n, _, p in _fields(data))
        return _rewrite(data, 5, attribute) if ours else bytes(data)

    out = _rewrite(memoryview(model), 7, lambda graph: _rewrite(graph, 1, node))
    if not count:
        raise ArtifactError("the model has no edgepeft node whose activation could be chosen.")
    return out
