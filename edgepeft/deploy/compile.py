"""Builds the operator library and the kernel check program, for this machine and for others, in seconds.

One list of sources and one list of flags serve every target: a file for another CPU guards itself by the compiler's
macros, functions name the instruction set they need, and the choice among them falls at run time. So one file serves
every aarch64 Linux board, from Cortex-A53 to the newest, and needs no libc: it loads under glibc, musl and bionic.

    source + headers + flags + compiler -> cache_dir()/objects/<name>-<key>.o -> library -> destination

Every file is renamed into place, never half written; what did not change is not compiled again.

Compilers, first that fits: for this machine $CXX, c++, g++, clang++, then ziglang; for another machine ziglang
(extra `edgepeft[cross]`), then Debian's cross compiler. Zig's own caches lie under cache_dir() as well.
What is left out: macOS and Windows, whose linkers take other flags.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgepeft.artifact import cache_dir
from edgepeft.errors import TargetError, unknown

LIBRARY = "libedgepeft_ops.so"
VULKAN_LIBRARY = "libedgepeft_vulkan.so"
CHECKS = ("check.cc", "check_functions.cc")  # the check program's own sources
PACKAGE = Path(__file__).resolve().parent.parent
# One product and one sum stay two roundings, so that every compiler computes what the reference says.
OPTIMISE = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fomit-frame-pointer", "-fno-math-errno", "-ffp-contract=off"]
FREE = ["-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
SHARED = ["-shared", "-nostdlib", "-s", "-Wl,-z,defs", "-Wl,-z,max-page-size=16384", "-Wl,--build-id=none"]
PLUGIN = ["-shared", "-s", "-Wl,-z,defs", "-Wl,-z,max-page-size=16384", "-Wl,--build-id=none"]
BIONIC = {  # what the Vulkan provider takes of Android's libraries, which no compiler here brings
    "libc.so": "calloc free malloc memcmp memcpy memmove memset pthread_mutex_lock pthread_mutex_unlock realloc "
    "snprintf strcmp strdup strlen strncmp vsnprintf",
    "libdl.so": "dlopen dlsym",
}


@dataclasses.dataclass(frozen=True)
class Platform:
    """How compilers call one operating system and CPU, and the oldest CPU the code may assume."""

    zig: str
    zig_program: str
    gcc: str
    baseline: tuple[str, ...]


_ARM = ("-march=armv8-a", "-mno-outline-atomics")
PLATFORMS = {
    "linux-x86_64": Platform("x86_64-linux-none", "x86_64-linux-gnu.2.31", "x86_64-linux-gnu-g++", ("-march=x86-64",)),
    "linux-aarch64": Platform("aarch64-linux-none", "aarch64-linux-gnu.2.31", "aarch64-linux-gnu-g++", _ARM),
    "android-aarch64": Platform("aarch64-linux-none", "aarch64-linux-gnu.2.31", "aarch64-linux-gnu-g++", _ARM),
}


def host_platform() -> str:
    """Return this machine's name as in PLATFORMS, for example "linux-x86_64"."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return f"{platform.system().lower()}-{machine}"


def kernel_folder() -> Path:
    """Return the folder of kernel sources: inside an installed package, or beside it in a checkout."""
    for folder in (PACKAGE / "_kernels", PACKAGE.parent / "kernels"):
        if (folder / "kernels.inc").exists():
            return folder
    raise TargetError(
        f"{PACKAGE}: no kernel sources. Expected {PACKAGE / '_kernels'} (installed) or {PACKAGE.parent / 'kernels'} "
        "(checkout). Install edgepeft again."
    )


def kernel_sources() -> list[Path]:
    """Return the C++ files of the library, sorted by name; the check program adds CHECKS."""
    return sorted(path for path in kernel_folder().glob("*.cc") if path.name not in CHECKS)


def library_key(os_arch: str) -> str:
    """Return the digest of everything the library is made of, less the compiler."""
    return _digest([*_flags(os_arch), *SHARED], kernel_folder())


def sources_digest() -> str:
    """Return the digest of the kernel sources and of the flags they are built with."""
    return _digest([*OPTIMISE, *FREE, *SHARED], kernel_folder())


def host_library() -> Path:
    """Return this machine's operator library, building it when it is missing or older than its sources.

    It lies in the package when that can be written, otherwise in the cache. Raises TargetError without a compiler.
    """
    key = library_key(_known(host_platform()))
    spare = cache_dir() / "host" / key[:24] / LIBRARY
    for place in (PACKAGE / "_lib" / LIBRARY, spare):
        if _stamp(place).exists() and place.exists() and _stamp(place).read_text() == key:
            return place
    return stamped_library(PACKAGE / "_lib" / LIBRARY if os.access(PACKAGE, os.W_OK) else spare)


