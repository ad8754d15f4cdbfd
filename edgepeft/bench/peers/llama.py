"""llama.cpp as a measured process, and its files: Q4_0 by its own quantizer, LoRA in float16; random values.

    python llama.py make '{"folder", "settings", "tensors", "linears", "rank", "context"}'
    python llama.py run  '{"folder", "threads", "context"}'

tensors: {Hugging Face name: shape}; linears: those of them that get an adapter; settings: the model's config.json.
Needs numpy, gguf and llama-cpp-python, whose C binding is used as it is. Of a tied head llama.cpp makes what it thinks
best (Q6_K or Q8_0); that is left to it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:
    import protocol  # type: ignore[import-not-found, unused-ignore]  # beside it
else:
    from edgepeft.bench.peers import protocol

BASE, ADAPTER = "q4_0.gguf", "lora-f16.gguf"
F16, Q4_0 = 1, 2  # LLAMA_FTYPE_MOSTLY_*
BATCH = 512
DEVIATION = 0.02
POOL = 1 << 22


def make(about: dict[str, Any]) -> None:
    """Write what is missing in the folder: the base and the adapter."""
    folder = Path(about["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ADAPTER).exists():
        _write(about, folder / ADAPTER, adapter=True)
    if not (folder / BASE).exists():
        whole = folder / "f16.part"
        _write(about, whole, adapter=False)
        _quantize(whole, folder / BASE)
        whole.unlink()


def _random(rng: Any, shape: list[int], dtype: Any) -> Any:
    """Return values from a pool that repeats: drawing a billion takes minutes."""
    import numpy as np

    pool = (rng.standard_normal(min(int(np.prod(shape)), POOL), np.float32) * DEVIATION).astype(dtype)
    return np.resize(pool, shape)


def _write(about: dict[str, Any], path: Path, adapter: bool) -> None:
    """Write a GGUF file whole or not at all, its tensors under the names that the gguf package knows."""
    import gguf
    import numpy as np

    settings, rng, part = about["settings"], np.random.default_rng(0), path.with_suffix(".writing")
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == settings["model_type"])
    names = gguf.get_tensor_name_map(arch, settings["num_hidden_layers"])
    writer = gguf.GGUFWriter(part, settings["model_type"], use_temp_file=True)
    if adapter:
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(about["rank"]))
    else:
        _describe(writer, settings, about["context"])
    for name, shape in about["tensors"].items():
        known = names.get_name(name, (".weight", ".bias"))
        if known is None:
            raise ValueError(f"{name}: llama.cpp has no name for this tensor of {settings['model_type']}")
        if not adapter:
            writer.add_tensor(known, _random(rng, shape, np.float16 if len(shape) > 1 else np.float32))
        elif name in about["linears"]:
            writer.add_tensor(f"{known}.lora_a", _random(rng, [about["rank"], shape[1]], np.float16))
            writer.add_tensor(f"{known}.lora_b", _random(rng, [shape[0], about["rank"]], np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def _describe(writer: Any, settings: dict[str, Any], context: int) -> None:
    """Write a model's sizes; it has a vocabulary and no tokenizer."""
    heads, width = settings["num_attention_heads"], settings["hidden_size"]
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(settings.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(settings["rope_theta"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_file_type(F16)
    writer.add_tokenizer_model("none")


def _quantize(source: Path, path: Path) -> None:
    import llama_cpp

    llama_cpp.llama_backend_init()
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.nthread, asked.ftype = 2, Q4_0
    part = path.with_suffix(".writing")
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(asked)):
        raise SystemExit(f"{source}: llama.cpp could not quantize it ({code}).")
    part.rename(path)


class Text:
    """A context of its own; an adapter, or None, is on for all of it."""

    def __init__(self, lib: Any, model: Any, adapter: Any, about: dict[str, Any]) -> None:
        self._lib, self.length = lib, 0
        asked = lib.llama_context_default_params()
        asked.n_ctx, asked.n_batch, asked.n_ubatch = about["context"], BATCH, BATCH
        asked.n_threads = asked.n_threads_batch = about["threads"]
        self._context = lib.llama_init_from_model(model, asked)
        if adapter is not None:
            handle = lib.llama_adapter_lora_p_ctypes
            adapters, scales = (handle * 1)(ctypes.cast(adapter, handle)), (ctypes.c_float * 1)(1.0)
            if lib.llama_set_adapters_lora(self._context, adapters, 1, scales):
                raise SystemExit("llama.cpp refused the adapter.")

    def read(self, ids: list[int]) -> None:
        """Read tokens, BATCH at a time, and take the logits of the last."""
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            held = (self._lib.llama_token * len(part))(*part)  # the batch only points to it
            if code := self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(held, len(part))):
                raise SystemExit(f"llama_decode failed ({code}).")
        self._lib.llama_synchronize(self._context)
        self._lib.llama_get_logits_ith(self._context, -1)
        self.length += len(ids)

    def back(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), 0, length, -1)
        self.length = length


class Engine:
    """The quantized model and its adapter."""

    def __init__(self, lib: Any, about: dict[str, Any]) -> None:
        folder = Path(about["folder"])
        self._lib, self._about = lib, about
        asked = lib.llama_model_default_params()
        asked.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(str(folder / BASE).encode(), asked)
        if not self._model:
            raise SystemExit(f"llama.cpp refused {folder / BASE}.")
        self._adapter = lib.llama_adapter_lora_init(self._model, str(folder / ADAPTER).encode())
        self.version = lib.__version__
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def open(self, adapter: bool) -> Text:
        """Return an empty text."""
        return Text(self._lib, self._model, self._adapter if adapter else None, self._about)


def run(about: dict[str, Any]) -> None:
    """Serve; what llama.cpp has to say is dropped."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    protocol.serve(lambda: Engine(llama_cpp, about))


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](json.loads(sys.argv[2]))
