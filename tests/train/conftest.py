"""A tiny quantized BERT and its data, made once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import tiny_bert, tiny_data

from edgepeft.artifact import Run
from edgepeft.config import Config


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration that trains a tiny BERT on tiny data in about a second."""
    place = tmp_path_factory.mktemp("tiny")
    model, data = tiny_bert(place / "model"), tiny_data(place / "data", "folder")
    return Config(
        model=str(model), data=str(data), epochs=10, batch_size=12, rank=4, alpha=8.0, learning_rate=1e-2,
        max_length=24, threads=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def quantized(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the quantized folder of a format, made once."""
    from edgepeft.quant.stage import quantize

    made: dict[str, Path] = {}

    def make(tag: str = "i4b32") -> Path:
        if tag not in made:
            run = Run(tmp_path_factory.mktemp(tag))
            run.make("quantized", "k", lambda out: quantize(tiny_config.replace(format=tag), run, out))
            made[tag] = run.path("quantized")
        return made[tag]

    return make


@pytest.fixture
def new_run(tmp_path: Path, quantized: Callable[..., Path]) -> Callable[..., Run]:
    """Return a function that gives a fresh run folder in which `quantize` is done."""

    def make(tag: str = "i4b32", name: str = "run") -> Run:
        shutil.copytree(quantized(tag), tmp_path / name / "quantized")
        run = Run(tmp_path / name)
        run.key = "a key"
        return run

    return make