def stamped_library(dest: Path) -> Path:
    """Build this machine's library at `dest`, and beside it the key by which host_library() knows it."""
    key = library_key(_known(host_platform()))
    cross_library(host_platform(), dest)
    _place(key.encode(), _stamp(dest))
    return dest


def cross_library(os_arch: str, dest: Path) -> Path:
    """Build the operator library of a platform at `dest`; one file serves every CPU of it. Returns `dest`.

    Raises TargetError when the platform is unknown, no compiler serves it, or the sources do not compile.
    """
    command = _compiler(os_arch, program=False)
    return _link([*command, *SHARED], _library_jobs(os_arch), Path(dest))


def vulkan_library(os_arch: str, dest: Path) -> Path:
    """Build the Vulkan execution provider of a platform at `dest`; return `dest`. Its shaders are compiled already."""
    command = _compiler(os_arch, program=True)
    flags = [*_flags(os_arch), "-fno-builtin-bcmp"]  # which bionic has not
    with_headers = [word for word in command if word != "-nostdlib++"]  # of C++, of which nothing is linked
    sources = sorted((kernel_folder() / "gpu").glob("*.cc"))
    jobs = [_job(with_headers, flags, source, kernel_folder()) for source in sources]
    if not os_arch.startswith("android"):
        return _link([*command, *PLUGIN], jobs, Path(dest), ["-ldl", "-lpthread", "-lm"])
    with tempfile.TemporaryDirectory() as scratch:
        stubs = [str(_stub(command, Path(scratch) / name, names.split())) for name, names in BIONIC.items()]
        return _link([*command, *PLUGIN, "-nostdlib"], jobs, Path(dest), stubs)


def _stub(command: list[str], dest: Path, names: Sequence[str]) -> Path:
    """Build a library that has a name and functions, to link with in place of the one on the device."""
    source = dest.with_suffix(".cc")
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in names))
    plain = ["-shared", "-nostdlib", "-fPIC", "-fno-builtin", "-w", f"-Wl,-soname,{dest.name}"]
    _make([*command, *plain, str(source)], dest)
    return dest


def host_vulkan_library() -> Path:
    """Return this machine's Vulkan execution provider from the cache, built when it is not there."""
    words = [*_flags(_known(host_platform())), *PLUGIN, _digest([], kernel_folder())]
    dest = cache_dir() / "host" / _digest(words, kernel_folder() / "gpu")[:24] / VULKAN_LIBRARY
    return dest if dest.exists() else vulkan_library(host_platform(), dest)


def check_program(os_arch: str, dest: Path, simde: bool = False) -> Path:
    """Build the kernel check program (CHECKS), which needs the platform's libc, as the emulator holds it.

    simde=True builds rows that this machine's CPU lacks through the SIMDe headers (Debian: libsimde-dev).
    """
    command, checks = _compiler(os_arch, program=True), [kernel_folder() / name for name in CHECKS]
    if simde:
        jobs = [_job(command, [*_flags(os_arch), "-DEP_SIMDE"], source) for source in (*kernel_sources(), *checks)]
    else:
        jobs = [*_library_jobs(os_arch), *(_job(command, _flags(os_arch), check) for check in checks)]
    return _link([*command, "-s"], jobs, Path(dest))


