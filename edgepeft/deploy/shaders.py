"""The GPU's shaders: GLSL in kernels/gpu/shaders, and the SPIR-V that is compiled from it, kept as text beside it.

    shaders/*.comp, *.glsl ── glslc ──► SPIR-V ── spirv-val ──► shaders.inc: words, and the digest of the sources

A shader is compiled once for any GPU, and once more for each set of features of VARIANTS that a GPU may have.
The words are what builds read, so an install needs no shader compiler and every build holds the same ones. Whoever
changes a shader writes them anew; a test compares the digest.

    python -m edgepeft.deploy.shaders write       needs glslc (Debian: glslc), and spirv-val (spirv-tools) where it is
    python -m edgepeft.deploy.shaders check       say whether the words are of these sources
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgepeft.deploy.compile import kernel_folder
from edgepeft.errors import TargetError

if TYPE_CHECKING:
    import numpy as np

TARGET = "vulkan1.1"
WORDS_A_LINE = 12
# What a GPU may have beyond Vulkan 1.1's least: what device.h calls it. A shader that VARIANTS compiles for it sees its
# name in capitals, defined.
FEATURES = {"subgroups": "kSubgroups", "float16": "kFloat16", "beside": "kBeside"}
VARIANTS: dict[str, list[tuple[str, ...]]] = {name: [("subgroups",)] for name in ("attend", "linear", "low", "norm")}
VARIANTS["linear"] += [("float16",), ("float16", "subgroups")]
VARIANTS["product"] = [("float16",)]


def folder() -> Path:
    """Return the folder of the GPU's sources."""
    return kernel_folder() / "gpu"


def names() -> list[str]:
    """Return the names of the shaders, sorted: of "norm" and of its variant "norm_subgroups"."""
    plain = [path.stem for path in (folder() / "shaders").glob("*.comp")]
    return sorted([*plain, *(f"{name}_{'_'.join(some)}" for name, sets in VARIANTS.items() for some in sets)])


def digest() -> str:
    """Return the digest of the GLSL."""
    total = hashlib.sha256()
    for path in sorted((folder() / "shaders").iterdir()):
        total.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return total.hexdigest()


def words() -> dict[str, np.ndarray]:
    """Return the SPIR-V that is kept, uint32 words by shader."""
    import numpy as np

    text = (folder() / "shaders.inc").read_text()
    arrays = re.findall(r"(\w+)_words\[\] = \{([^}]*)\}", text)
    return {
        name: np.array([int(word, 0) for word in body.split(",") if word.strip()], np.uint32) for name, body in arrays
    }


def kept_digest() -> str:
    """Return the digest of the GLSL that the kept SPIR-V is of."""
    return (folder() / "shaders.inc").read_text().split("sources: ")[1].split()[0]


def compiled(name: str) -> bytes:
    """Compile one shader. Raises TargetError with the compiler's words, or without one."""
    if not (compiler := shutil.which("glslc")):
        raise TargetError("no glslc, which compiles the GPU's shaders. On Debian: apt-get install glslc spirv-tools")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / f"{name}.spv"
        stem, *features = name.split("_")
        defined = [f"-D{feature.upper()}" for feature in features]
        source = folder() / "shaders" / f"{stem}.comp"
        _run([compiler, "-O", f"--target-env={TARGET}", *defined, str(source), "-o", str(out)])
        validate(out)
        return out.read_bytes()


def validate(file: Path) -> None:
    """Let spirv-val look at a file, where there is one. Raises TargetError with what it found."""
    if validator := shutil.which("spirv-val"):
        _run([validator, "--target-env", TARGET, str(file)])


def write() -> Path:
    """Compile every shader and write shaders.inc; return it."""
    import numpy as np

    lines = [
        "// SPIR-V of shaders/*.comp, written by python -m edgepeft.deploy.shaders write.",
        f"// sources: {digest()}",
    ]
    for name in names():
        code = np.frombuffer(compiled(name), np.uint32)
        lines.append(f"const uint32_t {name}_words[] = {{")
        rows = [code[i : i + WORDS_A_LINE] for i in range(0, len(code), WORDS_A_LINE)]
        lines += ["".join(f"{word:#x}," for word in row) for row in rows]
        lines.append("};")
    lines += ["#define EP_VARIANTS(X) \\", *(f"  {row} \\" for row in _variants()), ""]
    path = folder() / "shaders.inc"
    path.write_text("\n".join(lines) + "\n")
    return path


def _variants() -> list[str]:
    """Return the rows of shaders.inc's table of variants: X(name, tag, features)."""
    return [
        f"X({name}, {'_'.join(some)}, {' | '.join(FEATURES[feature] for feature in some)})"
        for name, sets in sorted(VARIANTS.items())
        for some in sets
    ]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TargetError(f"{command[0]} failed ({done.returncode}):\n{(done.stderr or done.stdout).strip()}")


def main(arguments: Sequence[str]) -> int:
    """Serve `python -m edgepeft.deploy.shaders write|check`."""
    if list(arguments) not in (["write"], ["check"]):
        print("usage: python -m edgepeft.deploy.shaders write|check", file=sys.stderr)
        return 2
    try:
        if arguments[0] == "write":
            print(write())
        elif digest() != kept_digest():
            raise TargetError(
                f"{folder() / 'shaders.inc'} is of other sources: python -m edgepeft.deploy.shaders write"
            )
    except TargetError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
