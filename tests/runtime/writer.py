"""A language model in small, as a real sealed bundle: two layers of attention over bytes, with the names of an export.

    x = E[ids];  twice:  q, k, v = x Q, x K, x V  (layer 0: q += B·(gate·A·x));  x = tanh(x + attention(q, k, v) O)
    logits = x H          D = 64 wide, 4 heads of 16, 2 of them for keys, context 128, every tensor seeded

`Reference` is the same in plain numpy, token by token and float64: what the runtime must agree with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from builders import CHAT_TEMPLATE, write_chat_tokenizer

from edgepeft.artifact import sha256_file, write_json, write_tensors
from edgepeft.runtime.manifest import seal
from tests.runtime.standin import BASE_DIGEST, FORMAT

VOCABULARY, D, HEADS, KV_HEADS, HEAD_DIM, LAYERS, CONTEXT, RANK = 262, 64, 4, 2, 16, 2, 128, 4
EOS = 2
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj."
A, B, GATE = PREFIX + "lora_A.weight", PREFIX + "lora_B.weight", PREFIX + "gate"
KV = KV_HEADS * HEAD_DIM


def weights() -> dict[str, np.ndarray]:
    """Return the frozen tensors."""
    rng = np.random.default_rng(0)
    shapes = {"E": (VOCABULARY, D), "H": (D, VOCABULARY)}
    for i in range(LAYERS):
        shapes |= {f"Q{i}": (D, D), f"K{i}": (D, KV), f"V{i}": (D, KV), f"O{i}": (D, D)}
    out = {name: rng.normal(size=shape).astype(np.float32) * shape[0] ** -0.5 for name, shape in shapes.items()}
    return {**out, "E": out["E"] * VOCABULARY**0.5, "H": out["H"] * 3}


def rotary() -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(CONTEXT)[:, None] * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def adapter_tensors(seed: int, rank: int = RANK) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    down, up = rng.normal(size=(rank, D)) * D**-0.5, rng.normal(size=(D, rank)) * 2
    return {A: down.astype(np.float16), B: up.astype(np.float16)}


def write_adapter(bundle: Path, name: str, seed: int, rank: int = RANK) -> Path:
    """Write adapters/<name>, which has no labels."""
    folder = bundle / "adapters" / name
    folder.mkdir(parents=True)
    metadata = {"format": "pt", "edgepeft.base": BASE_DIGEST, "edgepeft.format": FORMAT}
    write_tensors(folder / "adapter_model.safetensors", adapter_tensors(seed, rank), metadata)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": rank, "lora_alpha": rank})
    return folder


def write_model(bundle: Path, tensors: dict[str, np.ndarray], gated: bool = True) -> None:
    """Write model.onnx, all weights in it; where it is not gated the gate is a constant."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from edgepeft.export import ops
    from edgepeft.export.functions import FUNCTIONS

    node = helper.make_node

    def layer(i: int, x: str) -> list[onnx.NodeProto]:
        past = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        present = [f"present.{i}.{part}" for part in ("key", "value")]
        q = [node("MatMul", [x, f"Q{i}"], [f"q{i}"])]
        if i == 0:
            q = [
                node("MatMul", [x, "Q0"], ["base0"]),
                node("Cast", [A], ["a"], to=1),
                node("Cast", [B], ["b"], to=1),
                node("Transpose", ["a"], ["at"]),
                node("MatMul", [x, "at"], ["low"]),
                node("Mul", ["low", GATE], ["gated"]),
                node("MatMul", ["gated", "b"], ["extra"]),
                node("Add", ["base0", "extra"], ["q0"]),
            ]
        return [
            *q,
            node("MatMul", [x, f"K{i}"], [f"k{i}"]),
            node("MatMul", [x, f"V{i}"], [f"v{i}"]),
            node(
                "GroupQueryAttention",
                [f"q{i}", f"k{i}", f"v{i}", *past, "last", "total", "cos", "sin"],
                [f"o{i}", *present],
                domain=ops.DOMAIN,
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                scale=HEAD_DIM**-0.5,
                softcap=0.0,
                local_window_size=-1,
                do_rotary=1,
                rotary_interleaved=0,
            ),
            node("MatMul", [f"o{i}", f"O{i}"], [f"p{i}"]),
            node("Add", [x, f"p{i}"], [f"s{i}"]),
            node("Tanh", [f"s{i}"], [f"x{i + 1}"]),
        ]

    nodes = [
        node("Constant", [], ["axis"], value_ints=[1]),
        node("Constant", [], ["one"], value_int=1),
        node("Constant", [], ["end"], value_ints=[2**62]),
        node("ReduceSum", ["attention_mask", "axis"], ["lengths"], keepdims=0),
        node("Sub", ["lengths", "one"], ["last64"]),
        node("Cast", ["last64"], ["last"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["columns"], start=1, end=2),
        node("Squeeze", ["columns"], ["total64"]),
        node("Cast", ["total64"], ["total"], to=TensorProto.INT32),
        node("Gather", ["E", "input_ids"], ["x0"]),
        *(part for i in range(LAYERS) for part in layer(i, f"x{i}")),
        node("Neg", ["logits_to_keep"], ["from"]),
        node("Slice", [f"x{LAYERS}", "from", "end", "axis"], ["kept"]),
        node("MatMul", ["kept", "H"], ["logits"]),
    ]
    info = helper.make_tensor_value_info
    cache = [f"{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    dims = [KV_HEADS, "past_sequence", HEAD_DIM]
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        info("attention_mask", TensorProto.INT64, ["batch", "total_sequence"]),
        *(info(f"past_key_values.{name}", TensorProto.FLOAT, ["batch", *dims]) for name in cache),
        info(A, TensorProto.FLOAT16, ["rank", D]),
        info(B, TensorProto.FLOAT16, ["rank", D]),
        *([info(GATE, TensorProto.FLOAT, ["batch", 1, "gates"])] if gated else []),
        info("logits_to_keep", TensorProto.INT64, [1]),
    ]
    outputs = [
        info("logits", TensorProto.FLOAT, ["batch", 1, VOCABULARY]),  # as an export declares it, whatever is kept
        *(info(f"present.{n}", TensorProto.FLOAT, ["batch", KV_HEADS, "total_sequence", HEAD_DIM]) for n in cache),
    ]
    cos, sin = rotary()
    constants = {**tensors, "cos": cos, "sin": sin, **adapter_tensors(1), "logits_to_keep": np.array([1], np.int64)}
    constants[B] = np.ascontiguousarray(constants[B].T)
    constants[GATE] = np.ones((1, 1, 1), np.float32)
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "writer", inputs, outputs, initializers)
    opsets = [helper.make_opsetid(*one) for one in (("", 21), ("com.microsoft", 1), (ops.DOMAIN, ops.VERSION))]
    functions = [FUNCTIONS["GroupQueryAttention"].proto()]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())


