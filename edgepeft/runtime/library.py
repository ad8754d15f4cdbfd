"""Finding, checking and registering the op library, and the questions put to the machine before ONNX Runtime loads.

A library for another processor or ABI, or one that was cut short, must become a sentence, not a crash: the ELF header
is read (class at byte 4, machine at 18, tables at 32) before the file is opened as code, and `edgepeft_abi()` is asked
before ONNX Runtime sees it. With no library for this machine the model runs on stock ONNX Runtime, through the
function bodies it carries.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import platform
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepeft import OP_ABI
from edgepeft.errors import TargetError
from edgepeft.runtime.manifest import Manifest

FILE_NAME = "libedgepeft_ops.so"
INSTALLED = Path(__file__).parents[1] / "_lib" / FILE_NAME
MACHINES = {62: "x86_64", 183: "aarch64", 40: "arm", 3: "x86", 243: "riscv64"}
ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclasses.dataclass(frozen=True)
class Library:
    """An op library that this process can use: `build` is its own description, `kernels` are best first."""

    path: Path
    build: str
    kernels: tuple[str, ...]


def platform_tag() -> str:
    """Return this process's "<os>-<arch>", as the folders below lib/ are named; Android is none of Linux's there."""
    machine = platform.machine().lower()
    machine = ALIASES.get(machine, machine)
    if struct.calcsize("P") == 4:
        machine = {"x86_64": "x86", "aarch64": "arm"}.get(machine, machine)
    android = sys.platform == "android" or hasattr(sys, "getandroidapilevel")  # Python before 3.13 calls it linux
    return f"{'android' if android else sys.platform}-{machine}"


def find_library(manifest: Manifest, choice: str | Path) -> Path | None:
    """Return the library to use: one the bundle lists, else the installed package's, else None ("none": always)."""
    if str(choice) == "none":
        return None
    if str(choice) != "auto":
        return Path(choice)
    tag = platform_tag()
    for name in (tag, tag.replace("android", "linux")):  # the op library needs no libc, so a board's runs on a phone
        if (inside := f"lib/{name}/{FILE_NAME}") in manifest.files:
            return manifest.folder / inside
    return INSTALLED if INSTALLED.exists() and not _is_foreign(INSTALLED) else None


def _is_foreign(path: Path) -> bool:
    """Tell whether a library is whole in its header and for another processor: a package shared with other machines."""
    with open(path, "rb") as stream:
        header = stream.read(20)
    return header.startswith(b"\x7fELF") and len(header) == 20 and not platform_tag().endswith(f"-{_machine(header)}")


def _machine(header: bytes) -> str:
    return MACHINES.get(struct.unpack_from("<H", header, 18)[0], "another processor")


def _check_elf(path: Path) -> None:
    """Raise TargetError unless the file is a whole shared library for this processor."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TargetError(f"{path}: the op library cannot be read ({error.strerror}).") from None
    if len(data) < 64 or data[:4] != b"\x7fELF":
        raise TargetError(f"{path}: not a Linux shared library, or cut short ({len(data)} bytes).")
    if not platform_tag().endswith(f"-{_machine(data)}"):
        raise TargetError(
            f"{path}: built for {_machine(data)}, this process is {platform_tag()}. Leave the library at 'auto', or "
            "take 'none' to run on stock ONNX Runtime."
        )
    if data[4] == 2 and (end := _elf_end(data)) > len(data):
        raise TargetError(f"{path}: cut short: expected {end} bytes, found {len(data)}. Copy it again.")


def _elf_end(data: bytes) -> int:
    """Return the least size of a 64-bit ELF file: opening one that lacks its end would kill the process."""
    segments, sections = struct.unpack_from("<QQ", data, 32)
    size, count, section_size, section_count = struct.unpack_from("<HHHH", data, 54)
    ends = [sections + section_size * section_count, segments + size * count]
    if ends[1] <= len(data):
        for at in range(segments, ends[1], size):
            ends.append(sum(struct.unpack_from("<Q16xQ", data, at + 8)))
    return max(ends)


def open_library(path: Path) -> Library:
    """Load an op library and ask what it is. Raises TargetError when it does not belong here."""
    path = path.absolute()  # the loader looks for a name without a folder elsewhere
    if sys.platform == "linux":
        _check_elf(path)
    try:
        code = ctypes.CDLL(str(path))
        abi = code.edgepeft_abi()
        code.edgepeft_build.restype = code.edgepeft_kernels.restype = ctypes.c_char_p
        build, kernels = code.edgepeft_build(), code.edgepeft_kernels()
    except (OSError, AttributeError) as error:
        raise TargetError(f"{path}: not an edgepeft op library that loads here: {error}.") from None
    if abi != OP_ABI:
        raise TargetError(
            f"{path}: op ABI {abi}, this edgepeft needs {OP_ABI}. Build bundle and runtime by one version."
        )
    return Library(path, build.decode(), tuple(kernels.decode().split()))


def version_tuple(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "1.20.1+cpu" is (1, 20, 1)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else (0,)


def cpu_flags() -> set[str]:
    """Return the CPU feature names that Linux lists; empty where it lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("Features", "flags")) for flag in line.partition(":")[2].split()}


def installed_onnxruntime() -> str:
    """Return the version of the installed ONNX Runtime without importing it; "" when another package provides it.

    It is read from the name of the wheel's record: importlib.metadata would cost 1.4 MB of memory.
    """
    spec = importlib.util.find_spec("onnxruntime")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    names = [path.name for folder in folders for path in Path(folder).parent.glob("onnxruntime-*.dist-info")]
    return names[0].removesuffix(".dist-info").split("-")[1] if names else ""


def check_onnxruntime(wanted: Mapping[str, Any], version: str, machine: str, flags: set[str]) -> None:
    """Raise TargetError when a version of ONNX Runtime is too old for the model or would crash on this processor.

    `wanted` is the manifest's "onnxruntime": {"minimum", "requirement": a line of requirements.txt, "broken": versions
    that die on aarch64 cores without dot-product instructions}; `flags` are the processor's, empty when not known.
    """
    need = f"Run: pip install {wanted['requirement']}"
    if version_tuple(version) < version_tuple(wanted["minimum"]):
        raise TargetError(f"ONNX Runtime {version} is too old for this bundle, which needs {wanted['minimum']}. {need}")
    if version in wanted["broken"] and machine == "aarch64" and flags and "asimddp" not in flags:
        raise TargetError(f"ONNX Runtime {version} dies with SIGILL on this processor, which has no dotprod. {need}")
