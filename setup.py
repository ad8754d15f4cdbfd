"""The build hook: compiles this machine's operator library into the wheel and carries kernels/ and targets/ inside.

The rest of the metadata is in pyproject.toml. A wheel is py3-none-<platform>, since it holds a native library and no
extension module. An editable install builds the library into the checkout. Without any C++ compiler the install still
succeeds, loudly: all of Python works, and the library is built at first use once there is a compiler.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
CARRIED = {"kernels": "_kernels", "targets": "_targets"}
SUFFIXES = {".cc", ".h", ".inc", ".comp", ".glsl", ".toml"}


def _files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)


def _build_library(dest: Path | None) -> Path | None:
    """Build the library at `dest` (None: in the checkout); without a compiler warn and return None."""
    sys.path.insert(0, str(ROOT))
    from edgepeft.deploy import compile as compiler
    from edgepeft.errors import EdgePeftError

    try:
        return compiler.host_library() if dest is None else compiler.stamped_library(dest)
    except EdgePeftError as error:
        rule = "!" * 100
        print(f"{rule}\nedgepeft is installed WITHOUT its operator library:\n{error}\n{rule}", file=sys.stderr)
        return None
    finally:
        sys.path.remove(str(ROOT))


class BuildPackage(build_py):
    """Adds kernels/, targets/ and the library to the package."""

    def run(self) -> None:
        """Copy the package, then what belongs into it."""
        super().run()
        if self.editable_mode:
            _build_library(None)
            return
        package = Path(self.build_lib) / "edgepeft"
        for folder, inside in CARRIED.items():
            for path in _files(folder):
                place = package / inside / path.relative_to(ROOT / folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
        shutil.rmtree(package / "_lib", ignore_errors=True)  # a checkout's own, perhaps stale
        _build_library(package / "_lib" / "libedgepeft_ops.so")


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>."""

    def finalize_options(self) -> None:
        """Say that the wheel is not pure."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """Return a tag for any Python 3 of this platform."""
        return "py3", "none", super().get_tag()[2]


class SourceArchive(sdist):
    """Carries the folders that the hook needs."""

    def add_defaults(self) -> None:
        """Add kernels/ and targets/."""
        super().add_defaults()
        self.filelist.extend(str(path.relative_to(ROOT)) for folder in CARRIED for path in _files(folder))


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": PlatformWheel, "sdist": SourceArchive})
