"""What runs on the device: load a bundle, classify or write text, swap adapters.

    from edgepeft.runtime import load
    load("bundle").classify("turn the kitchen lights off").label            task text-classification
    load("writer").chat("Turn the kitchen lights off, please.").text        task text-generation

Needs onnxruntime, numpy and tokenizers alone, and jinja2 for messages, which a chat template makes a prompt of.

Nothing heavy is imported here; `load` imports ONNX Runtime only after the bundle's manifest said that the installed
wheel may run on this processor, since a wrong one dies with an illegal instruction instead of an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgepeft.runtime.classify import Model
    from edgepeft.runtime.generate import Answer, Generator, Stream
    from edgepeft.runtime.session import load
    from edgepeft.runtime.tasks import Prediction

__all__ = ["Answer", "Generator", "Model", "Prediction", "Stream", "load"]

WHERE = {
    "Answer": "answer", "Generator": "generate", "Model": "classify", "Prediction": "tasks", "Stream": "answer",
    "load": "session",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{WHERE[name]}"), name)
