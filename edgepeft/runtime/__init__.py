"""What runs on the device: load a bundle, classify text, swap adapters. Needs onnxruntime, numpy and tokenizers alone.

    from edgepeft.runtime import load
    model = load("bundle")
    model.classify("turn the kitchen lights off").label

Nothing heavy is imported here; `load` imports ONNX Runtime only after the bundle's manifest said that the installed
wheel may run on this processor, since a wrong one dies with an illegal instruction instead of an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgepeft.runtime.session import Model, load
    from edgepeft.runtime.tasks import Prediction

__all__ = ["Model", "Prediction", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        from edgepeft.runtime import session

        return getattr(session, name)
    if name == "Prediction":
        from edgepeft.runtime.tasks import Prediction

        return Prediction
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
