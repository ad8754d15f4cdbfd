"""GPUs without a GPU: each driver is taken by a new process, and what is missing is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgepeft.deploy import softgpu
from edgepeft.errors import TargetError

DEVICES = """
import ctypes
vk = ctypes.CDLL("libvulkan.so.1")
info = (ctypes.c_uint64 * 8)(1)  # VkInstanceCreateInfo with nothing in it
instance, count = ctypes.c_void_p(), ctypes.c_uint32()
assert vk.vkCreateInstance(info, None, ctypes.byref(instance)) == 0
assert vk.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None) == 0
devices = (ctypes.c_void_p * count.value)()
assert vk.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices) == 0
for device in devices:
    about = ctypes.create_string_buffer(4096)
    vk.vkGetPhysicalDeviceProperties(ctypes.c_void_p(device), about)
    print(about.raw[20:276].split(bytes(1))[0].decode())
"""
CALLED = {"swiftshader": "SwiftShader", "lavapipe": "llvmpipe"}


def _set_up(name: str) -> str:
    if name not in softgpu.available():
        pytest.skip(f"no software GPU {name}: python -m edgepeft.deploy.softgpu install")
    return name


@pytest.mark.parametrize("name", softgpu.DRIVERS)
@pytest.mark.parametrize("way", ["use", "environment"])
def test_a_new_process_finds_the_driver_and_no_other(name: str, way: str) -> None:
    _set_up(name)
    if way == "use":
        code, env = f"from edgepeft.deploy import softgpu\nsoftgpu.use({name!r})\n" + DEVICES, {**os.environ}
    else:
        code, env = DEVICES, {**os.environ, **softgpu.environment(name)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [CALLED[name] in line for line in done.stdout.splitlines()] == [True]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path))
    assert softgpu.available() == []
    assert "softgpu install" in softgpu.missing()
    assert softgpu.main(["check"]) == TargetError.exit_code
    assert "softgpu install" in capsys.readouterr().err
    with pytest.raises(TargetError, match="softgpu install"):
        softgpu.use("lavapipe")
    with pytest.raises(TargetError, match="Did you mean 'lavapipe'"):
        softgpu.use("lavapip")


@pytest.mark.parametrize("words", [[], ["remove"], ["install", "x"]])
def test_other_words_print_the_usage(words: list[str], capsys) -> None:
    assert softgpu.main(words) == 2
    assert "usage" in capsys.readouterr().err
