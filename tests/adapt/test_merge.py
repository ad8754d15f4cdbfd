"""Merging: the figures are honest, the files are what was measured, too little stops the build."""

from pathlib import Path

import numpy as np
import pytest
from builders import LABELS, tiny_bert, tiny_data

from edgepeft.adapt import choice, peft_files
from edgepeft.adapt.merge import merge, merge_module, overall
from edgepeft.adapt.methods import PREFIX
from edgepeft.artifact import Run, read_json, read_tensors
from edgepeft.config import Config
from edgepeft.errors import ArtifactError, VerifyError
from edgepeft.quant.formats import FORMATS, Packed
from edgepeft.quant.stage import packed_tensors, quantize

RANK, ALPHA = 4, 8.0
ANY = {"min_retention": 0.0, "max_metric_drop": 1.0}
ABOUT = {"solver": "rtn", "double_quant": False}


def parts(tag, scale, n=48, k=128, seed=0):
    """One packed linear and a ΔW of `scale` times its typical value."""
    chance = np.random.default_rng(seed)
    packed = FORMATS[tag].quantize(chance.standard_normal((n, k)).astype(np.float32))
    delta = (chance.standard_normal((n, RANK)) @ chance.standard_normal((RANK, k)) / 2).astype(np.float32) * scale
    layer = {"name": "m", "kind": "linear", "format": tag, "shape": [n, k]}
    return layer, packed_tensors("m", packed), delta


def decode(layer, tensors):
    return FORMATS[layer["format"]].dequantize(
        Packed(layer["format"], *layer["shape"], tensors["m.qweight"], tensors["m.qscale"])
    )


@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0])
@pytest.mark.parametrize("tag", FORMATS)
def test_figures_are_those_of_the_bits_before_and_after(tag, scale):
    layer, before, delta = parts(tag, np.float32(scale))
    row, after = merge_module("m", delta, layer, before, ABOUT)
    moved = decode(layer, {**before, **after}) - decode(layer, before)
    norm = np.linalg.norm(delta.astype(np.float64))
    assert row["retention"] == pytest.approx(1 - np.linalg.norm((moved - delta).astype(np.float64)) / norm, abs=1e-5)
    assert row["share"] == pytest.approx(np.sum(moved.astype(np.float64) * delta) / norm**2, abs=1e-5)
    assert row["retention"] <= 1
    assert overall([row]) == pytest.approx({name: row[name] for name in ("retention", "share")})


@pytest.mark.parametrize("tag", FORMATS)
def test_a_finer_grid_and_a_larger_change_retain_more(tag):
    small, large = (
        merge_module("m", d, la, t, ABOUT)[0] for la, t, d in (parts(tag, np.float32(s)) for s in (0.02, 2))
    )
    assert small["retention"] < large["retention"]
    assert large["retention"] > 0.85
    fine = merge_module("m", *[parts("i8c", np.float32(0.3))[i] for i in (2, 0, 1)], ABOUT)[0]
    layer, tensors, delta = parts(tag, np.float32(0.3))
    assert merge_module("m", delta, layer, tensors, ABOUT)[0]["retention"] <= fine["retention"]


def test_a_change_below_the_grid_is_not_called_retained():
    layer, tensors, delta = parts("i4b32", np.float32(0.004))
    row, _ = merge_module("m", delta, layer, tensors, ABOUT)
    assert row["retention"] < 0.3


@pytest.mark.parametrize("tag", FORMATS)
def test_a_zero_adapter_changes_no_bit(tag):
    layer, before, delta = parts(tag, np.float32(0))
    row, after = merge_module("m", delta, layer, before, ABOUT)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    assert (row["retention"], row["share"]) == (1.0, 1.0)


def test_a_float_linear_takes_the_change_exactly():
    weight, delta = np.ones((4, 6), np.float32), np.full((4, 6), 0.25, np.float32)
    row, after = merge_module("m", delta, None, {"m.weight": weight}, ABOUT)
    np.testing.assert_array_equal(after["m.weight"], weight + delta)
    assert (row["format"], row["retention"]) == ("float32", 1.0)
    with pytest.raises(ArtifactError, match="no such linear"):
        merge_module("other", delta, None, {"m.weight": weight}, ABOUT)


