"""GPUs without a GPU: Vulkan drivers that compute on the CPU, for checking what WebGPU and Vulkan run.

    cache_dir()/softgpu/
      apt/            an apt state of its own
      loader/         libvulkan.so.1, used where the system has none
      swiftshader/    Google's driver, as Debian's chromium carries it: float32 alone
      lavapipe/       Mesa's driver 25 or newer, from the backports where the release is older: float16 too
      shaders/        what Mesa compiled, for the next process

Both take what a GPU takes and compute what it computes; their times mean nothing. Everything comes by package name
through apt-get; setting up again costs nothing when all is there.

    python -m edgepeft.deploy.softgpu install       set both up, and pip's onnxruntime-ep-webgpu where it is missing
    python -m edgepeft.deploy.softgpu check         say what is there
    python -m edgepeft.deploy.softgpu env [NAME]    print the variables under which a program uses it

A driver is chosen before the process meets a GPU, by `use` here or by the variables of `env` in a new process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepeft.artifact import cache_dir
from edgepeft.deploy import debs
from edgepeft.errors import TargetError, unknown

WHO = "softgpu"
LOADER = "libvulkan.so.1"
LOADER_PACKAGE = "libvulkan1"
EP_PACKAGE = "onnxruntime-ep-webgpu"
EP_RELEASE = "0.4.0"
ALLOW = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"
OLD_MESA = ("bookworm",)  # releases whose own Mesa is too old for WebGPU
SYSTEM = ("libc6_", "libgcc-s1_", "libstdc++6_")  # a process has these already
DEBIAN_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclasses.dataclass(frozen=True)
class Driver:
    """A software driver: the package it comes in, its library, and whether it has float16."""

    name: str
    package: str
    library: str
    alone: bool  # its package's other dependencies are not needed
    float16: bool


DRIVERS = {
    row.name: row
    for row in (
        Driver("swiftshader", "chromium-common", "libvk_swiftshader.so", alone=True, float16=False),
        Driver("lavapipe", "mesa-vulkan-drivers", "libvulkan_lvp.so", alone=False, float16=True),
    )
}


def folder() -> Path:
    """Return where the drivers lie."""
    return cache_dir() / WHO


def library_path(name: str) -> Path:
    """Return an installed driver's library. Raises TargetError when it is not set up."""
    if name not in DRIVERS:
        raise TargetError(unknown("software GPU", name, DRIVERS))
    found = sorted((folder() / name).rglob(DRIVERS[name].library))
    if not found or not (folder() / name / ".complete").exists():
        raise TargetError(f"no software GPU {name}: run python -m edgepeft.deploy.softgpu install")
    return found[0]


def available() -> list[str]:
    """Return the names of the drivers that are set up."""
    return [name for name in DRIVERS if (folder() / name / ".complete").exists()]


def missing() -> str:
    """Say what keeps every driver from being used, or return "" when one is set up."""
    return "" if available() else "no software GPU is set up; run: python -m edgepeft.deploy.softgpu install"


# --- using one -----------------------------------------------------------------------------------------------------


def settings(name: str) -> dict[str, str]:
    """Return the variables by which Vulkan's loader takes this driver and no other, and WebGPU takes it at all."""
    file = str(_manifest(name, library_path(name)))
    return {
        "VK_ICD_FILENAMES": file, "VK_DRIVER_FILES": file, "MESA_SHADER_CACHE_DIR": str(folder() / "shaders"),
        ALLOW: "1",
    }  # fmt: skip


def environment(name: str) -> dict[str, str]:
    """Return the variables for a new process: `settings`, and where its libraries lie."""
    files = [path for part in ("loader", name) for path in sorted((folder() / part).rglob("*.so*"))]
    before = [os.environ["LD_LIBRARY_PATH"]] if os.environ.get("LD_LIBRARY_PATH") else []
    places = dict.fromkeys(str(path.parent) for path in files)
    return {**settings(name), "LD_LIBRARY_PATH": os.pathsep.join([*before, *places])}


def use(name: str) -> None:
    """Make this process use a driver. To be called before it meets a GPU: a loader reads its variables once."""
    os.environ.update(settings(name))
    for path in _own_libraries(name):
        ctypes.CDLL(str(path))