def plugin_library(source: Path, dest: Path, defines: Sequence[str] = ()) -> Path:
    """Build a plugin for a program of this machine (qemu), which resolves its symbols when it loads it."""
    command = _compiler(host_platform(), program=True)
    flags = ["-std=c++17", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", *defines]
    return _link([*command, "-shared"], [_job(command, flags, source)], Path(dest))


# --- compilers -----------------------------------------------------------------------------------------------------


def _known(os_arch: str) -> str:
    if os_arch not in PLATFORMS:
        raise TargetError(unknown("platform", os_arch, PLATFORMS))
    return os_arch


def _flags(os_arch: str) -> list[str]:
    """Return what every build of a platform shares."""
    return [*OPTIMISE, *FREE, *(["-D__ANDROID__"] if _known(os_arch).startswith("android") else [])]


def _compilers(os_arch: str, program: bool) -> Iterator[list[str]]:
    """Yield the commands that can build for a platform, best first; `program` means: a whole program with a libc."""
    names = PLATFORMS[_known(os_arch)]
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", names.zig_program if program else names.zig]
    zig += ["-mcpu=baseline", "-fno-sanitize=all", *(["-nostdlib++"] if program else [])]
    native = [[*shlex.split(os.environ["CXX"])]] if os.environ.get("CXX") else []
    native += [["c++"], ["g++"], ["clang++"]]
    cross = [zig] if importlib.util.find_spec("ziglang") else []
    if os_arch == host_platform():
        yield from ([*command, *names.baseline] for command in native if shutil.which(command[0]))
        yield from cross
    else:
        yield from cross
        if shutil.which(names.gcc):
            yield [names.gcc, *names.baseline]


def _compiler(os_arch: str, program: bool) -> list[str]:
    found = next(_compilers(os_arch, program), None)
    if found is None:
        raise TargetError(
            f"no C++ compiler for {os_arch}: looked for $CXX, c++, g++, clang++ (this machine only), the ziglang "
            f"package and {PLATFORMS[os_arch].gcc}. Run: pip install 'edgepeft[cross]'"
        )
    return found


@functools.cache
def _identity(command: tuple[str, ...]) -> str:
    """Return a compiler's command and version, so that another compiler makes another key."""
    probe = command[:4] if "ziglang" in command else command[:1]
    tail = ["--version"]
    answer = subprocess.run([*probe, *tail], capture_output=True, text=True, env=_environment(), check=False)
    return " ".join(command) + answer.stdout.split("\n")[0]


def _environment() -> dict[str, str]:
    """Return the environment of a compiler: zig keeps its caches under ours."""
    zig = str(cache_dir() / "zig")
    return {**os.environ, "ZIG_GLOBAL_CACHE_DIR": zig, "ZIG_LOCAL_CACHE_DIR": zig, "LC_ALL": "C"}


# --- building ------------------------------------------------------------------------------------------------------


def _digest(words: Sequence[str], folder: Path, only: Path | None = None) -> str:
    """Return the digest of some words, of every header of a folder, and of its sources or one of them."""
    digest = hashlib.sha256("\0".join(words).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".h", ".inc") or (path.suffix == ".cc" and only in (None, path)):
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _stamp(library: Path) -> Path:
    return library.with_suffix(".key")


Job = tuple[list[str], Path]  # a compiler command, and the object it makes


def _job(command: list[str], flags: list[str], source: Path, headers: Path | None = None) -> Job:
    """Return how to compile one source, and where its object lies in the cache; `headers`: more of them lie there."""
    more = [_digest([], headers, headers)] if headers else []
    key = _digest([_identity(tuple(command)), *flags, *more], source.parent, source)
    return [*command, *flags, "-c", str(source)], cache_dir() / "objects" / f"{source.stem}-{key[:24]}.o"


def _library_jobs(os_arch: str) -> list[Job]:
    command, flags = _compiler(os_arch, program=False), [*_flags(os_arch), "-DEP_FREESTANDING"]
    return [_job(command, flags, source) for source in kernel_sources()]


def _link(command: list[str], jobs: Sequence[Job], dest: Path, libraries: Sequence[str] = ()) -> Path:
    """Compile what the cache does not hold, link, and copy to `dest`; every file appears whole or not at all."""
    words = [_identity(tuple(command)), *command, *(made.name for _, made in jobs), *map(os.path.basename, libraries)]
    key = hashlib.sha256("\0".join(words).encode()).hexdigest()
    cached = cache_dir() / "objects" / f"{dest.stem}-{key[:24]}{dest.suffix}"
    if not cached.exists():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_make, *zip(*jobs, strict=True)))
        _make([*command, *(str(made) for _, made in jobs), *libraries], cached)
    _place(cached.read_bytes(), dest, executable=True)
    return dest


def _make(command: list[str], dest: Path) -> None:
    """Run one compiler command unless its file is there; a failure becomes a TargetError with the compiler's words."""
    if dest.exists():
        return
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent) as scratch:
        output = Path(scratch) / dest.name
        full = [*command, "-o", str(output)]
        result = subprocess.run(full, capture_output=True, text=True, env=_environment(), check=False)
        if result.returncode or not output.exists():
            raise TargetError(f"the compiler failed ({result.returncode}): {shlex.join(full)}\n{_said(result)}")
        os.replace(output, dest)


def _said(result: subprocess.CompletedProcess[str]) -> str:
    """Return the first errors of a compiler and the end of what it said."""
    lines = (result.stderr or result.stdout).strip().splitlines()
    first = [line for line in lines[:-12] if "error" in line][:5]
    return "\n".join([*first, *lines[-12:]])


def _place(data: bytes, dest: Path, executable: bool = False) -> None:
    """Put bytes at `dest` by renaming, so that a running program keeps the old file."""
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=dest.parent, prefix=f".{dest.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(name, 0o755 if executable else 0o644)
        os.replace(name, dest)
    except OSError as error:
        raise TargetError(f"{dest}: cannot be written ({error.strerror}). Give a folder that can be.") from None
