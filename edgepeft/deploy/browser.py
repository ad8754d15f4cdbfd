"""A browser without a screen, for checking pages: Debian's chromium-headless-shell, unpacked into the cache.

    cache_dir()/browser/
      apt/        an apt state of its own
      chromium/   the browser, and SwiftShader, the GPU that it computes on the CPU for WebGPU
      lib/        the libraries it needs

Everything comes by package name through apt-get, and nothing goes into the system; setting up again costs nothing when
all is there.

    python -m edgepeft.deploy.browser install       set it up (180 MB to fetch, 400 MB in the cache)
    python -m edgepeft.deploy.browser check         say whether it is there
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from edgepeft.artifact import cache_dir
from edgepeft.deploy import debs
from edgepeft.deploy.softgpu import DEBIAN_NAMES, SYSTEM
from edgepeft.errors import TargetError

WHO = "browser"
PACKAGE = "chromium-headless-shell"
UNUSED = ("libllvm", "libgl1-mesa-dri", "libz3", "x11-utils", "xdg-utils", "fonts-", "xkb-data")
# Without a sandbox, which takes rights that containers lack: for pages of our own alone.
FLAGS = ("--headless=new", "--no-sandbox", "--no-first-run", "--disable-background-networking")
# A page is told of the driver's own limits, not of the step below them that many GPUs reach.
SOFTWARE_GPU = (
    "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--disable-dawn-features=tiered_adapter_limits",
)  # fmt: skip
NO_GPU = ("--disable-gpu", "--disable-features=WebGPU,WebGPUService")


def folder() -> Path:
    """Return where the browser lies."""
    return cache_dir() / WHO


def missing() -> str:
    """Say that no browser is set up, or return ""."""
    here = (folder() / ".complete").exists()
    return "" if here else "no browser is set up; run: python -m edgepeft.deploy.browser install"


def command(profile: Path, *flags: str) -> list[str]:
    """Return the command that starts the browser with a profile folder. Raises TargetError when it is not set up."""
    if reason := missing():
        raise TargetError(f"{WHO}: {reason}")
    return [str(folder() / "chromium" / PACKAGE), *FLAGS, f"--user-data-dir={profile}", *flags]


def environment() -> dict[str, str]:
    """Return the variables of its process: where its libraries lie."""
    return {**os.environ, "LD_LIBRARY_PATH": str(folder() / "lib")}


def install() -> None:
    """Set the browser up. Raises TargetError naming the step that failed and its output."""
    if not missing():
        return
    home, state = folder(), folder() / "apt"
    options = debs.apt_options(state, DEBIAN_NAMES[platform.machine()])
    found = debs.fetch(WHO, options, state, [PACKAGE], PACKAGE)
    wanted = [deb for deb in found if not deb.name.startswith((*SYSTEM, *UNUSED))]
    root = home / "root"
    debs.unpack(WHO, wanted, root)
    for part in ("chromium", "lib"):
        shutil.rmtree(home / part, ignore_errors=True)
    (root / "usr" / "lib" / "chromium").rename(home / "chromium")
    (home / "lib").mkdir()
    for library in (path for path in root.rglob("*.so*") if path.is_file()):
        (home / "lib" / library.name).write_bytes(library.read_bytes())
    for left in (root, state / "archives"):
        shutil.rmtree(left)
    (home / ".complete").touch()


def main(arguments: Sequence[str]) -> int:
    """Serve `python -m edgepeft.deploy.browser install|check`."""
    return debs.serve(WHO, arguments, install, missing, str)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