def _manifest(name: str, library: Path) -> Path:
    """Write the file by which the loader finds a driver, when it is not there; return it."""
    file = folder() / name / "icd.json"
    text = json.dumps({"file_format_version": "1.0.0", "ICD": {"library_path": str(library), "api_version": "1.3.0"}})
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return file


def _own_libraries(name: str) -> list[Path]:
    """Return what the loader and a driver need and the system lacks, each after what it needs itself."""
    needed: list[Path] = []
    for library in [] if _loads(LOADER) else _in(folder() / "loader", LOADER):
        _collect(library, folder() / name, needed)
    _collect(library_path(name), folder() / name, needed)
    return needed[:-1]  # the driver itself is the loader's


def _collect(library: Path, place: Path, needed: list[Path]) -> None:
    """Load a library, and before it those that it says it cannot find, as far as the folder has them."""
    while reason := _loads(str(library), why=True):
        missing = re.match(r"(\S+): cannot open shared object file", str(reason))
        found = _in(place, missing[1]) if missing else []
        if not found or found[0] in needed:
            raise TargetError(f"{library}: cannot be loaded: {reason}. Remove {folder()} and install again.")
        _collect(found[0], place, needed)
    needed.append(library)


def _in(place: Path, name: str) -> list[Path]:
    return sorted(place.rglob(name))


def _loads(library: str, why: bool = False) -> object:
    """Load a library into this process; return whether that went, or with `why` what was said when it did not."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error) if why else False
    return "" if why else True


# --- setting it up -------------------------------------------------------------------------------------------------


def install(names: Sequence[str] = tuple(DRIVERS)) -> None:
    """Set drivers up, or complete them. Raises TargetError naming the step that failed and its output."""
    home = folder()
    if not _loads(LOADER):
        _unpacked(home / "loader", LOADER_PACKAGE, LOADER, alone=True)
    for name in names:
        driver = DRIVERS[name]
        _unpacked(home / name, driver.package, driver.library, driver.alone)
    if not _has_provider():
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", f"{EP_PACKAGE}=={EP_RELEASE}"]
        debs.step(WHO, pip, f"installing {EP_PACKAGE} {EP_RELEASE}")


def _has_provider() -> bool:
    from importlib.util import find_spec

    return find_spec(EP_PACKAGE.replace("-", "_")) is not None


def _unpacked(place: Path, package: str, library: str, alone: bool) -> None:
    """Fetch a package, with what it depends on unless `alone`, and unpack it; keep libraries and nothing else."""
    if (place / ".complete").exists():
        return
    state = folder() / "apt"
    old = _mesa_is_old() and not alone
    options = debs.apt_options(state, DEBIAN_NAMES[platform.machine()], backports=old)
    name = f"{package}/{debs.codename()}-backports" if old else package
    found = debs.fetch(WHO, options, state, [name], package)
    wanted = [deb for deb in found if not deb.name.startswith(SYSTEM)]
    debs.unpack(WHO, [deb for deb in wanted if not alone or deb.name.startswith(f"{package}_")], place)
    if not _in(place, library):
        raise TargetError(f"{WHO}: {package} holds no {library}. Its packages changed; report it.")
    for deb in found:
        deb.unlink()
    shutil.rmtree(place / "usr" / "share", ignore_errors=True)
    (place / ".complete").touch()


def _mesa_is_old() -> bool:
    """Tell whether this release's own Mesa is too old."""
    return debs.codename() in OLD_MESA


def main(arguments: Sequence[str]) -> int:
    """Serve `python -m edgepeft.deploy.softgpu install|check|env [NAME]`."""
    if list(arguments[:1]) != ["env"]:
        return debs.serve(WHO, arguments, install, missing, lambda: f": {', '.join(available())}")
    try:
        if reason := missing():
            raise TargetError(f"{WHO}: {reason}")
        _print(environment(arguments[1] if arguments[1:] else available()[-1]))
    except TargetError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _print(variables: Mapping[str, str]) -> None:
    for key, value in variables.items():
        print(f"export {key}={shlex.quote(value)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