def test_layers_weigh_by_the_size_of_their_change():
    rows = [merge_module("m", d, la, t, ABOUT)[0] for la, t, d in (parts("i4b32", np.float32(s)) for s in (0.05, 5))]
    assert rows[0]["retention"] < 0.5 < rows[1]["retention"]
    assert abs(overall(rows)["retention"] - rows[1]["retention"]) < 0.01


# --- the stage -----------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, about, strength: float, seed: int = 0) -> Path:
    """Write an adapter on every linear, and a head, under PEFT's names."""
    chance = np.random.default_rng(seed)
    tensors, modules = {}, []
    linears = [layer for layer in [*about["layers"], *about["kept"]] if layer["kind"] == "linear"]
    for layer in linears:
        (n, k), module = layer["shape"], layer["name"]
        modules.append(module)
        a_rk, b_nr = chance.standard_normal((RANK, k)) / np.sqrt(k), chance.standard_normal((n, RANK)) * strength
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a_rk.astype(np.float32)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_nr.astype(np.float32)
    tensors[f"{PREFIX}classifier.weight"] = chance.standard_normal((len(LABELS), 64)).astype(np.float32)
    tensors[f"{PREFIX}classifier.bias"] = np.zeros(len(LABELS), np.float32)
    settings = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules,
        "modules_to_save": ["classifier"], "base_model_name_or_path": "tiny",
    }  # fmt: skip
    peft_files.write(folder, settings, tensors, about["base_digest"], about["format"])
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder and a data file."""
    home = tmp_path_factory.mktemp("merge")
    return tiny_bert(home / "model"), tiny_data(home / "data")


@pytest.fixture
def made(tiny, tmp_path):
    """A function that makes a run with a packed model and an adapter: (config, run)."""

    def make(strength=0.5, **changes):
        model, data = tiny
        config = Config(model=str(model), data=str(data), adapter="merged", max_length=32, threads=1, **changes)
        run = Run(tmp_path / "run")
        run.path("quantized").mkdir(parents=True)
        quantize(config, run, run.path("quantized"))
        write_adapter(run.path("adapter"), read_json(run.path("quantized") / "quantized.json"), strength)
        run.path("merged").mkdir()
        return config, run

    return make


@pytest.mark.parametrize("changes", [{"format": tag} for tag in FORMATS] + [{"format": "nf4b64", "double_quant": True}])
def test_the_merged_folder_is_the_model_that_was_measured(made, changes):
    import torch
    from peft import PeftModel

    from edgepeft.backbone.load import quantized_model

    config, run = made(**ANY, **changes)
    summary = merge(config, run, run.path("merged"))
    report = read_json(run.path("merged") / "merge.json")
    assert len(report["layers"]) == 13
    assert summary.items() <= report.items()
    assert summary["validation"]["metric"] == "accuracy"
    merged = quantized_model(run.path("merged"), LABELS, config)
    apart = quantized_model(run.path("quantized"), LABELS, config)
    apart = PeftModel.from_pretrained(apart, str(run.path("adapter"))).eval()
    adapted = {name: m for name, m in apart.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(adapted) == 13
    for row in report["layers"]:
        module = adapted[row["name"]]
        base = module.get_base_layer()
        before = base.get_weight() if hasattr(base, "get_weight") else base.weight
        layer = merged.get_submodule(row["name"])
        after = layer.get_weight() if hasattr(layer, "get_weight") else layer.weight
        delta = module.get_delta_weight("default")
        missed = torch.linalg.norm((after - before - delta).double()) / torch.linalg.norm(delta.double())
        assert row["retention"] == pytest.approx(1 - missed.item(), abs=1e-4)


def test_a_fine_grid_and_a_strong_adapter_pass_the_default_limits(made):
    config, run = made(strength=1.0, format="i8c")
    summary = merge(config, run, run.path("merged"))
    assert summary["retention"] > 0.9
    assert summary["validation"]["drop"] <= 0.01
    stored = read_tensors(run.path("merged") / "weights.safetensors")
    assert stored.keys() == read_tensors(run.path("quantized") / "weights.safetensors").keys()
    assert read_json(run.path("merged") / "quantized.json")["merged"] is True


def test_too_little_retention_stops_with_the_figures(made, capsys):
    config, run = made(strength=0.02)
    with pytest.raises(VerifyError, match=r"merging retains -?0\.\d+ of the adapter \(share \d\.\d+\); at least 0\.5"):
        merge(config, run, run.path("merged"))
    assert "retention" in capsys.readouterr().err


def test_a_fallen_metric_stops_with_the_figures(made, monkeypatch):
    config, run = made(min_retention=0.0)
    wrong = answer_wrongly(monkeypatch, config, 1)
    with pytest.raises(VerifyError, match=rf"lowers validation accuracy from 1\.0000 to {wrong:.4f}; at most 0\.01"):
        merge(config, run, run.path("merged"))


def answer_wrongly(monkeypatch, config, count):
    """Let the separate model answer all validation texts rightly and the merged one not the first `count`."""
    from edgepeft.train import loop
    from edgepeft.train.data import load_splits

    labels = np.asarray(load_splits(config).validation.labels)
    right = np.eye(len(LABELS), dtype=np.float32)[labels]
    wrong = np.concatenate([np.roll(right[:count], 1, axis=1), right[count:]])
    found = iter([right, wrong])
    monkeypatch.setattr(loop, "predict", lambda *_: next(found))
    return 1 - count / len(labels)


def test_an_adapter_of_another_base_is_refused(made):
    config, run = made(**ANY)
    about = read_json(run.path("quantized") / "quantized.json")
    write_adapter(run.path("adapter"), {**about, "base_digest": "0" * 64}, 0.5)
    with pytest.raises(ArtifactError, match="base"):
        merge(config, run, run.path("merged"))


# --- --adapter auto -------------------------------------------------------------------------------------------------


def test_a_small_change_that_the_grid_erases_is_shipped_apart(made, capsys):
    config, run = made(strength=0.02)
    config = config.replace(adapter="auto")
    summary = merge(config, run, run.path("merged"))
    assert summary["ships"] == "separate"
    assert summary["retention"] < 0.5
    assert any("of the adapter, less than 0.9" in why for why in summary["why"])
    assert not (run.path("merged") / "weights.safetensors").exists()
    told = capsys.readouterr().err
    assert "--adapter auto: separate, as merging retains" in told
    for row in read_json(run.path("merged") / "merge.json")["layers"]:
        assert f"| {row['name']} " in told, "every layer is told"
    assert choice.decided(config, run).adapter == "separate"
    assert choice.record(config, run)["adapter_choice"]["why"] == summary["why"]


def test_what_loses_nothing_is_merged(made):
    config, run = made(strength=1.0, format="i8c")
    config = config.replace(adapter="auto")
    summary = merge(config, run, run.path("merged"))
    assert (summary["ships"], summary["why"]) == ("merged", [])
    assert (run.path("merged") / "weights.safetensors").exists()
    assert choice.decided(config, run).adapter == "merged"
    assert choice.record(config.replace(adapter="merged"), run) == {}


def test_what_no_weight_can_hold_is_shipped_apart(made, monkeypatch):
    config, run = made(**ANY)
    config = config.replace(adapter="auto")
    monkeypatch.setattr("edgepeft.adapt.merge.unmergeable", lambda effect, base: ["a part"])
    assert merge(config, run, run.path("merged"))["ships"] == "separate"
    assert choice.decided(config, run).adapter == "separate"
    assert choice.record(config, run)["adapter_choice"]["why"] == ["cannot be merged: a part"]


@pytest.mark.parametrize(("count", "ships"), [(0, "merged"), (2, "separate")])
def test_a_metric_that_falls_beyond_noise_is_a_loss(made, monkeypatch, count, ships):
    config, run = made(strength=1.0, format="i8c", max_metric_drop=1.0)
    config = config.replace(adapter="auto")
    answer_wrongly(monkeypatch, config, count)
    assert merge(config, run, run.path("merged"))["ships"] == ships


def test_noise_is_the_standard_error_of_the_paired_change():
    chance = np.random.default_rng(0)
    before, after = (np.stack([chance.random(400) < p, np.ones(400)], axis=1).astype(float) for p in (0.8, 0.7))
    apart = after[:, 0] - before[:, 0]
    assert choice.noise(before, after) == pytest.approx(apart.std(ddof=1) / 20)
    assert choice.noise(before, before) == 0.0
    drawn = [
        np.stack([n * 2 + chance.standard_normal(50) * n, n], 1) for n in [chance.integers(1, 9, 50).astype(float)] * 2
    ]
    draws = [chance.integers(0, 50, 50) for _ in range(4000)]
    changes = [(drawn[1][i] - drawn[0][i])[:, 0].sum() / drawn[0][i][:, 1].sum() for i in draws]
    assert choice.noise(*drawn) == pytest.approx(np.std(changes), rel=0.15)
