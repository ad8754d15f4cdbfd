"""Classes of GPUs: every file loads, targets name them, and the Vulkan provider's table is of them."""

from __future__ import annotations

import dataclasses

import pytest

from edgepeft.config import Config
from edgepeft.deploy import gpus, targets
from edgepeft.deploy.compile import kernel_folder
from edgepeft.errors import ConfigError, TargetError


@pytest.mark.parametrize("name", gpus.gpu_names())
def test_every_class_holds_together(name: str) -> None:
    gpu = gpus.load_gpu(name)
    smallest, largest = gpu.subgroup_sizes
    assert 4 <= smallest <= largest <= 128
    assert gpu.buffer_mib >= 128  # which Vulkan and WebGPU promise
    assert gpu.threads in (64, 128, 256)  # powers of two, of which the shaders halve sums


def test_vendors_are_told_apart() -> None:
    vendors = [gpus.load_gpu(name).vendor for name in gpus.gpu_names() if name not in (gpus.OTHER, gpus.BROWSER)]
    assert 0 not in vendors
    assert len(set(vendors)) == len(vendors)


def test_the_providers_table_is_of_these_files() -> None:
    found = (kernel_folder() / "gpu" / "classes.inc").read_text()
    assert found == gpus.table(), "python -m edgepeft.deploy.gpus write"


@pytest.mark.parametrize("name", targets.target_names())
def test_a_target_reaches_known_classes(name: str) -> None:
    target = targets.load_target(name)
    assert bool(target.gpu) == bool(target.gpu_classes)
    assert not target.gpu or target.gpu_buffer_mib == 128


def test_a_build_takes_the_best_format_that_all_gpus_of_its_target_have(monkeypatch) -> None:
    whole = gpus.load_gpu
    for name in targets.target_names():
        assert Config(target=name).format == targets.load_target(name).formats[0] == "i4b32"
    poor = {"mali": ("nf4b64", "i8c"), "adreno": ("i4b32", "i8c", "nf4b64")}

    def load_gpu(name: str) -> gpus.Gpu:
        return dataclasses.replace(whole(name), formats=poor.get(name, whole(name).formats))

    monkeypatch.setattr(gpus, "load_gpu", load_gpu)
    assert Config(target="android-gpu").format == "i8c"
    assert Config(target="web").format == "i4b32"
    with pytest.raises(ConfigError, match=r"i4b32 does not run on every GPU of --target android-gpu.*i8c, nf4b64"):
        Config(target="android-gpu", format="i4b32")


def test_an_unknown_class_names_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"unknown class of GPUs 'adrena'\. Did you mean 'adreno'"):
        gpus.load_gpu("adrena")
