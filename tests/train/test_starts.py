"""Better starts: nearer to the float model or at the packed one, no packed bit changed, and shipped as trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepeft.adapt import peft_files
from edgepeft.artifact import Run, read_json
from edgepeft.backbone.load import quantized_model
from edgepeft.config import Config
from edgepeft.errors import ConfigError
from edgepeft.train import loop, starts, teacher
from edgepeft.train.data import load_splits

NewRun = Callable[..., Run]


def begun(config: Config, run: Run) -> Any:
    """Return the PEFT model before its first step."""
    packed = loop._packed_model(run.path("quantized"), load_splits(config), config)
    return loop.adapted(packed, config).eval()


def logits(model: Any, config: Config) -> np.ndarray:
    return loop.predict(model, config, load_splits(config).validation)


def test_the_decomposition_is_the_best_of_its_rank() -> None:
    chance = np.random.default_rng(0)
    w = torch.from_numpy(chance.standard_normal((48, 96)).astype(np.float32))
    b, a = starts.principal(w, 8, seed=0)
    rest = torch.linalg.svdvals(w)[8:]
    assert torch.linalg.norm(w - b @ a) == pytest.approx(torch.linalg.norm(rest).item(), rel=5e-3)
    assert torch.linalg.norm(b, dim=0).numpy() == pytest.approx(torch.linalg.norm(a, dim=1).numpy(), rel=1e-4)
    b, a = starts.principal(w[:4], 8, seed=0)
    torch.testing.assert_close(b @ a, w[:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tag", ["i4b32", "nf4b64", "i8c"])
def test_loftq_begins_nearer_to_the_float_model(new_run: NewRun, tiny_config: Config, tag: str) -> None:
    config, run = tiny_config.replace(format=tag, rank=16, alpha=5.0), new_run(tag)
    plain, near = (begun(config.replace(start=name), run) for name in ("default", "loftq"))
    exact = teacher.float_model(starts.resolve_model(config), load_splits(config).labels, config)
    weights = {name: p for name, p in exact.named_parameters() if name.endswith("weight")}
    for name, layer in starts._layers(near, config).items():
        w, packed = weights[f"{name}.weight"], layer.get_base_layer().get_weight()
        moved = packed + layer.get_delta_weight("default")
        assert torch.linalg.norm(w - moved) < 0.9 * torch.linalg.norm(w - packed), name
    for one, other in zip(plain.named_buffers(), near.named_buffers(), strict=True):
        assert torch.equal(one[1], other[1]), f"{one[0]}: a packed bit changed"
    with near.disable_adapter():
        off = logits(near, config)
    np.testing.assert_array_equal(off, logits(plain, config))
    assert not np.allclose(off, logits(near, config), atol=1e-5)


def test_pissa_begins_at_the_packed_model(new_run: NewRun, tiny_config: Config) -> None:
    config, run = tiny_config.replace(alpha=5.0), new_run()
    plain, principal = (begun(config.replace(start=name), run) for name in ("default", "pissa"))
    np.testing.assert_allclose(logits(plain, config), logits(principal, config), atol=1e-5)
    layer = next(iter(starts._layers(principal, config).values()))
    assert layer.get_delta_weight("default").abs().max() > 0.1


@pytest.mark.parametrize("start", ["loftq", "pissa"])
def test_what_is_shipped_is_what_was_trained(new_run: NewRun, tiny_config: Config, start: str) -> None:
    from peft import PeftModel

    config, run = tiny_config.replace(start=start, alpha=5.0, learning_rate=3e-3, epochs=2), new_run()
    run.make("adapter", run.key, lambda out: loop.train(config, run, out))
    folder, splits = run.path("adapter"), load_splits(config)
    report = read_json(folder / "training.json")
    packed = quantized_model(run.path("quantized"), splits.labels, config)
    loaded = PeftModel.from_pretrained(packed, str(folder))
    again = loop.evaluate(loaded, config, splits.test)
    assert again == pytest.approx(report["test"], rel=1e-3)
    settings = read_json(folder / peft_files.SETTINGS)
    assert settings["r"] == (8 if start == "pissa" else 4)
    device = peft_files.write_device(Path(run.folder) / "device", folder)
    assert device.scale(device.modules[0]) == 1.0


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_a_method_that_does_more_than_add_is_refused(tiny_config: Config, kind: str) -> None:
    import peft

    exact = teacher.float_model(starts.resolve_model(tiny_config), ("a", "b", "c"), tiny_config)
    settings: Any = {
        "dora": peft.LoraConfig(target_modules=["query"], use_dora=True),
        "ia3": peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
    }[kind]
    with pytest.raises(ConfigError, match="--start pissa: expected a method that adds"):
        starts.begin(peft.get_peft_model(exact, settings), tiny_config.replace(start="pissa"))


@pytest.mark.parametrize("method", ["share-layers", "bitfit", "experts", "houlsby"])
def test_a_start_is_for_methods_that_add_alone(tiny_config: Config, new_run, method: str) -> None:
    from edgepeft.train.loop import train

    run = new_run()
    with pytest.raises(ConfigError, match="--start pissa: expected a method that adds"):
        train(tiny_config.replace(start="pissa", method=method), run, run.path("adapter"))


def test_columns_that_a_solver_scaled_have_no_start_but_a_teacher(tiny_config: Config) -> None:
    source = starts.resolve_model(tiny_config).digest
    scaled = {"source_digest": source, "base_digest": "other", "solver": "awq"}
    teacher.check_source(tiny_config.replace(teacher="tuned"), scaled)
    with pytest.raises(ConfigError, match="found columns that --solver awq scaled"):
        teacher.check_source(tiny_config.replace(start="loftq"), scaled)


def test_every_start_is_offered() -> None:
    from edgepeft.config import _starts

    assert set(_starts()) == {"default", *starts.STARTS}
