"""Vulkan: a bundle's own graph on a GPU, run whole by the execution provider that lies in kernels/gpu.

    model.onnx ─► ONNX Runtime ─► libedgepeft_vulkan.so ─► one command buffer, one submit for each run

It takes what the CPU takes, adapters included, and computes in float32 whatever activation the bundle names. A graph is
on the GPU with every node or not at all: `open_session` says which node was in the way. Needs ONNX Runtime 1.23. Which
GPU it is and what it can, the library sees when it is first used (`about`); see `edgepeft.deploy.gpus`.

precision "float16" keeps keys and values in float16 on any GPU, in words that plain shaders pack, and rounds products
of weights and activations to it where the GPU multiplies so; sums, norms and attention stay float32.

Memory is what the CPU and the GPU both see: adapters are put there once, keys and values live there, and a run copies
neither. Arrays of it are ordinary ones to numpy and to ONNX Runtime.
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgepeft.errors import TargetError
from edgepeft.runtime import rewrite
from edgepeft.runtime.library import INSTALLED, platform_tag
from edgepeft.runtime.manifest import Manifest

FILE_NAME = "libedgepeft_vulkan.so"
SOFTWARE = "software"  # how `about` begins where a driver computes on the CPU
PROVIDER = "EdgePeftVulkanExecutionProvider"
SEVERITY = 4  # of ONNX Runtime's log: fatal errors alone
ALIGNMENT = 64  # bytes, of tensors in one block
HALF_NEEDS = "(precision='float16' keeps keys and values so, which ONNX Runtime 1.32 can)"
PRECISIONS = ("float32", "float16")  # of products where the GPU has it, and of keys and values


def find_library(manifest: Manifest, choice: str | Path = "auto") -> Path:
    """Return the provider's library: the bundle's, or the installed package's. Raises TargetError for neither."""
    if str(choice) not in ("auto", "none"):
        return Path(choice)
    inside = f"lib/{platform_tag()}/{FILE_NAME}"
    if inside in manifest.files:
        return manifest.folder / inside
    if (installed := INSTALLED.with_name(FILE_NAME)).exists():
        return installed
    what = f"{manifest.folder}: holds no Vulkan library for {platform_tag()}"
    raise TargetError(f"{what}. Build it with --target android-gpu. device='cpu' works everywhere.")


@functools.cache
def load_library(path: Path) -> Any:
    """Load the provider's library into this process. Raises TargetError where it cannot be."""
    try:
        code = ctypes.CDLL(str(path))
        for name in ("missing", "device", "refused", "about"):
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


def about(path: Path) -> str:
    """Return what the GPU in use is taken for and what it uses: "adreno, workgroups of 128, subgroups of 64".

    float16 is tried, and then named, once a session asks for it.
    """
    return load_library(path).edgepeft_vulkan_about().decode()


class Counts(NamedTuple):
    """What runs took: command buffers submitted, shaders dispatched, bytes copied in and out."""

    submits: int
    dispatches: int
    copied: int

    def since(self, earlier: Counts) -> Counts:
        """Return what was counted since."""
        return Counts(*(now - then for now, then in zip(self, earlier, strict=True)))


def counts(path: Path) -> Counts:
    """Return what runs took since the process began."""
    found = (ctypes.c_uint64 * 3)()
    load_library(path).edgepeft_vulkan_counts(ctypes.byref(found))
    return Counts(*found)


class Memory:
    """Memory of the GPU that the CPU sees too."""

    def __init__(self, path: Path) -> None:
        self._code = load_library(path)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an array of zeros there, freed with the last view of it. Raises TargetError where there is no room."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        if not size:
            return np.zeros(shape, kind)
        address = self._code.edgepeft_vulkan_allocate(size)
        if not address:
            raise TargetError(f"device 'vulkan': the GPU has no {size} bytes left. device='cpu' works everywhere.")
        block = (ctypes.c_char * size).from_address(address)
        weakref.finalize(block, self._code.edgepeft_vulkan_free, address).atexit = False
        array = np.frombuffer(block, kind).reshape(shape)
        array[...] = 0
        return array

    def keep(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return OrtValues with copies of others' contents, all in one block."""
        from onnxruntime import OrtValue

        arrays = {name: value.numpy() for name, value in values.items()}
        starts, end = {}, 0
        for name, array in arrays.items():
            starts[name] = end
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        block, kept = self.zeros((end,), np.uint8), {}
        for name, array in arrays.items():
            place = block[starts[name] : starts[name] + array.nbytes].view(array.dtype).reshape(array.shape)
            place[...] = array
            kept[name] = OrtValue.ortvalue_from_numpy(place)
        return kept


def memory(session: Any) -> Memory | None:
    """Return the memory of a session of `open_session`, None for any other."""
    return getattr(session, "edgepeft_memory", None)


@functools.cache
def _devices(path: Path) -> list[Any]:
    """Return the devices of a library, which it has from its registration on: each bundle may come with its own."""
    import onnxruntime

    def known() -> list[Any]:
        return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]

    try:
        others = len(known())
        onnxruntime.register_execution_provider_library(f"edgepeft-vulkan-{others}", str(path))
        return known()[others:]
    except AttributeError:
        raise TargetError(f"ONNX Runtime {onnxruntime.__version__} takes no plugins: 1.23 or newer does.") from None
    except Exception as error:  # ORT's own exceptions share no base
        raise TargetError(f"{path}: ONNX Runtime does not take it: {error}") from None


def open_session(path: Path, model: Path | bytes, precision: str = PRECISIONS[0]) -> Any:
    """Make the session of a model with every node on the GPU. Raises TargetError where that cannot be.

    precision: of PRECISIONS. A model given as bytes holds all its weights.
    """
    import onnxruntime

    if reason := missing(path):
        raise TargetError(f"device 'vulkan': {reason}. device='cpu' works everywhere.")
    devices = _devices(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = SEVERITY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices[:1], {"precision": precision})
    if precision == "float16" and isinstance(model, Path):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
        model = rewrite.with_float16_cache(model.read_bytes())
    try:
        session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options)
    except Exception as error:  # ORT's own exceptions share no base
        newer = f" {HALF_NEEDS}" if precision == "float16" else ""
        why = load_library(path).edgepeft_vulkan_refused().decode() or f"{error}{newer}"
        raise TargetError(f"device 'vulkan': this model does not run there: {why}. device='cpu' works.") from None
    session.disable_fallback()
    session.edgepeft_memory = Memory(path)
    return session
