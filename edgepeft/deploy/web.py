"""A page for browsers inside a bundle: our own page and module, and what they need of npm, so that it works offline.

    edgepeft/web/                      the page, the module edgepeft.js and its types: copied as they are
    npm packages, by name and version  ──►  cache_dir()/web/<file>  ──►  BUNDLE/web/vendor/

Packages are fetched by `npm pack`, once for all builds, and refused unless their SHA-512 is the one below. Nothing in
them is run here, and npm is not needed again when the cache has them.

    python -m edgepeft.deploy.web install       fetch them
    python -m edgepeft.deploy.web check         say whether they are there
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import edgepeft
from edgepeft.artifact import cache_dir, staging
from edgepeft.deploy import debs
from edgepeft.errors import TargetError

WHO = "web"
PAGE = Path(edgepeft.__file__).with_name("web")
VENDOR = "web/vendor"


@dataclasses.dataclass(frozen=True)
class Package:
    """An npm package: its release and SHA-512 as npm writes it, its licence, and {file in it: name in the bundle}."""

    name: str
    version: str
    integrity: str
    license: str
    files: dict[str, str]

    @property
    def place(self) -> Path:
        """The folder of its files in the cache."""
        return cache_dir() / WHO / f"{self.name.replace('/', '-').lstrip('@')}-{self.version}"


ORT_FILES = (
    "ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm",
    "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm",
)  # fmt: skip
PACKAGES = (
    Package(
        "onnxruntime-web", "1.30.0",
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        "MIT", {f"dist/{name}": name for name in ORT_FILES},
    ),
    Package(
        "@huggingface/tokenizers", "0.2.0",
        "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        "Apache-2.0", {"dist/tokenizers.min.mjs": "tokenizers.min.mjs", "LICENSE": "tokenizers.LICENSE"},
    ),
    Package(
        "@huggingface/jinja", "0.5.11",
        "sha512-YzEzwM5oQf4r0vs7ifWQ+yuVR1YkAHrjERQ+a8WRsStHHp4NRBg+NesjiFc+X2AFUpRvvrIeHDS1xFy9jY/IjQ==",
        "MIT", {"dist/index.js": "jinja.js", "LICENSE": "jinja.LICENSE"},
    ),
)  # fmt: skip


def missing() -> str:
    """Say which packages are not in the cache, or return ""."""
    absent = [f"{package.name} {package.version}" for package in PACKAGES if not package.place.is_dir()]
    return f"{', '.join(absent)} not fetched yet; run: python -m edgepeft.deploy.web install" if absent else ""


def install() -> None:
    """Fetch what is missing. Raises TargetError naming the step that failed and its output."""
    for package in PACKAGES:
        if not package.place.is_dir():
            _fetch(package)


def _fetch(package: Package) -> None:
    if shutil.which("npm") is None:
        raise TargetError(
            f"{WHO}: a page for browsers needs {package.name} {package.version}, fetched by npm, which is not there. "
            "Install Node.js, or copy the folder 'web' of another machine's edgepeft cache into "
            f"{cache_dir()}; --target android-gpu needs no page."
        )
    with tempfile.TemporaryDirectory(prefix="edgepeft-npm-") as work:
        name = f"{package.name}@{package.version}"
        debs.step(WHO, ["npm", "pack", "--silent", "--pack-destination", work, name], f"fetching {name}")
        archive = next(Path(work).glob("*.tgz"))
        digest = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != package.integrity:
            raise TargetError(f"{WHO}: {name} is not the one that is known: {digest}, expected {package.integrity}.")
        with staging(package.place) as out, tarfile.open(archive) as packed:
            for inside, outside in package.files.items():
                member = packed.extractfile(f"package/{inside}")
                assert member is not None, inside
                (out / outside).write_bytes(member.read())


def write(out: Path) -> None:
    """Put the page, the module and what they need into a bundle. Raises TargetError for what cannot be fetched."""
    install()
    shutil.copytree(PAGE, out, dirs_exist_ok=True)
    vendor = out / VENDOR
    vendor.mkdir()
    for package in PACKAGES:
        shutil.copytree(package.place, vendor, dirs_exist_ok=True)
    rows = [f"{package.name} {package.version}, from npm, {package.license}" for package in PACKAGES]
    (vendor / "NOTICE.txt").write_text("\n".join(rows) + "\n")


def main(arguments: Sequence[str]) -> int:
    """Serve `python -m edgepeft.deploy.web install|check`."""
    return debs.serve(WHO, arguments, install, missing, str)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
