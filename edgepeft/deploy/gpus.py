"""The classes of GPUs: one TOML file each says what a vendor's GPUs have, and which of our shaders are tried on them.

    targets/gpus/<name>.toml -> Gpu ──► a target's formats and limits, by which a bundle is built
                                   └──► kernels/gpu/classes.inc, by which the Vulkan provider picks on the device

A bundle for phones is one for all: the provider looks at the vendor of the GPU that it finds, takes that class's sizes
of workgroups and, of its features, those that the driver has and a trial finds right. A GPU of no class is `other`.

Facts are of the weakest device that the name covers, with the place where they were read; "some" and "most" tell how
many devices have a feature, which the provider asks the driver for. To add a class is to add a file and to write the
table anew.

    python -m edgepeft.deploy.gpus write     write kernels/gpu/classes.inc
    python -m edgepeft.deploy.gpus check     say whether it is of these files
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from edgepeft.deploy import records
from edgepeft.deploy.compile import kernel_folder
from edgepeft.deploy.shaders import FEATURES
from edgepeft.errors import TargetError, unknown

HOW_MANY = ("none", "some", "most", "all")
OTHER = "other"
BROWSER = "browser"  # which Vulkan never sees


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What is known of a class of GPUs."""

    name: str
    description: str
    vendor: int  # as Vulkan numbers it; 0: any
    subgroup_sizes: tuple[int, ...]  # the smallest and the largest
    float16_storage: str  # how many devices have it, of HOW_MANY; our shaders pack words instead and need none
    float16_arithmetic: str
    int8_dot: str  # VK_KHR_shader_integer_dot_product; no shader of ours uses it yet
    buffer_mib: int  # what a shader may bind at most
    shared_kib: int  # a workgroup's own memory
    memory: str  # where its memory is
    threads: int  # of a workgroup that sums one tile, at most
    formats: tuple[str, ...]  # of linears' weights, that shaders of ours or ONNX Runtime's read there, the best first
    features: tuple[str, ...]  # of shaders.FEATURES, that are worth a trial
    troubles: tuple[str, ...]  # that its drivers are known for


def gpu_names() -> list[str]:
    """Return the names of all classes, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


@functools.cache
def load_gpu(name: str) -> Gpu:
    """Return a class by name. Raises TargetError naming the nearest one, or all that is wrong in its file."""
    if name not in gpu_names():
        raise TargetError(unknown("class of GPUs", name, gpu_names()))
    from edgepeft.quant.formats import FORMATS

    path = _folder() / f"{name}.toml"
    table = records.read_table(path)
    if not (problems := records.problems(Gpu, table)):
        kept = ("float16_storage", "float16_arithmetic", "int8_dot")
        problems = [unknown(key, table[key], HOW_MANY) for key in kept if table[key] not in HOW_MANY]
        problems += [unknown("weight format", tag, FORMATS) for tag in table["formats"] if tag not in FORMATS]
        problems += [unknown("feature", feature, FEATURES) for feature in table["features"] if feature not in FEATURES]
    if problems:
        raise TargetError("\n".join(f"{path}: {problem}" for problem in problems))
    return Gpu(name=name, **records.values(table))


def _folder() -> Path:
    from edgepeft.deploy.targets import target_folder

    return target_folder() / "gpus"


def table() -> str:
    """Return what classes.inc has to be: X(name, vendor, threads, features), the class of all others last."""
    found = [load_gpu(name) for name in gpu_names() if name not in (OTHER, BROWSER)]
    rows = [
        f"  X({gpu.name}, {gpu.vendor:#x}, {gpu.threads}, {' | '.join(FEATURES[f] for f in gpu.features) or 0})"
        for gpu in (*found, load_gpu(OTHER))
    ]
    lines = ["// Of targets/gpus, written by python -m edgepeft.deploy.gpus write.", "#define EP_GPU_CLASSES(X) \\"]
    return "\n".join([*lines, *(f"{row} \\" for row in rows[:-1]), rows[-1]]) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Serve `python -m edgepeft.deploy.gpus write|check`."""
    place = kernel_folder() / "gpu" / "classes.inc"
    if list(arguments) == ["write"]:
        place.write_text(table())
        print(place)
    elif list(arguments) != ["check"]:
        print("usage: python -m edgepeft.deploy.gpus write|check", file=sys.stderr)
        return 2
    elif place.read_text() != table():
        print(f"{place} is of other files: python -m edgepeft.deploy.gpus write", file=sys.stderr)
        return TargetError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
