"""A tiny quantized BERT and a tiny quantized decoder with their data, made once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import conversations, tiny_bert, tiny_data, tiny_decoder, write_rows

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


@pytest.fixture(scope="session")
def chat_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration that trains a tiny decoder on short conversations in seconds."""
    place = tmp_path_factory.mktemp("chats")
    model, data = tiny_decoder(place / "model"), write_rows(place / "chats.jsonl", conversations(200))
    return Config(
        model=str(model), data=str(data), task="text-generation", epochs=10, batch_size=4, rank=16, dropout=0.0,
        learning_rate=1e-2, max_length=160, threads=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def brief_config(chat_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The same for what needs no more than a few steps."""
    data = write_rows(tmp_path_factory.mktemp("brief") / "chats.jsonl", conversations(60))
    return chat_config.replace(data=str(data), epochs=1, batch_size=2)


@pytest.fixture(scope="session")
def quantized_decoder(chat_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quantized folder of that decoder."""
    from edgepeft.quant.stage import quantize

    run = Run(tmp_path_factory.mktemp("decoder"))
    run.make("quantized", "k", lambda out: quantize(chat_config, run, out))
    return run.path("quantized")


@pytest.fixture
def new_chat_run(tmp_path: Path, quantized_decoder: Path) -> Callable[..., Run]:
    """Return a function that gives a fresh run folder in which `quantize` of the decoder is done."""

    def make(name: str = "run") -> Run:
        shutil.copytree(quantized_decoder, tmp_path / name / "quantized")
        run = Run(tmp_path / name)
        run.key = "a key"
        return run

    return make
