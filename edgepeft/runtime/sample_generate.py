"""Continue a text with this bundle: python sample.py "The kitchen is". Nothing of edgepeft is needed.

Needs onnxruntime, numpy and tokenizers (see requirements.txt). Greedy, and the text is taken as it is. It trusts the
files; `edgepeft.runtime.load` checks every digest first, knows the chat template, samples, streams and swaps adapters.
"""

import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

HERE = Path(__file__).parent
BROKEN_OPTIMIZER = "FuseFp16InitializerToFp32NodeTransformer"  # ends the process in ONNX Runtime 1.23 to 1.29
MAX_NEW_TOKENS = 64
NEW_WINDOWS = (1, 24)
PAST = "past_key_values."


def open_session() -> ort.InferenceSession:
    """Return the model, on the bundle's op library where there is one for this machine."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    library = HERE / "lib" / f"{sys.platform}-{platform.machine()}" / "libedgepeft_ops.so"
    if library.exists():  # without it the same file runs on stock ONNX Runtime, slower
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(
        str(HERE / "model.onnx"), options, providers=["CPUExecutionProvider"], disabled_optimizers=[BROKEN_OPTIMIZER]
    )


def stored_prompt() -> dict[str, np.ndarray]:
    """Return the keys and values that the adapter puts before a text, by the input's name; none of most adapters."""
    path = HERE / "adapters" / "default" / "terms.safetensors"
    raw = path.read_bytes() if path.exists() else b""
    start = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, entry in json.loads(raw[8:start] or b"{}").items():
        if name.startswith(PAST):
            first, last = entry["data_offsets"]
            found[name] = np.frombuffer(raw[start + first : start + last], np.float32).reshape(entry["shape"])
    return found


def bind_cache(
    session: ort.InferenceSession, about: dict, capacity: int, prompt: dict[str, np.ndarray]
) -> tuple[ort.IOBinding, list[ort.OrtValue]]:
    """Bind keys and values, past and present in one place: a run writes its own columns behind those before.

    The values are returned too: a binding does not keep memory alive that came from numpy.
    """
    binding, values = session.io_binding(), []
    for layer in range(about["layers"]):
        for part in ("key", "value"):
            memory = np.zeros((1, about["kv_heads"], capacity, about["head_dim"]), np.float32)
            if prompt:
                begun = prompt[f"{PAST}{layer}.{part}"]
                memory[:, :, : begun.shape[2]] = begun
            values.append(ort.OrtValue.ortvalue_from_numpy(memory))
            binding.bind_ortvalue_input(f"{PAST}{layer}.{part}", values[-1])
            binding.bind_ortvalue_output(f"present.{layer}.{part}", values[-1])
    return binding, values


def main(text: str) -> None:
    """Print a text's continuation and how fast it came."""
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    about, context = manifest["decoder"], manifest["context"]
    if about.get("windows") and tuple(map(int, ort.__version__.split(".")[:2])) < NEW_WINDOWS:
        sys.exit(f"onnxruntime {ort.__version__} counts this model's attention windows otherwise: use edgepeft.runtime")
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    session = open_session()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if about["add_bos"]:
        ids.insert(0, about["bos"])
    begun = stored_prompt()
    before = begun[f"{PAST}0.key"].shape[2] if begun else 0
    context -= before
    if not 0 < len(ids) < context:
        sys.exit(f"the text has {len(ids)} tokens, expected 1 to {context - 1}")
    total = min(context, len(ids) + MAX_NEW_TOKENS)
    binding, _values = bind_cache(session, about, before + total, begun)

    started, known, prompt = time.perf_counter(), 0, len(ids)
    while len(ids) < total and (len(ids) == prompt or ids[-1] not in about["eos"]):
        new, mask = np.array([ids[known:]], np.int64), np.ones((1, before + len(ids)), np.int64)
        logits = np.empty((1, 1, about["vocabulary"]), np.float32)  # of the last token alone
        binding.bind_cpu_input("input_ids", new)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        session.run_with_iobinding(binding)
        known = len(ids)
        ids.append(int(logits[0, 0].argmax()))
    spent_s = time.perf_counter() - started

    given = tokenizer.decode(ids[:prompt])  # a word's leading space shows only behind the word before it
    print(tokenizer.decode(ids)[len(given) :])
    print(f"{len(ids) - prompt} tokens, {(len(ids) - prompt) / spent_s:.1f} a second", file=sys.stderr)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "The kitchen is")