class Reference:
    """The model in float64, without any cache."""

    def __init__(self, adapter: dict[str, np.ndarray] | None = None) -> None:
        self._w = {name: value.astype(np.float64) for name, value in weights().items()}
        self._adapter = {name: value.astype(np.float64) for name, value in (adapter or {}).items()}
        self._cos, self._sin = rotary()

    def _turn(self, x: np.ndarray) -> np.ndarray:
        """Return [length, heads, HEAD_DIM] turned by its positions."""
        cos, sin = self._cos[: len(x), None], self._sin[: len(x), None]
        left, right = np.split(x, 2, axis=-1)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    def _attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        length = len(q)
        q = self._turn(q.reshape(length, HEADS, HEAD_DIM))
        k = self._turn(k.reshape(length, KV_HEADS, HEAD_DIM)).repeat(HEADS // KV_HEADS, axis=1)
        v = v.reshape(length, KV_HEADS, HEAD_DIM).repeat(HEADS // KV_HEADS, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5
        scores[:, ~np.tri(length, dtype=bool)] = -np.inf
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hqk,khd->qhd", powers / powers.sum(-1, keepdims=True), v).reshape(length, D)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return logits [len(ids), VOCABULARY]."""
        w, x = self._w, self._w["E"][ids]
        for i in range(LAYERS):
            q = x @ w[f"Q{i}"]
            if i == 0 and self._adapter:
                q = q + x @ self._adapter[A].T @ self._adapter[B].T
            x = np.tanh(x + self._attention(q, x @ w[f"K{i}"], x @ w[f"V{i}"]) @ w[f"O{i}"])
        return x @ w["H"]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Return the next tokens, up to the one that ends the answer."""
        out: list[int] = []
        while len(out) < count and EOS not in out:
            out.append(int(self.logits([*ids, *out])[-1].argmax()))
        return out


def reseal(bundle: Path, **changes: Any) -> None:
    """Write the manifest for the files as they are now; changes to "decoder" are merged into it."""
    decoder = {
        "layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocabulary": VOCABULARY, "bos": None,
        "eos": [EOS], "pad": 0, "add_bos": False, **changes.pop("decoder", {}),
    }  # fmt: skip
    values = {
        "name": "writer", "task": "text-generation", "context": CONTEXT, "max_length": CONTEXT, "decoder": decoder,
        "target": "host", "format": FORMAT, "method": "lora", "rank": RANK, "adapter": "separate",
        "activation": "int8", "base_digest": BASE_DIGEST,
        "onnxruntime": {"minimum": "1.18.0", "requirement": "onnxruntime>=1.18", "broken": []},
    }  # fmt: skip
    files = sorted(p for p in bundle.rglob("*") if p.is_file() and p.name != "manifest.json")
    entries = {p.relative_to(bundle).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
    (bundle / "manifest.json").write_bytes(seal({**values, "files": entries, **changes}))


def write_bundle(folder: Path, template: str | None = CHAT_TEMPLATE, **changes: Any) -> Path:
    """Write a whole bundle with the adapters "default", "other" and "third", and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, weights())
    for seed, name in enumerate(("default", "other", "third"), start=1):
        write_adapter(folder, name, seed)
    write_chat_tokenizer(folder, template)
    (folder / "config.json").write_text(json.dumps({"model_type": "writer"}))
    reseal(folder, **changes)
    return folder
