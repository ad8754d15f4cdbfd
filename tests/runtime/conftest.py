from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runtime.standin import write_bundle


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no test changes."""
    return write_bundle(tmp_path_factory.mktemp("sealed") / "bundle")


@pytest.fixture
def bundle(sealed: Path, tmp_path: Path) -> Path:
    """A bundle of one's own."""
    return Path(shutil.copytree(sealed, tmp_path / "bundle"))
