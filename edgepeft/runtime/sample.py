"""Classify text with this bundle: python sample.py "turn the kitchen lights off". Nothing of edgepeft is needed.

Needs onnxruntime, numpy and tokenizers (see requirements.txt). It trusts the files; `edgepeft.runtime.load` checks
every digest first and swaps adapters.
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


def main(text: str) -> None:
    """Print the three likeliest labels of a text and the time they took."""
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(manifest["max_length"])

    options = ort.SessionOptions()
    options.log_severity_level = 3
    library = HERE / "lib" / f"{sys.platform}-{platform.machine()}" / "libedgepeft_ops.so"
    if library.exists():  # without it the same file runs on stock ONNX Runtime, slower
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(
        str(HERE / "model.onnx"), options, providers=["CPUExecutionProvider"], disabled_optimizers=[BROKEN_OPTIMIZER]
    )

    started = time.perf_counter()
    encoding = tokenizer.encode(text)
    rows = {
        "input_ids": encoding.ids,
        "attention_mask": encoding.attention_mask,
        "token_type_ids": encoding.type_ids,
    }
    feeds = {item.name: np.array([rows[item.name]], np.int64) for item in session.get_inputs()}
    logits = session.run(None, feeds)[0][0]
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    spent_ms = 1000 * (time.perf_counter() - started)

    for place in np.argsort(-scores)[:3]:
        print(f"{manifest['labels'][place]}\t{scores[place]:.4f}")
    print(f"{spent_ms:.1f} ms", file=sys.stderr)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "turn the kitchen lights off")
