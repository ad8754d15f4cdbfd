"""The compiler stage: cross-built files are what they claim, stale ones are rebuilt, failures are said."""

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from edgepeft.deploy import compile as compiler
from edgepeft.errors import TargetError

AARCH64, X86_64 = 183, 62
TINY = 'extern "C" __attribute__((visibility("default"))) int edgepeft_abi() { return ANSWER; }\n'
# For tiny sources a cross compiler's work is a second or two; the real library is built once, in the shared cache.


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of its own with a kernel folder of one small file, a cache of its own, and this machine's compiler."""
    kernels = tmp_path / "checkout" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "kernels.inc").write_text("")
    (kernels / "one.h").write_text("#define ANSWER 1\n")
    (kernels / "one.cc").write_text('#include "one.h"\n' + TINY)
    (tmp_path / "checkout" / "edgepeft").mkdir()
    monkeypatch.setattr(compiler, "PACKAGE", tmp_path / "checkout" / "edgepeft")
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path / "cache"))
    return kernels


def elf_machine(path: Path) -> int:
    data = path.read_bytes()
    assert data[:5] == b"\x7fELF\x02"
    return struct.unpack_from("<H", data, 18)[0]


def elf_facts(path: Path) -> tuple[list[int], set[int]]:
    """Return the alignments of the loaded segments in bytes, and the tags of the dynamic section."""
    data = path.read_bytes()
    offset, (size, count) = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<HH", data, 54)
    alignments, tags = [], set()
    for number in range(count):
        kind, _, at, _, _, length, _, align = struct.unpack_from("<IIQQQQQQ", data, offset + number * size)
        if kind == 1:
            alignments.append(align)
        if kind == 2:
            tags |= {struct.unpack_from("<q", data, at + i)[0] for i in range(0, length, 16)}
    return alignments, tags


@pytest.mark.parametrize(
    ("os_arch", "machine"), [("linux-aarch64", AARCH64), ("android-aarch64", AARCH64), ("linux-x86_64", X86_64)]
)
def test_a_library_needs_nothing_and_fits_every_page_size(tiny: Path, os_arch: str, machine: int) -> None:
    made = compiler.cross_library(os_arch, tiny.parent / "out" / compiler.LIBRARY)
    alignments, tags = elf_facts(made)
    assert elf_machine(made) == machine
    assert 1 not in tags, "it has a NEEDED entry"
    assert min(alignments) >= 16384


def test_the_whole_library_for_arm_boards_is_one_file_that_needs_nothing(tmp_path: Path) -> None:
    made = compiler.cross_library("linux-aarch64", tmp_path / compiler.LIBRARY)
    alignments, tags = elf_facts(made)
    assert elf_machine(made) == AARCH64
    assert 1 not in tags
    assert min(alignments) >= 16384
    assert made.stat().st_size < 1_000_000
    names = made.read_bytes()
    assert all(f"{kernel}\0".encode() in names for kernel in ("i4b32_int8_neon", "i4b32_int8_dotprod", "i8c_int8_i8mm"))


def test_the_vulkan_provider_for_phones_takes_bionics_libraries_and_no_others(tmp_path: Path) -> None:
    made = compiler.vulkan_library("android-aarch64", tmp_path / compiler.VULKAN_LIBRARY)
    alignments, _ = elf_facts(made)
    assert elf_machine(made) == AARCH64
    assert min(alignments) >= 16384
    data = made.read_bytes()
    assert all(f"{name}\0".encode() in data for name in compiler.BIONIC)
    assert not any(name in data for name in (b"GLIBC", b"libc.so.6", b"libstdc++", b"libc++"))


def test_the_host_library_is_kept_until_a_source_changes(tiny: Path) -> None:
    first = compiler.host_library()
    assert first == tiny.parent / "edgepeft" / "_lib" / compiler.LIBRARY
    assert ctypes.CDLL(str(first)).edgepeft_abi() == 1
    stamp = first.stat().st_mtime_ns
    assert compiler.host_library().stat().st_mtime_ns == stamp
    (tiny / "one.h").write_text("#define ANSWER 2\n")
    again = compiler.host_library()
    assert again.stat().st_mtime_ns != stamp
    assert _answer(again) == 2


def _answer(library: Path) -> int:
    """Ask in another process: this one may hold an older file of that name."""
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).edgepeft_abi())"
    return int(subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True, check=True).stdout)


def test_a_removed_library_comes_back_from_the_cache_without_a_compiler(tiny: Path, monkeypatch) -> None:
    made = compiler.host_library()
    made.unlink()
    monkeypatch.setattr(compiler, "_make", lambda command, dest: pytest.fail(f"compiled again: {command}"))
    assert compiler.host_library().exists()


def test_a_package_that_cannot_be_written_uses_the_cache(tiny: Path, monkeypatch) -> None:
    monkeypatch.setattr(compiler.os, "access", lambda path, mode: False)
    made = compiler.host_library()
    assert str(made).startswith(os.environ["EDGEPEFT_CACHE"])
    assert compiler.host_library() == made


@pytest.mark.parametrize(
    "fault", ["int broken( {", '#include "nowhere.h"', "extern int gone; int f() { return gone; }"]
)
def test_a_source_that_does_not_build_is_an_error_that_shows_why(tiny: Path, fault: str) -> None:
    (tiny / "two.cc").write_text(fault + "\n")
    dest = tiny.parent / "out" / compiler.LIBRARY
    with pytest.raises(TargetError, match=r"(?s)the compiler failed.*(two\.cc|gone)"):
        compiler.cross_library(compiler.host_platform(), dest)
    assert not dest.exists()
    assert not list(dest.parent.glob("*"))


def test_no_compiler_at_all_says_what_to_install(tiny: Path, monkeypatch) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(TargetError, match=r"pip install 'edgepeft\[cross\]'"):
        compiler.host_library()


def test_ziglang_serves_a_host_without_a_compiler(tiny: Path, monkeypatch) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert _answer(compiler.host_library()) == 1


def test_an_unknown_platform_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="Did you mean 'linux-aarch64'"):
        compiler.cross_library("linux-arm64", tmp_path / "x.so")


def test_cxx_is_taken_first(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    own = tmp_path / "own-c++"
    own.touch(0o755)
    monkeypatch.setenv("CXX", f"{own} -DEXTRA")
    assert compiler._compiler(compiler.host_platform(), program=False)[:2] == [str(own), "-DEXTRA"]


def test_a_place_that_cannot_be_written_is_an_error(tiny: Path) -> None:
    blocker = tiny.parent / "file"
    blocker.write_text("")
    with pytest.raises(TargetError, match="cannot be written"):
        compiler.cross_library(compiler.host_platform(), blocker / "x.so")
