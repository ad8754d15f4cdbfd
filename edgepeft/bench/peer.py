"""The float32 peer: the bundle's architecture in float32 under ONNX Runtime, as well as its own tools make it.

torch's exporter, then ONNX Runtime's transformer optimizer (fused attention, LayerNorm and GELU). It is written twice:
as one file, which is what exporters give for models below 2 GB, and with its weights in a second file, which ONNX
Runtime maps instead of parsing: less memory at the same speed, for those who know. The weights are random, as neither
speed nor memory depends on their values. Needs the build extra; the files go to a folder of the caller's.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.errors import EdgePeftError
from edgepeft.runtime.adapters import DEFAULT
from edgepeft.runtime.manifest import check_bundle
from edgepeft.runtime.session import REST
from edgepeft.runtime.tasks import Prediction, predictions
from edgepeft.runtime.tokens import NAMES, Tokens

TOLERANCE = 1e-4


class Peer:
    """A float32 model with the same tokenizer and the same ways to ask it as `edgepeft.runtime.Model`."""

    def __init__(self, bundle: Path | str, model_file: Path | str, threads: int) -> None:
        import onnxruntime

        manifest = check_bundle(bundle)
        self.tokens = Tokens(manifest.folder / "tokenizer.json", manifest["max_length"])
        self.labels = manifest["labels"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry(*REST)  # or the threads of either would burden the other's next run
        self.session = onnxruntime.InferenceSession(str(model_file), options, providers=["CPUExecutionProvider"])

    def run(self, arrays: dict[str, np.ndarray], adapter: str = DEFAULT) -> np.ndarray:
        """Return logits float32 [batch, labels]."""
        return self.session.run(None, arrays)[0]

    def classify(self, text: str) -> Prediction:
        """Return the answer for one text."""
        logits = self.run(self.tokens.arrays(self.tokens.encode([text])))
        return predictions(logits, self.labels)[0]


def load_peer(bundle: Path | str, model_file: Path | str, threads: int) -> Peer:
    """Load a float32 model beside a bundle."""
    return Peer(bundle, model_file, threads)


def export_peer(bundle: Path, folder: Path) -> dict[str, Path]:
    """Write the float32 peer of a bundle below `folder`; return {"float32": one file, "float32 mapped": with a second}.

    Raises EdgePeftError when torch, transformers or onnx are not installed, or the export is not what PyTorch computes.
    """
    try:
        import onnx  # noqa: F401 - the exporter needs it
        import torch
        from onnxruntime.transformers import optimizer
        from transformers import AutoConfig, AutoModelForSequenceClassification
    except ImportError as error:
        raise EdgePeftError(f"the float32 peer needs {error.name}: pip install 'edgepeft[build]'.") from None
    config = AutoConfig.from_pretrained(bundle)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    raw, whole, mapped = (folder / f"{name}.onnx" for name in ("raw", "peer", "mapped"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
        _export(torch, model, raw)
        heads, hidden = config.num_attention_heads, config.hidden_size
        fused = optimizer.optimize_model(str(raw), config.model_type, heads, hidden, opt_level=0, use_gpu=False)
        fused.save_model_to_file(str(whole))
        fused.save_model_to_file(str(mapped), use_external_data_format=True)
    raw.unlink()
    _compare(torch, model, whole)
    return {"float32": whole, "float32 mapped": mapped}


def _export(torch: Any, model: Any, path: Path) -> None:
    """Trace the model with inputs of any batch and length."""

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits

    ids = torch.ones(2, 9, dtype=torch.int64)
    axes = {name: {0: "batch", 1: "sequence"} for name in NAMES}
    torch.onnx.export(
        Logits().eval(), (ids, ids, 0 * ids), str(path), input_names=list(NAMES), output_names=["logits"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip


def _compare(torch: Any, model: Any, path: Path) -> None:
    """Raise EdgePeftError unless the file gives PyTorch's logits on a padded batch."""
    import onnxruntime

    ids = np.arange(1, 27, dtype=np.int64).reshape(2, 13)
    mask = np.ones_like(ids)
    mask[1, 7:] = 0
    arrays = dict(zip(NAMES, (ids, mask, 0 * ids), strict=True))
    found = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, arrays)[0]
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(a) for name, a in arrays.items()}).logits.numpy()
    if not np.abs(found - expected).max() <= TOLERANCE:
        raise EdgePeftError(f"the float32 peer differs from PyTorch by {np.abs(found - expected).max():.2g}.")
