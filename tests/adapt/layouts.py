"""One LoRA adapter of a tiny Llama in the layouts of other tools, written by their own libraries where possible."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.artifact import write_tensors

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, RANK = 2, 64, 128, 4, 2, 4
ALPHA = 6.0
KV = HIDDEN * KV_HEADS // HEADS
PREFIX = "base_model.model."
SHAPES = {"q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN), "down": (HIDDEN, INNER)}
HF = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "down": "mlp.down_proj"}
LLAMA_CPP = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "down": "ffn_down"}

Pairs = dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]


def pairs(seed: int = 0) -> Pairs:
    """Return {(layer, role): (a_rk, b_nr)}."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16).astype(np.float32)

    return {(i, r): (draw(RANK, k), draw(n, RANK)) for i in range(LAYERS) for r, (n, k) in SHAPES.items()}


def peft_tensors(made: Pairs) -> dict[str, np.ndarray]:
    """Return them under PEFT's names."""
    out = {}
    for (i, role), (a_rk, b_nr) in made.items():
        name = f"{PREFIX}model.layers.{i}.{HF[role]}.lora_"
        out |= {f"{name}A.weight": a_rk, f"{name}B.weight": b_nr}
    return out


def peft_settings(**changes: Any) -> dict[str, Any]:
    settings = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny", "target_modules": [name.rpartition(".")[2] for name in HF.values()],
    }  # fmt: skip
    return {**settings, **changes}


def write_peft(
    folder: Path, tensors: Mapping[str, np.ndarray] | None = None, metadata: Mapping[str, str] | None = None,
    **changes: Any,
) -> Path:  # fmt: skip
    folder.mkdir(parents=True)
    tensors = peft_tensors(pairs()) if tensors is None else tensors
    write_tensors(folder / "adapter_model.safetensors", tensors, metadata or {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(peft_settings(**changes)))
    return folder


def write_mlx(folder: Path, made: Pairs | None = None, **changes: Any) -> Path:
    """As mlx-lm saves an adapter."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    tensors = {}
    for (i, role), (a_rk, b_nr) in (made or pairs()).items():
        name = f"model.layers.{i}.{HF[role]}.lora_"
        tensors |= {f"{name}a": a_rk.T.copy(), f"{name}b": b_nr.T.copy()}
    save_file(tensors, str(folder / "adapters.safetensors"))
    settings = {
        "fine_tune_type": "lora", "num_layers": 16, "model": "tiny",
        "lora_parameters": {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0}, **changes,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_onnx_adapter(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    import onnxruntime

    kept = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in kept.items()})
    adapter.export_adapter(str(path))
    return path


def genai_tensors(made: Pairs) -> dict[str, np.ndarray]:
    """As GenAI's builder names and turns them: the scale in B."""
    out = {}
    for (i, role), (a_rk, b_nr) in made.items():
        name = f"model.layers.{i}.{HF[role].replace('self_attn', 'attn')}.lora_"
        out |= {f"{name}A.MatMul.weight": a_rk.T, f"{name}B.MatMul.weight": b_nr.T * np.float32(ALPHA / RANK)}
    return out


def as_llama_cpp(role: str, b_nr: np.ndarray) -> np.ndarray:
    """Return B with the rows of a head as llama.cpp's converter turns them for Llama."""
    heads = {"q": HEADS, "k": KV_HEADS}.get(role)
    if heads is None:
        return b_nr
    return b_nr.reshape(heads, 2, len(b_nr) // heads // 2, -1).swapaxes(1, 2).reshape(b_nr.shape)


def gguf_tensors(made: Pairs) -> dict[str, np.ndarray]:
    out = {}
    for (i, role), (a_rk, b_nr) in made.items():
        name = f"blk.{i}.{LLAMA_CPP[role]}.weight.lora_"
        out |= {f"{name}a": a_rk, f"{name}b": as_llama_cpp(role, b_nr)}
    return out


GGUF_VALUES = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": ALPHA,
}


def gguf_bytes(tensors: Mapping[str, np.ndarray], values: Mapping[str, Any] | None = None) -> bytes:
    """Return a GGUF file, version 3, of float16 or float32 tensors."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word.encode())) + word.encode()

    values = GGUF_VALUES if values is None else values
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, value in values.items():
        kind = struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<If", 6, value)
        out += text(key) + kind
    data = b""
    for name, array in tensors.items():
        data += bytes(-len(data) % 32)
        sizes = array.shape[::-1]
        what = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, int(array.dtype == np.float16), len(data))
        out += text(name) + what
        data += np.ascontiguousarray(array).tobytes()
    return out + bytes(-len(out) % 32) + data


def write_gguf(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write it with llama.cpp's own library."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, array in tensors.items():
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
