"""The training bench: what it counts, when it fails, and that every variant trains."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepeft.bench import training
from edgepeft.config import Config


def result(variant: str, seed: int, accuracy: float) -> dict[str, Any]:
    figures = {"samples_per_second": 50.0, "step_ms": 640.0, "step_cpu_ms": 600.0, "seconds": 90.0}
    memory = {"peak_bytes": 900 << 20, "libraries_bytes": 500 << 20}
    return {"variant": variant, "seed": seed, "test": {"accuracy": accuracy, "macro_f1": 0.5}, **figures, **memory}


def test_a_row_holds_means_over_seeds_and_points_to_the_reference() -> None:
    results = [
        result("float32", 0, 0.90),
        result("float32", 1, 0.92),
        result("i4b32", 0, 0.89),
        result("i4b32", 1, 0.91),
    ]
    reference, ours = training.summary(results)
    assert (reference["test accuracy %"], reference["points to float32"]) == (91.0, 0.0)
    assert (ours["test accuracy %"], ours["points to float32"], ours["spread"]) == (90.0, -1.0, 2.0)
    assert (ours["peak MiB"], ours["model MiB"]) == (900, 400)


@pytest.mark.parametrize(("accuracy", "failed"), [(0.9, []), (0.89, []), (0.8899, ["i4b32"])])
def test_more_than_a_point_below_fails(accuracy: float, failed: list[str]) -> None:
    rows = training.summary([result("float32", 0, 0.9), result("i4b32", 0, accuracy), result("bnb-nf4", 0, 0.1)])
    assert training.failures(rows) == failed


def test_settings_are_typed_as_the_fields_are() -> None:
    given = ["epochs=3", "learning_rate=1e-3", "data=home-assistant", "start=pissa", "packing=false"]
    config = training._config(argparse.Namespace(set=given, seeds=[7]), "nf4b64")
    assert (config.start, config.packing) == ("pissa", False)
    assert (config.epochs, config.learning_rate, config.seed, config.format) == (3, 1e-3, 7, "nf4b64")


@pytest.mark.parametrize("variant", training.VARIANTS)
def test_every_variant_trains(
    quantized: Callable[..., Path], tiny_config: Config, tmp_path: Path, variant: str
) -> None:
    folder = quantized(variant if variant in training.FORMATS else "i4b32").parent
    found = training.train_one(tiny_config.replace(epochs=1), variant, folder)
    assert found["variant"] == variant
    assert found["peak_bytes"] > 0
    assert 0 <= found["test"]["accuracy"] <= 1


def test_a_variant_may_begin_elsewhere(quantized: Callable[..., Path], tiny_config: Config) -> None:
    config, folder = tiny_config.replace(epochs=1, learning_rate=1e-9), quantized("i4b32").parent
    begun = {start: training.train_one(config.replace(start=start), "i4b32", folder) for start in ("default", "pissa")}
    own, pissa = (found["test"]["loss"] for found in begun.values())
    assert pissa == pytest.approx(own, rel=1e-3), "nothing learned, so both are the packed model"
    learned = config.replace(learning_rate=tiny_config.learning_rate)
    begun = {start: training.train_one(learned.replace(start=start), "i4b32", folder) for start in ("default", "pissa")}
    own, pissa = (found["test"]["loss"] for found in begun.values())
    assert pissa != pytest.approx(own, rel=1e-3)
