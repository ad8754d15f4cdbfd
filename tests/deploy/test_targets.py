"""Target files: every one loads and fits its device; wrong names and wrong fields are named."""

import tomllib
from pathlib import Path

import pytest

from edgepeft.deploy import targets
from edgepeft.deploy.compile import PLATFORMS, host_platform
from edgepeft.deploy.emulator import CPUS
from edgepeft.errors import TargetError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

GOOD = {
    "description": "a board",
    "os": "Linux",
    "cpu": "Cortex-A53",
    "libraries": ["linux-aarch64"],
    "kernels": ["neon"],
    "memory_mib": 512,
    "python": ["3.11"],
    "onnxruntime": "1.20.1",
}
NO_DOT_PRODUCTS = {"cortex-a53", "cortex-a72"}


@pytest.mark.parametrize("name", targets.target_names())
def test_every_target_holds_together(name: str) -> None:
    target = targets.load_target(name)
    assert target.name == name
    assert target.description
    assert set(target.libraries) <= set(PLATFORMS)
    assert set(target.emulate) <= set(CPUS)
    assert target.memory_mib >= 512
    assert target.onnxruntime not in target.onnxruntime_broken
    assert target.requirements[0] == f"onnxruntime=={target.onnxruntime}"
    known = {line.split(",")[-1].strip(" )") for line in _rows() if line}
    assert set(target.kernels) <= known


def _rows() -> list[str]:
    from edgepeft.deploy.compile import kernel_folder

    return [line for line in (kernel_folder() / "kernels.inc").read_text().splitlines() if line.startswith("EP_ROW")]


@pytest.mark.parametrize("name", targets.target_names())
def test_a_target_of_cores_without_dot_products_takes_the_safe_wheel(name: str) -> None:
    target = targets.load_target(name)
    if NO_DOT_PRODUCTS & set(target.emulate):
        assert target.onnxruntime == "1.20.1"
    assert target.onnxruntime not in target.onnxruntime_broken


def test_host_is_this_machine() -> None:
    assert targets.load_target("host").os_arch == host_platform()


def test_what_a_target_pins_is_what_the_package_allows() -> None:
    from packaging.requirements import Requirement

    requires = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    allowed = [Requirement(line) for line in requires if line.startswith("onnxruntime")]
    assert allowed
    for name in targets.target_names():
        assert all(targets.load_target(name).onnxruntime in requirement.specifier for requirement in allowed)


def test_an_unknown_target_names_the_nearest_and_all() -> None:
    with pytest.raises(TargetError, match=r"unknown target 'rpi6'\. Did you mean 'rpi.*host.*zero2w"):
        targets.load_target("rpi6")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"memory_mb": 512}, "Did you mean 'memory_mib'"),
        ({"memory_mib": "512"}, "memory_mib should be a int, found '512'"),
        ({"memory_mib": True}, "memory_mib should be a int"),
        ({"python": "3.11"}, "python should be a list of str"),
        ({"python": [3.11]}, "python should be a list of str"),
        ({"libraries": ["linux-arm64"]}, "Did you mean 'linux-aarch64'"),
        ({"libraries": []}, "libraries names no platform"),
        ({"libraries": 7}, "libraries should be a list of str, found 7"),
        ({"onnxruntime": None}, "onnxruntime should be a str"),
    ],
)
def test_wrong_fields_are_named(change: dict, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        targets.parse_target("board", {**GOOD, **change}, "board.toml")


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(TargetError) as caught:
        targets.parse_target("board", {"colour": "red"}, "board.toml")
    text = str(caught.value)
    assert all(f"{field} is missing" in text for field in GOOD)
    assert "colour" in text


def test_a_good_file_is_taken() -> None:
    assert targets.parse_target("board", GOOD, "board.toml").memory_mib == 512


@pytest.mark.parametrize("name", ["web", "android-gpu"])
def test_a_target_of_gpus_says_how_they_are_reached(name: str) -> None:
    assert "webgpu" in targets.load_target(name).gpu
