"""What all tests share: an offline run with its own folder for things that can be made again."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # builders.py

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # two of these share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Build the library anew where its sources changed, before a process opens it or two build it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        from edgepeft.deploy.compile import host_library
        from edgepeft.errors import TargetError

        with contextlib.suppress(TargetError):  # no compiler: tests that need one say so
            host_library()


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A small BERT folder that no test changes."""
    from builders import tiny_bert

    return tiny_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture
def model(bert, tmp_path):
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(bert, tmp_path / "model"))


@pytest.fixture(scope="module")
def gpu() -> None:
    """A software GPU in this process, for WebGPU."""
    from edgepeft.deploy import softgpu

    pytest.importorskip("onnxruntime_ep_webgpu", reason="pip install 'edgepeft[webgpu]'")
    if reason := softgpu.missing():
        pytest.skip(reason)
    softgpu.use(os.environ.get("EDGEPEFT_TEST_GPU", softgpu.available()[0]))
