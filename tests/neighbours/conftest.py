"""One bundle of a tiny BERT, exported from a random adapter, that other people's programs then open."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest

from edgepeft.artifact import Run, read_json, write_json
from edgepeft.config import Config


class Made(NamedTuple):
    config: Config
    run: Run
    bundle: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Do not write into it."""
    from edgepeft.deploy.bundle import bundle
    from tests.export.tiny_run import export_run, make_run

    config, run = make_run(tmp_path_factory.mktemp("neighbours"))
    training = run.path("adapter") / "training.json"
    write_json(training, {**read_json(training), "config": dataclasses.asdict(config)})
    export_run(config, run)
    run.path("verify").mkdir()
    write_json(run.path("verify") / "report.json", {})
    run.make("bundle", "", lambda out: bundle(config, run, out))
    return Made(config, run, run.path("bundle"))
