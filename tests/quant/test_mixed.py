"""Formats of their own per layer, all the way: quantized, trained, merged or kept, exported, verified, bundled."""

import numpy as np
import onnx
import pytest
import torch
from builders import tiny_bert, tiny_data

from edgepeft.artifact import Run, read_json
from edgepeft.config import Config
from edgepeft.export.parity import OnnxModel, largest_error
from edgepeft.pipeline import build
from edgepeft.plan import plan_text
from edgepeft.quant.formats import FORMATS
from edgepeft.quant.stage import Work
from tests.export.tiny_run import export_run, make_run, torch_model

OWN = {"query": "i8c", "key": "i4b32", "value": "i4b32", "output.dense": "nf4b64", "intermediate.dense": "i4b64"}


def test_linears_of_several_formats_fall_apart_into_ops_of_their_own(tmp_path, monkeypatch):
    plain = Work.format

    def own(self, module, kind, shape):
        tag = next((tag for end, tag in OWN.items() if module.endswith(end)), None)
        one_layer = kind == "linear" and ".layer.0." in module
        return (FORMATS[tag], "") if tag and one_layer else plain(self, module, kind, shape)

    monkeypatch.setattr(Work, "format", own)
    config, run = make_run(tmp_path)
    folder = export_run(config, run)
    ops = [node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]
    found = {op for op in ops if op.startswith("AdapterMatMul")}
    assert {"AdapterMatMul_i8c_g1", "AdapterMatMul_nf4b64_g1", "AdapterMatMul_i4b64_g1"} <= found
    assert ops.count("AdapterMatMul_i4b32_g2") == 1  # k and v of the last layer, whose formats agree
    ids = np.random.default_rng(0).integers(5, 60, (3, 11))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    with torch.inference_mode():
        arrays = {name: torch.from_numpy(array) for name, array in batch.items()}
        expected = torch_model(config, run)(**arrays).logits.numpy()
    assert largest_error(OnnxModel(folder, None).logits(batch), expected) < 4e-3


@pytest.mark.parametrize("adapter", ["separate", "merged"])
def test_a_build_for_a_size_goes_all_the_way(tmp_path, adapter):
    config = Config(
        model=str(tiny_bert(tmp_path / "model", hidden=128)), data=str(tiny_data(tmp_path / "data")), size="260kB",
        adapter=adapter, rank=4, epochs=1, batch_size=8, threads=1, min_retention=0.0, max_metric_drop=1.0,
        output=str(tmp_path / "run"),
    )  # fmt: skip
    assert "not known yet" in plan_text(config)
    bundle, run = build(config), Run(tmp_path / "run")
    about = read_json(run.path("quantized") / "quantized.json")
    assert len({layer["format"] for layer in about["layers"] if layer["kind"] == "linear"}) > 1
    assert 200_000 < (run.path("quantized") / "weights.safetensors").stat().st_size <= 260_000
    assert read_json(bundle / "manifest.json")["format"] == "mixed"
    packed = sum(layer["bytes"] for layer in about["layers"] if layer["kind"] == "linear")
    line = next(line for line in plan_text(config).splitlines() if line.startswith("| linear"))
    assert float(line.split("|")[4]) == pytest.approx(packed / 1e6, rel=1e-3)
