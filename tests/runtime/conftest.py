from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runtime import writer
from tests.runtime.standin import write_bundle


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no test changes."""
    return write_bundle(tmp_path_factory.mktemp("sealed") / "bundle")


@pytest.fixture
def bundle(sealed: Path, tmp_path: Path) -> Path:
    """A bundle of one's own."""
    return Path(shutil.copytree(sealed, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def sealed_writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that writes, which no test changes."""
    return writer.write_bundle(tmp_path_factory.mktemp("writer") / "bundle")


@pytest.fixture
def writer_bundle(sealed_writer: Path, tmp_path: Path) -> Path:
    """A bundle that writes, of one's own."""
    return Path(shutil.copytree(sealed_writer, tmp_path / "bundle"))
