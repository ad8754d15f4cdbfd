"""The targets: one TOML file each says what a device has and which wheels are safe on it.

    targets/<name>.toml -> Target

Everything that depends on the device reads this record: which operator libraries a bundle carries, the pins in its
requirements.txt, on which emulated CPUs it is verified, and with how many threads it runs. To add a device is to add a
file. Values are facts about the weakest device that the name covers. This module loads nothing heavy.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from pathlib import Path
from typing import Any

from edgepeft.deploy.compile import PACKAGE, PLATFORMS, host_platform
from edgepeft.errors import TargetError, unknown

# The runtime's other wheels; their aarch64 builds run on every ARMv8-A core.
NUMPY = "numpy>=1.26,<3"
TOKENIZERS = "tokenizers>=0.20"


@dataclasses.dataclass(frozen=True)
class Target:
    """What a bundle must know of the device it is for."""

    name: str
    description: str
    os: str
    cpu: str
    libraries: tuple[str, ...]  # operator libraries of the bundle, the device's own first
    kernels: tuple[str, ...]  # instruction sets its CPUs may have, best first; the rows are named after them
    memory_mib: int
    python: tuple[str, ...]
    onnxruntime: str  # the exact release that is known to be safe
    onnxruntime_broken: tuple[str, ...] = ()  # releases that are known to die on it
    emulate: tuple[str, ...] = ()  # qemu CPUs to verify on
    threads: int = 0  # 0: all
    gpu: tuple[str, ...] = ()  # how its GPU is reached, of edgepeft.runtime.session.GPUS
    gpu_buffer_mib: int = 128  # what a shader may bind at most: WebGPU and Vulkan promise this much
    page: bool = False  # a page for browsers goes into its bundle
    gpu_native: bool = False  # WebGPU by ONNX Runtime itself, which has operators that browsers were not seen to have
    ssh: str = ""  # a usual host name, for hints

    @property
    def os_arch(self) -> str:
        """The device's platform, for example "linux-aarch64"."""
        return self.libraries[0]

    @property
    def requirements(self) -> tuple[str, ...]:
        """The lines of requirements.txt: all that the device runtime imports."""
        return (f"onnxruntime=={self.onnxruntime}", NUMPY, TOKENIZERS)


def target_folder() -> Path:
    """Return the folder of target files: inside an installed package, or beside it in a checkout."""
    for folder in (PACKAGE / "_targets", PACKAGE.parent / "targets"):
        if (folder / "host.toml").exists():
            return folder
    raise TargetError(f"{PACKAGE}: no target files beside the package. Install edgepeft again.")


def target_names() -> list[str]:
    """Return the names of all targets, sorted."""
    return sorted(path.stem for path in target_folder().glob("*.toml"))


@functools.cache
def load_target(name: str) -> Target:
    """Return a target by name. Raises TargetError naming the nearest one, or the fields of its file that are wrong."""
    if name not in target_names():
        raise TargetError(unknown("target", name, target_names()))
    path = target_folder() / f"{name}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: not valid TOML: {error}.") from None
    return parse_target(name, table, str(path))


def parse_target(name: str, table: dict[str, Any], where: str) -> Target:
    """Make a Target of a parsed file. Raises TargetError with every wrong, strange or missing field at once."""
    fields = {f.name: f for f in dataclasses.fields(Target) if f.name != "name"}
    problems = [unknown("field", key, fields) for key in table if key not in fields]
    for key, field in fields.items():
        if key in table:
            problems += _wrong(key, table[key], str(field.type))
        elif field.default is dataclasses.MISSING:
            problems.append(f"{key} is missing.")
    named = table.get("libraries", ["host"])
    libraries = [host_platform() if entry == "host" else entry for entry in (named if isinstance(named, list) else [])]
    problems += [unknown("platform", entry, PLATFORMS) for entry in libraries if entry not in PLATFORMS]
    if not libraries:
        problems.append("libraries names no platform.")
    if problems:
        raise TargetError("\n".join(f"{where}: {problem}" for problem in problems))
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    return Target(**{**values, "name": name, "libraries": tuple(libraries)})


def _wrong(key: str, value: Any, annotation: str) -> list[str]:
    """Say what is wrong with the type of one field's value."""
    if annotation.startswith("tuple"):
        fits, wanted = type(value) is list and all(type(item) is str for item in value), "list of str"
    else:
        fits, wanted = type(value).__name__ == annotation, annotation
    return [] if fits else [f"{key} should be a {wanted}, found {value!r}."]
