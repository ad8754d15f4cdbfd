"""GGUF LoRA files, as llama.cpp's convert_lora_to_gguf writes them (ggml/docs/gguf.md; little-endian, version 2 or 3).

    "GGUF"  version u32  tensors u64  values u64
    values:   key, type u32, value              texts: length u64, bytes
    tensors:  name, dimensions u32, sizes u64 (fastest first), type u32, offset u64         then aligned data

    general.type = "adapter"   adapter.type = "lora"   adapter.lora.alpha   scale = alpha / R, or 1 where alpha is 0

A pair is named after llama.cpp's tensor: blk.0.attn_q.weight.lora_a; the family of general.architecture gives the
module. Rows of q and k are turned for the architecture "llama" (`Foreign.turned`): how many heads there are stands in
the base alone. Types: F32, F16, BF16, Q8_0. Left out: big-endian files, embeddings, other quantized types.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.adapt.foreign import PREFIX, Foreign, lora_settings, ranks, some
from edgepeft.errors import ArtifactError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TEXT, LIST = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ALIGNMENT_BYTES = 32
LEAST_ENTRY_BYTES = 13
BLOCK = 32  # of Q8_0: a float16 scale and 32 signed bytes
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("Q8_0", BLOCK, 2 + BLOCK), 30: ("BF16", 1, 2)}  # name, per, bytes
ROLES = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "attn_qkv": "qkv", "ffn_gate": "gate",
    "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip
FUSED_UP = {"up": "gate_up"}  # llama.cpp calls the two in one by the name of the second
ARCHITECTURES = {"gemma3": "gemma3_text"}  # the others are called as in transformers
TURNED = ("llama",)
TENSOR = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>\w+)\.weight\.lora_(?P<side>[ab])$")


class _Reader:
    """Reads a file's parts in turn and never past its end."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        self.data = np.memmap(path, np.uint8, "r")

    def fail(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: truncated or not a GGUF file: {what}. Copy or convert it again.")

    def take(self, count: int) -> bytes:
        if count > self.data.size - self.at:
            raise self.fail(f"{count} bytes at {self.at} of {self.data.size}")
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, what: str, least_bytes: int = LEAST_ENTRY_BYTES) -> int:
        found = self.number("Q")
        if found * least_bytes > self.data.size - self.at:
            raise self.fail(f"{found} {what} in {self.data.size} bytes")
        return found

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise self.fail("a name that is no UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == TEXT:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != LIST or depth > 1:
            raise self.fail(f"a value of type {kind}")
        inner = self.number("I")
        return [self.value(inner, depth + 1) for _ in range(self.count("elements", 1))]


def read(path: Path) -> Foreign:
    """Read a GGUF LoRA file. Raises ArtifactError for a damaged file, and for a GGUF that is no LoRA."""
    values, stored = _parse(path)
    architecture = str(values.get("general.architecture", ""))
    kind = values.get("general.type"), values.get("adapter.type")
    if kind != ("adapter", "lora"):
        what = f"general.type {kind[0]!r}, adapter.type {kind[1]!r}"
        raise ArtifactError(f"{path}: expected a LoRA adapter, found a GGUF file with {what}. Give the adapter's file.")
    tensors, turned, strange = _named(stored, architecture, path)
    told = values.get("adapter.lora.alpha", 0.0)
    if not isinstance(told, (int, float)):
        raise ArtifactError(f"{path}: adapter.lora.alpha: expected a number, found {told!r:.60}. Convert it again.")
    alpha = float(told) or None
    base = next((str(values[k]) for k in ("general.base_model.0.repo_url", "general.basename") if k in values), None)
    return Foreign(
        "llama.cpp", "GGUF LoRA", path, lora_settings(ranks(tensors), alpha, base), tensors,
        {"architecture": architecture}, ("names of llama.cpp",), turned, tuple(strange),
    )  # fmt: skip


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header's values and {name: array}, sizes slowest first."""
    reader = _Reader(path)
    if reader.take(4) != MAGIC:
        raise reader.fail("it does not begin with GGUF")
    if (version := reader.number("I")) not in VERSIONS:
        raise ArtifactError(f"{path}: GGUF version {version}; known are {', '.join(map(str, VERSIONS))}.")
    tensors, count = reader.count("tensors"), reader.count("values")
    values = {}
    for _ in range(count):
        key = reader.text()
        values[key] = reader.value(reader.number("I"))
    entries = [_entry(reader) for _ in range(tensors)]
    alignment = values.get("general.alignment", ALIGNMENT_BYTES)
    if not isinstance(alignment, int) or alignment < 1:
        raise reader.fail(f"an alignment of {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    arrays = {name: _array(reader, name, start + offset, sizes, kind) for name, offset, sizes, kind in entries}
    return values, arrays


def _entry(reader: _Reader) -> tuple[str, int, tuple[int, ...], int]:
    """Return a tensor's name, offset, sizes (slowest first) and type."""
    name, dims = reader.text(), reader.number("I")
    if dims > 4:
        raise reader.fail(f"{name} with {dims} dimensions")
    sizes = tuple(reader.number("Q") for _ in range(dims))[::-1]
    kind = reader.number("I")
    return name, reader.number("Q"), sizes, kind


def _array(reader: _Reader, name: str, start: int, sizes: tuple[int, ...], kind: int) -> np.ndarray:
    if kind not in TYPES:
        known = ", ".join(row[0] for row in TYPES.values())
        raise ArtifactError(f"{reader.path}: {name} has GGUF type {kind}; known are {known}. Convert it as f16.")
    tag, per, size = TYPES[kind]
    if sizes and sizes[-1] % per:
        raise reader.fail(f"{name} {list(sizes)} in blocks of {per}")
    length = math.prod(sizes) // per * size
    if start + length > reader.data.size:
        raise reader.fail(f"{name} ends at byte {start + length} of {reader.data.size}")
    return _numbers(reader.data[start : start + length], tag).reshape(sizes)


def _numbers(raw: np.ndarray, tag: str) -> np.ndarray:
    """Return the numbers that stored bytes mean; BF16 and Q8_0 as float32."""
    if tag == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if tag == "Q8_0":
        blocks = raw.reshape(-1, 2 + BLOCK)
        scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
        return (scales * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)).reshape(-1)
    return np.asarray(raw.view({"F32": "<f4", "F16": "<f2"}[tag]))


def _named(
    stored: Mapping[str, np.ndarray], architecture: str, path: Path
) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Return tensors under PEFT's names, the modules whose rows are turned, and the names that say nothing."""
    from edgepeft.backbone.families import FAMILIES

    family = FAMILIES.get(ARCHITECTURES.get(architecture, architecture))
    if family is None:
        known = some(FAMILIES, len(FAMILIES))
        raise ArtifactError(f"{path}: a LoRA for the architecture {architecture!r}; known are {known}.")
    tensors, turned, strange = {}, {}, []
    for name, array in stored.items():
        match = TENSOR.match(name)
        role = ROLES.get(match["part"], "") if match else ""
        role = role if role in family.linears else FUSED_UP.get(role, "")
        if match is None or role not in family.linears:
            strange.append(name)
            continue
        module = f"{family.prefix}.{family.linears[role].format(i=int(match['layer']))}"
        tensors[f"{PREFIX}{module}.lora_{match['side'].upper()}.weight"] = array
        if architecture in TURNED and role in ("q", "k"):
            turned[module] = role
    return tensors, turned, strange
