"""Solvers: none errs more than rounding where it should err less, folding is exact, and all end in the same formats."""

import re

import numpy as np
import pytest
import torch
from builders import DECODERS, conversations, tiny_bert, tiny_data, tiny_decoder, write_rows

from edgepeft.artifact import Run, read_json
from edgepeft.backbone.check import check_model
from edgepeft.backbone.load import open_folder, quantized_model
from edgepeft.config import Config
from edgepeft.errors import ConfigError, DataError
from edgepeft.pipeline import build, stage_named
from edgepeft.quant import gptq
from edgepeft.quant.formats import FORMATS
from edgepeft.quant.grid import Grid
from edgepeft.quant.solvers import SOLVERS
from edgepeft.quant.stage import quantize
from edgepeft.quant.statistics import Statistics

CALIBRATED = [tag for tag, row in SOLVERS.items() if row.calibrated]


def correlated(k, tokens=600, seed=0):
    """Inputs with a few heavy directions, as hidden states have them."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=draw) / k**0.5 + torch.eye(k)
    return torch.randn(tokens, k, generator=draw) @ mix * torch.linspace(0.2, 3, k)


def seen_of(x, other=None):
    seen = Statistics(x.shape[1])
    seen.add(x, x if other is None else other)
    return seen


def missed(w, decoded, x):
    return float(((torch.from_numpy(w - decoded)) @ x.T).norm() / (torch.from_numpy(w) @ x.T).norm())


@pytest.mark.parametrize("tag", FORMATS)
def test_gptq_keeps_outputs_better_than_rounding(tag):
    fmt, k = FORMATS[tag], 256
    w = np.random.default_rng(0).standard_normal((48, k)).astype(np.float32)
    x = correlated(k)
    seen = seen_of(x)
    plain, solved = fmt.quantize(w), SOLVERS["gptq"].solve(fmt, w, False, seen)
    errors = [missed(w, fmt.dequantize(packed), x) for packed in (plain, solved)]
    assert errors[1] < (0.95 if tag == "i8c" else 0.75) * errors[0]
    assert seen.output_error(w, fmt.dequantize(plain)) == pytest.approx(errors[0], rel=1e-3)
    assert solved.w.shape == plain.w.shape
    assert solved.scale.dtype == plain.scale.dtype


def test_each_step_lowers_the_objective():
    fmt, k = FORMATS["i4b32"], 128
    w, grid = torch.randn(32, k, generator=torch.Generator().manual_seed(1)), Grid(fmt, k)
    h = gptq.damped(seen_of(correlated(k)).hessian)
    scale = grid.search(w, h.diagonal())

    def objective(codes, scales):
        d = w - grid.decode(codes, scales)
        return float(((d @ h) * d).sum())

    rounded, spread = grid.round(w, scale), gptq._spread(grid, w, scale, h)
    better = gptq._best_scales(grid, w, spread, scale, h)
    codes = gptq._best_codes(grid, w, spread, better, h)
    found = [objective(rounded, scale), objective(spread, scale), objective(spread, better), objective(codes, better)]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


def test_the_target_makes_up_for_what_came_before():
    fmt, k = FORMATS["i4b32"], 64
    w = np.random.default_rng(0).standard_normal((32, k)).astype(np.float32)
    plain = correlated(k, 2000)
    late = plain + 0.2 * plain.roll(1, 1)  # what quantized predecessors made of it
    told, untold = Statistics(k), Statistics(k)
    told.add(late, plain)
    untold.add(late, late)
    wanted = torch.from_numpy(w) @ plain.T
    errors = []
    for seen in (told, untold):
        decoded = torch.from_numpy(fmt.dequantize(SOLVERS["gptq"].solve(fmt, w, False, seen)))
        errors.append(float((decoded @ late.T - wanted).norm()))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("tag", FORMATS)
def test_hqq_loses_to_nothing_in_its_own_norm_and_ignores_outliers(tag):
    fmt = FORMATS[tag]
    w = np.random.default_rng(0).standard_t(3, (32, 256)).astype(np.float32)

    def norm(packed):
        unit = np.abs(w).reshape(32, fmt.blocks(256), -1).max(2, keepdims=True)
        difference = (w - fmt.dequantize(packed)).reshape(32, fmt.blocks(256), -1) / unit
        return float((np.abs(difference) ** 0.7).sum())

    assert norm(SOLVERS["hqq"].round(fmt, w)) < norm(fmt.quantize(w))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tag", FORMATS)
def test_a_merge_of_nothing_changes_no_bit(tag, solver):
    fmt, k = FORMATS[tag], 128
    w = np.random.default_rng(0).standard_normal((32, k)).astype(np.float32)
    row = SOLVERS[solver]
    first = row.solve(fmt, w, False, seen_of(correlated(k)))
    again = row.round(fmt, fmt.dequantize(first), False, fmt.unpack(first)[1])
    np.testing.assert_array_equal(fmt.dequantize(again), fmt.dequantize(first))


# --- whole models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("chats") / "chats.jsonl", conversations(60))


def quantized(config, out):
    out.mkdir(exist_ok=True)
    summary = quantize(config, Run(out / "run"), out)
    return summary, read_json(out / "quantized.json")


def logits(model):
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", DECODERS)
def test_folded_scales_leave_the_model_as_it_was(chats, tmp_path, kind, monkeypatch):
    """With rounding switched off, a scaled model answers as the float one does."""
    import transformers

    from edgepeft.backbone.checkpoint import backbone_names
    from edgepeft.quant import awq
    from edgepeft.quant.stage import Work
    from edgepeft.quant.walk import Tensors, Walk

    folder = tiny_decoder(tmp_path / "model", kind, intermediate_size=128)
    monkeypatch.setattr(awq, "EXPONENTS", [0.7])
    source = open_folder(folder)
    family = check_model(source)
    config = Config(model=str(folder), task="text-generation", data=str(chats), solver="awq")
    kept = {}

    class Kept(Work):
        def add(self, name, kind, array, seen=None):
            kept[name] = array

    kinds = family.tensors(source.settings)
    work = Kept(config, family, family.tied(source.settings))
    tensors = Tensors(source, backbone_names(source, family), {})
    Walk(source, work, tensors, kinds, [list(range(3, 30)), list(range(5, 20))]).quantize()
    assert len(work.scaled) == 2 * 4
    before = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    expected = logits(before)
    changed = {name: torch.from_numpy(array) for name, array in kept.items()}
    moved = [name for name, array in before.state_dict().items() if name in kept and not array.equal(changed[name])]
    before.load_state_dict(changed, strict=False)
    assert moved
    torch.testing.assert_close(logits(before), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("solver", CALIBRATED)
@pytest.mark.parametrize("kind", ["llama3", "gemma2", "phi3"])
def test_a_decoder_is_quantized_along_its_layers(chats, tmp_path, kind, solver):
    folder = tiny_decoder(tmp_path / "model", kind, intermediate_size=128)
    config = Config(model=str(folder), task="text-generation", data=str(chats), solver=solver, calibration_rows=16)
    plain = config.replace(solver="rtn", calibration=str(chats))
    summary, about = quantized(config, tmp_path / "out")
    other, old = quantized(plain, tmp_path / "plain")
    assert summary["mean_output_error"] < other["mean_output_error"]
    assert [layer["name"] for layer in about["layers"]].sort() == [layer["name"] for layer in old["layers"]].sort()
    assert summary["bytes"] == pytest.approx(other["bytes"], rel=1e-3)
    assert (about["base_digest"] == old["base_digest"]) is not SOLVERS[solver].scales
    assert torch.isfinite(logits(quantized_model(tmp_path / "out", (), config))).all()


@pytest.mark.parametrize("solver", CALIBRATED)
def test_an_encoder_is_quantized_along_its_layers(tmp_path, solver):
    folder, data = tiny_bert(tmp_path / "model"), tiny_data(tmp_path / "data")
    config = Config(model=str(folder), data=str(data), solver=solver)
    summary, about = quantized(config, tmp_path / "out")
    other, _ = quantized(config.replace(solver="rtn", calibration=str(data)), tmp_path / "plain")
    assert summary["mean_output_error"] < other["mean_output_error"]
    assert summary["linears"] == other["linears"] == 13
    assert all("output_error" in layer for layer in about["layers"] if layer["kind"] == "linear")


def test_equal_arguments_give_equal_bytes_and_other_texts_other_ones(chats, tmp_path):
    folder = tiny_decoder(tmp_path / "model", intermediate_size=128)
    text = tmp_path / "text.txt"
    text.write_text("Nothing of the sort was ever written anywhere near here.\n" * 40)
    config = Config(model=str(folder), task="text-generation", data=str(chats), solver="gptq")
    files = []
    for i, calibration in enumerate(("", "", str(text))):
        quantized(config.replace(calibration=calibration), tmp_path / str(i))
        files.append((tmp_path / str(i) / "weights.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("", "nothing to calibrate with"), (b"\xff\xfe\xff", "expected UTF-8")],
)
def test_calibration_texts_that_cannot_serve_are_told(chats, tmp_path, text, message):
    folder, file = tiny_decoder(tmp_path / "model"), tmp_path / "text.txt"
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    config = Config(
        model=str(folder), task="text-generation", data=str(chats), solver="gptq", calibration=str(file),
        output=str(tmp_path / "run"),
    )  # fmt: skip
    with pytest.raises(DataError, match=message):
        build(config, [stage_named("quantize")])


def test_the_stage_is_done_again_for_other_texts_only_where_it_reads_them(chats, tmp_path, capsys):
    folder = tiny_decoder(tmp_path / "model")
    base = {"model": str(folder), "task": "text-generation", "data": str(chats), "output": str(tmp_path / "run")}
    other = write_rows(tmp_path / "other.jsonl", conversations(50, seed=9))
    for solver, again in (("rtn", False), ("gptq", True)):
        build(Config(**base, solver=solver), [stage_named("quantize")])
        capsys.readouterr()
        build(Config(**{**base, "data": str(other)}, solver=solver), [stage_named("quantize")])
        assert ("up to date" not in capsys.readouterr().err) is again


# --- formats per layer ---------------------------------------------------------------------------------------------


def test_a_budget_is_met_by_the_steps_that_lose_least():
    from edgepeft.quant.sensitivity import Choice, Part, fit

    parts = [
        Part(("a",), (Choice("i8c", 100, 0.0), Choice("i4b32", 60, 0.1), Choice("i4b128", 50, 0.9))),
        Part(("b",), (Choice("i8c", 100, 0.0), Choice("i4b32", 60, 0.2))),
    ]
    assert [choice.tag for choice in fit(parts, 200)] == ["i8c", "i8c"]
    assert [choice.tag for choice in fit(parts, 199)] == ["i4b32", "i8c"]
    assert [choice.tag for choice in fit(parts, 120)] == ["i4b32", "i4b32"]
    assert [choice.tag for choice in fit(parts, 110)] == ["i4b128", "i4b32"]
    assert fit(parts, 109) is None


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_size_is_kept_and_the_least_is_told(chats, tmp_path, solver, monkeypatch):
    folder = tiny_decoder(tmp_path / "model", "llama3", hidden_size=128, intermediate_size=256)
    config = Config(model=str(folder), task="text-generation", data=str(chats), solver=solver, size="200kB")
    summary, about = quantized(config, tmp_path / "out")
    assert 150_000 < summary["bytes"] <= 200_000
    tags = {layer["format"] for layer in about["layers"] if layer["kind"] == "linear"}
    assert len(tags) > 1
    assert about["format"] == "mixed"
    for prefix in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        own = [layer["format"] for layer in about["layers"] if layer["name"] in {f"{prefix}.{r}_proj" for r in "qkv"}]
        assert len(set(own)) == 1
    monkeypatch.setattr("edgepeft.quant.walk.calibrate", None)  # it is known of the shapes alone
    with pytest.raises(ConfigError, match=r"expected at least (0\.\d+MB)") as caught:
        quantized(config.replace(size="20kB"), tmp_path / "small")
    monkeypatch.undo()
    told = re.search(r"at least (0\.\d+MB)", str(caught.value))
    assert quantized(config.replace(size=told[1]), tmp_path / "least")[0]["bytes"] < summary["bytes"]


@pytest.mark.parametrize("size", ["12", "MB", "12mb", "-1MB", "12 TB"])
def test_what_is_no_size_is_told(size):
    with pytest.raises(ConfigError, match="--size: expected a number"):
        Config(size=size)
