from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgepeft import OP_ABI
from edgepeft.errors import TargetError
from edgepeft.runtime import library as lib
from edgepeft.runtime import load, vulkan

WANTED = {"minimum": "1.20.1", "requirement": "onnxruntime==1.20.1", "broken": ["1.21.0"]}
LIBRARIES = (lib.FILE_NAME, vulkan.FILE_NAME)
SOURCE = """
__attribute__((visibility("default"))) int edgepeft_abi(void) { return ABI; }
__attribute__((visibility("default"))) const char* edgepeft_build(void) { return "test build"; }
__attribute__((visibility("default"))) const char* edgepeft_kernels(void) { return "fast slow"; }
"""


def build(folder: Path, abi: int) -> Path:
    compiler = [sys.executable, "-m", "ziglang", "cc"]
    (folder / "lib.c").write_text(SOURCE)
    path = folder / "lib.so"
    subprocess.run([*compiler, "-shared", "-fPIC", f"-DABI={abi}", "-o", path, folder / "lib.c"], check=True)
    return path


def test_a_library_says_what_it_is_by_a_name_alone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path, OP_ABI)
    monkeypatch.chdir(tmp_path)
    for given in (path, Path(path.name)):
        found = lib.open_library(given)
        assert (found.path, found.build, found.kernels) == (path, "test build", ("fast", "slow"))


def test_another_abi_is_refused(sealed: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=f"op ABI 7, this edgepeft needs {OP_ABI}"):
        load(sealed, library=build(tmp_path, 7))


def test_another_processor_is_read_from_the_header(sealed: Path, tmp_path: Path) -> None:
    data = bytearray(b"\x7fELF" + bytes(60))
    data[18] = 243
    (tmp_path / "lib.so").write_bytes(data)
    with pytest.raises(TargetError, match="built for riscv64, this process is linux-"):
        load(sealed, library=tmp_path / "lib.so")


@pytest.mark.parametrize(("data", "message"), [(b"MZ", "not a Linux shared library"), (None, "cannot be read")])
def test_no_library_at_all(sealed: Path, tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "lib.so"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(TargetError, match=message):
        load(sealed, library=path)


def test_a_library_cut_anywhere_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    path = build(tmp_path, OP_ABI)
    whole = path.read_bytes()
    lib._check_elf(path)
    for length in (*range(0, len(whole), 997), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TargetError, match="cut short"):
            lib.open_library(path)


def test_a_library_of_something_else_is_refused(tmp_path: Path) -> None:
    import _ctypes

    with pytest.raises(TargetError, match="not an edgepeft op library"):
        lib.open_library(Path(_ctypes.__file__))


def test_only_listed_libraries_are_taken(bundle: Path) -> None:
    place = bundle / "lib" / lib.platform_tag() / lib.FILE_NAME
    place.parent.mkdir(parents=True)
    place.write_bytes(b"not listed, so never opened")
    assert load(bundle, library="none").library is None
    found = lib.find_library(load(bundle, library="none").manifest, "auto")
    assert found != place


def test_a_phone_takes_its_own_libraries_and_a_boards_op_library_where_there_is_none(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "getandroidapilevel", lambda: 29, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    names = {tag: f"lib/{tag}-aarch64/" for tag in ("android", "linux")}
    both = SimpleNamespace(folder=tmp_path, files=[at + name for at in names.values() for name in LIBRARIES])
    board = SimpleNamespace(folder=tmp_path, files=[names["linux"] + name for name in LIBRARIES])
    assert lib.find_library(both, "auto") == tmp_path / names["android"] / lib.FILE_NAME
    assert lib.find_library(board, "auto") == tmp_path / names["linux"] / lib.FILE_NAME
    assert vulkan.find_library(both) == tmp_path / names["android"] / vulkan.FILE_NAME
    with pytest.raises(TargetError, match="holds no Vulkan library for android-aarch64"):
        vulkan.find_library(board)  # it is glibc's


@pytest.mark.parametrize(
    ("version", "machine", "flags", "message"),
    [
        ("1.19.2", "x86_64", set(), "1.19.2 is too old .* pip install onnxruntime==1.20.1"),
        ("1.9", "aarch64", {"asimddp"}, "too old"),
        ("1.21.0", "aarch64", {"asimd"}, "SIGILL"),
        ("1.21.0", "aarch64", {"asimd", "asimddp"}, None),
        ("1.21.0", "x86_64", {"avx2"}, None),
        ("1.21.0", "aarch64", set(), None),
        ("1.20.1", "aarch64", {"asimd"}, None),
        ("1.32.0+dev1", "x86_64", set(), None),
    ],
)
def test_the_installed_onnxruntime_is_judged(version: str, machine: str, flags: set, message: str | None) -> None:
    if message is None:
        lib.check_onnxruntime(WANTED, version, machine, flags)
    else:
        with pytest.raises(TargetError, match=message):
            lib.check_onnxruntime(WANTED, version, machine, flags)


def test_an_old_onnxruntime_is_refused_at_load(bundle: Path) -> None:
    from tests.runtime.standin import reseal

    reseal(bundle, onnxruntime={**WANTED, "minimum": "99.0"})
    with pytest.raises(TargetError, match=r"needs 99.0"):
        load(bundle)


def test_cpu_flags_are_read() -> None:
    assert lib.cpu_flags()


def test_the_installed_version_is_found_without_importing_it() -> None:
    import onnxruntime

    assert lib.installed_onnxruntime() == onnxruntime.__version__
