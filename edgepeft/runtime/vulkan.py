"""Vulkan: a bundle's own graph on a GPU, run whole by the execution provider that lies in kernels/gpu.

    model.onnx ─► ONNX Runtime ─► libedgepeft_vulkan.so ─► one command buffer, one submit for each run

It takes what the CPU takes, adapters included, and computes in float32 whatever activation the bundle names. A graph is
on the GPU with every node or not at all: `open_session` says which node was in the way. Needs ONNX Runtime 1.23.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from edgepeft.errors import TargetError

FILE_NAME = "libedgepeft_vulkan.so"
PROVIDER = "EdgePeftVulkanExecutionProvider"
OLDEST = "1.23"
SEVERITY = 4  # of ONNX Runtime's log: fatal errors alone


@functools.cache
def load_library(path: Path) -> Any:
    """Load the provider's library into this process. Raises TargetError where it cannot be."""
    try:
        code = ctypes.CDLL(str(path))
        for name in ("missing", "device", "refused"):
            getattr(code, f"edgepeft_vulkan_{name}").restype = ctypes.c_char_p
        code.edgepeft_vulkan_allocate.restype = ctypes.c_void_p
        code.edgepeft_vulkan_allocate.argtypes = [ctypes.c_uint64]
        code.edgepeft_vulkan_free.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        raise TargetError(f"{path}: not edgepeft's Vulkan library, or it does not load here: {error}.") from None
    return code


def missing(path: Path) -> str:
    """Say why no GPU can be used through Vulkan here, or return ""."""
    return load_library(path).edgepeft_vulkan_missing().decode()


def device_name(path: Path) -> str:
    """Return what the driver calls the GPU in use."""
    return load_library(path).edgepeft_vulkan_device().decode()


def counts(path: Path) -> tuple[int, int]:
    """Return how many command buffers were submitted and shaders dispatched since the process began."""
    submits, dispatches = ctypes.c_uint64(), ctypes.c_uint64()
    load_library(path).edgepeft_vulkan_counts(ctypes.byref(submits), ctypes.byref(dispatches))
    return submits.value, dispatches.value


@functools.cache
def _register(path: Path) -> None:
    import onnxruntime

    try:
        onnxruntime.register_execution_provider_library("edgepeft-vulkan", str(path))
    except AttributeError:
        raise TargetError(f"ONNX Runtime {onnxruntime.__version__} takes no plugins: 1.23 or newer does.") from None
    except Exception as error:  # ORT's own exceptions share no base
        raise TargetError(f"{path}: ONNX Runtime does not take it: {error}") from None


def open_session(path: Path, model: Path | bytes) -> Any:
    """Make the session of a model with every node on the GPU. Raises TargetError where that cannot be."""
    import onnxruntime

    if reason := missing(path):
        raise TargetError(f"device 'vulkan': {reason}. device='cpu' works everywhere.")
    _register(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = SEVERITY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    options.add_provider_for_devices(found[:1], {})
    try:
        session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options)
    except Exception as error:  # ORT's own exceptions share no base
        why = load_library(path).edgepeft_vulkan_refused().decode() or str(error)
        raise TargetError(f"device 'vulkan': this model does not run there: {why}. device='cpu' works.") from None
    session.disable_fallback()
    return session
