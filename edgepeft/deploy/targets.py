"""The targets: one TOML file each says what a device has and which wheels are safe on it.

    targets/<name>.toml -> Target

Everything that depends on the device reads this record: which operator libraries a bundle carries, the pins in its
requirements.txt, on which emulated CPUs it is verified, and with how many threads it runs. To add a device is to add a
file. Values are facts about the weakest device that the name covers. This module loads nothing heavy.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from edgepeft.deploy import gpus, records
from edgepeft.deploy.compile import PACKAGE, PLATFORMS, host_platform
from edgepeft.errors import TargetError, unknown

BEST_ON_CPUS = "i4b32"  # of all formats, for each of which the op has kernels
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
    gpu_classes: tuple[str, ...] = ()  # those that its GPU may be of: edgepeft.deploy.gpus
    page: bool = False  # a page for browsers goes into its bundle
    ssh: str = ""  # a usual host name, for hints

    @property
    def os_arch(self) -> str:
        """The device's platform, for example "linux-aarch64"."""
        return self.libraries[0]

    @property
    def gpu_buffer_mib(self) -> int:
        """What a shader may bind at most on any of its GPUs."""
        return min(gpus.load_gpu(name).buffer_mib for name in self.gpu_classes)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of linears' weights that run on it, the best first: that all of its GPUs have."""
        from edgepeft.quant.formats import FORMATS

        if not self.gpu_classes:
            return (BEST_ON_CPUS, *(tag for tag in FORMATS if tag != BEST_ON_CPUS))
        first, *others = (gpus.load_gpu(name).formats for name in self.gpu_classes)
        return tuple(tag for tag in first if all(tag in formats for formats in others))

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
    return parse_target(name, records.read_table(path), str(path))


def parse_target(name: str, table: dict[str, Any], where: str) -> Target:
    """Make a Target of a parsed file. Raises TargetError with every wrong, strange or missing field at once."""
    problems = records.problems(Target, table)
    named = table.get("libraries", ["host"])
    libraries = [host_platform() if entry == "host" else entry for entry in (named if isinstance(named, list) else [])]
    problems += [unknown("platform", entry, PLATFORMS) for entry in libraries if entry not in PLATFORMS]
    if not libraries:
        problems.append("libraries names no platform.")
    if table.get("gpu") and not table.get("gpu_classes"):
        problems.append("gpu_classes names none, but gpu says how they are reached.")
    if problems:
        raise TargetError("\n".join(f"{where}: {problem}" for problem in problems))
    return Target(**{**records.values(table), "name": name, "libraries": tuple(libraries)})
