"""A real bundle in small: a mean-pooling classifier with one LoRA pair, laid out and sealed as the bundle stage does.

    h = mean_pool(E[ids]);  y = h + B·(A·h);  logits = head·y + bias          H = 32 hidden, R = 4, every tensor seeded

Adapter tensors are overridable inputs whose initializers point into adapters/default/adapter_model.safetensors, but for
B's, which lies turned in model.onnx.data.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.artifact import read_tensors, sha256_file, tensor_header, write_json, write_tensors
from edgepeft.runtime.manifest import seal

H, R = 32, 4
LABELS = ["light_off", "light_on", "music_play"]
BASE_DIGEST = hashlib.sha256(b"base").hexdigest()
FORMAT = "i4b32"
PREFIX = "base_model.model."
MODULE = PREFIX + "bert.encoder.layer.0.attention.self.query"
A, B, HEAD, BIAS = (
    MODULE + ".lora_A.weight",
    MODULE + ".lora_B.weight",
    PREFIX + "classifier.weight",
    PREFIX + "classifier.bias",
)
SENTENCE = "turn the kitchen lights on off play some music please now ##s ! a b c"
GATE = MODULE + ".gate"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *SENTENCE.split(" ")]


def adapter_tensors(seed: int, rank: int = R, labels: int = len(LABELS)) -> dict[str, np.ndarray]:
    """Return the tensors of one adapter; equal arguments give equal arrays."""
    rng = np.random.default_rng(seed)
    return {
        A: rng.normal(size=(rank, H)).astype(np.float16),
        B: rng.normal(size=(H, rank)).astype(np.float16),
        HEAD: rng.normal(size=(labels, H)).astype(np.float32),
        BIAS: rng.normal(size=(labels,)).astype(np.float32),
    }


def write_adapter(
    bundle: Path,
    name: str,
    seed: int,
    rank: int = R,
    labels: list[str] = LABELS,
    base: str = BASE_DIGEST,
    weights: str = FORMAT,
    **changes: Any,
) -> Path:
    """Write adapters/<name>; `changes` replace tensors by name, None drops one."""
    folder = bundle / "adapters" / name
    folder.mkdir(parents=True)
    tensors = {**adapter_tensors(seed, rank, len(labels)), **changes}
    kept = {n: t for n, t in tensors.items() if t is not None}
    metadata = {"format": "pt", "edgepeft.base": base, "edgepeft.format": weights}
    write_tensors(folder / "adapter_model.safetensors", kept, metadata)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": rank, "lora_alpha": rank})
    write_json(folder / "labels.json", labels)
    return folder


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))


def embedding() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(len(WORDS), H)).astype(np.float32)


def write_model(bundle: Path, default: Path, gated: bool = True) -> None:
    """Write model.onnx, its weights and B in model.onnx.data, the adapter's other tensors in the adapter's own file.

    Where it is not gated the gate is a constant.
    """
    import onnx
    from onnx import TensorProto, helper

    up = read_tensors(default / "adapter_model.safetensors")[B].T
    table = embedding().tobytes()
    (bundle / "model.onnx.data").write_bytes(table + up.tobytes())
    header, _, start = tensor_header(default / "adapter_model.safetensors")
    types = {"F16": TensorProto.FLOAT16, "F32": TensorProto.FLOAT}
    dims = {A: ["R", H], B: ["R", H], HEAD: ["labels", H], BIAS: ["labels"]}
    ids = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"])
        for n in ("input_ids", "attention_mask", "token_type_ids")
    ]
    feeds = [helper.make_tensor_value_info(n, types[header[n]["dtype"]], shape) for n, shape in dims.items()]
    if gated:
        feeds.append(helper.make_tensor_value_info(GATE, TensorProto.FLOAT, ["batch", "gates"]))

    def outside(name: str, kind: int, shape: list[int], place: Path, offset: int, length: int) -> onnx.TensorProto:
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", place.relative_to(bundle).as_posix()), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    data = bundle / "model.onnx.data"
    initializers = [
        outside("E", TensorProto.FLOAT, [len(WORDS), H], data, 0, len(table)),
        outside(B, TensorProto.FLOAT16, list(up.shape), data, len(table), up.nbytes),
    ]
    initializers.append(helper.make_tensor(GATE, TensorProto.FLOAT, [1, 1], [1.0]))
    for name, entry in header.items():
        if name == B:
            continue
        first, end = entry["data_offsets"]
        initializers.append(
            outside(
                name,
                types[entry["dtype"]],
                entry["shape"],
                default / "adapter_model.safetensors",
                start + first,
                end - first,
            )
        )
    node = helper.make_node
    nodes = [
        node("Gather", ["E", "input_ids"], ["e"]),
        node("Cast", ["attention_mask"], ["m"], to=1),
        node("Constant", [], ["last"], value_ints=[-1]),
        node("Constant", [], ["middle"], value_ints=[1]),
        node("Unsqueeze", ["m", "last"], ["m3"]),
        node("Mul", ["e", "m3"], ["em"]),
        node("ReduceSum", ["em", "middle"], ["sum"], keepdims=0),
        node("ReduceSum", ["m", "middle"], ["count"], keepdims=1),
        node("Div", ["sum", "count"], ["h"]),
        node("Cast", [A], ["a"], to=1),
        node("Cast", [B], ["b"], to=1),
        node("Gemm", ["h", "a"], ["low"], transB=1),
        node("Mul", ["low", GATE], ["gated"]),
        node("Gemm", ["gated", "b", "h"], ["y"]),
        node("Gemm", ["y", HEAD, BIAS], ["logits"], transB=1),
    ]
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "labels"])
    graph = helper.make_graph(nodes, "standin", [*ids, *feeds], [out], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())


def expected_logits(ids: list[int], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the logits [labels] of one unpadded text, in float64."""
    wide = {n: t.astype(np.float64) for n, t in tensors.items()}
    h = embedding()[ids].astype(np.float64).mean(0)
    y = h + wide[B] @ (wide[A] @ h) if A in wide else h
    return wide[HEAD] @ y + wide[BIAS]


def reseal(bundle: Path, **changes: Any) -> None:
    """Write the manifest for the files as they are now, so that a test can reach what lies behind the digests."""
    values = {
        "name": "standin", "task": "text-classification", "labels": LABELS, "max_length": 16, "positions": 64,
        "target": "host", "format": FORMAT, "method": "lora", "rank": R, "adapter": "separate", "activation": "int8",
        "base_digest": BASE_DIGEST,
        "onnxruntime": {"minimum": "1.18.0", "requirement": "onnxruntime>=1.18", "broken": []},
    }  # fmt: skip
    files = sorted(p for p in bundle.rglob("*") if p.is_file() and p.name != "manifest.json")
    entries = {p.relative_to(bundle).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
    (bundle / "manifest.json").write_bytes(seal({**values, "files": entries, **changes}))


def write_bundle(folder: Path, **changes: Any) -> Path:
    """Write a whole bundle and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, write_adapter(folder, "default", seed=1))
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "standin"}))
    reseal(folder, **changes)
    return folder
