from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.export.tiny_decoder import export_decoder
from tests.export.tiny_run import export_run, make_run
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


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """Return the exported folder of a kind and format, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, tag: str) -> Path:
        if (kind, tag) not in made:
            place = tmp_path_factory.mktemp(f"{kind}-{tag}")
            run = (
                export_run(*make_run(place, format=tag)) if kind == "bert" else export_decoder(place, kind, tag).folder
            )
            made[kind, tag] = run
        return made[kind, tag]

    return make
