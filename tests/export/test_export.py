"""The exported folder on stock ONNX Runtime against transformers and PEFT, and what a run may feed into it."""

import json

import numpy as np
import onnx
import pytest
import torch
from builders import LABELS, tiny_bert

from edgepeft.adapt import peft_files
from edgepeft.artifact import digests, read_tensors
from edgepeft.backbone.families import FAMILIES
from edgepeft.errors import ModelError
from edgepeft.export import emitter, encoder
from edgepeft.export.parity import OnnxModel, largest_error
from edgepeft.quant.formats import FORMATS
from edgepeft.runtime.adapters import for_graph
from tests.export.tiny_run import export_run, make_run, random_adapter, torch_model

TIGHT = 1e-4  # float32 rounding over the layers
HALF = 4e-3  # the adapter as float16

FORMAT_PAIRS = list(zip(sorted(FORMATS), ["i4b32", "i8b32", "float", "i4b32", "i4b32"], strict=True))


def batch(seed=0, lengths=(17, 5, 1, 9)):
    """Random ids with padding on the right, both segments in use."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths))
    mask = (np.arange(shape[1])[None] < np.array(lengths)[:, None]).astype(np.int64)
    return {
        "input_ids": rng.integers(5, 60, shape) * mask,
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, shape) * mask,
    }


def by_torch(model, arrays):
    with torch.inference_mode():
        return model(**{name: torch.from_numpy(a) for name, a in arrays.items()}).logits.numpy()


@pytest.mark.parametrize(("tag", "embedding"), FORMAT_PAIRS)
def test_stock_runtime_equals_transformers(tmp_path, tag, embedding):
    model = tiny_bert(tmp_path / "model", hidden=128)  # i4b128 needs K = 128
    config, run = make_run(tmp_path, model=model, hidden=128, format=tag, embedding_format=embedding)
    folder = export_run(config, run)
    device_form = torch_model(config, run, folder / "adapters" / "default")
    got = OnnxModel(folder, None).logits(batch())
    assert largest_error(got, by_torch(device_form, batch())) < TIGHT
    assert largest_error(got, by_torch(torch_model(config, run), batch())) < HALF


def test_rank_zero_is_the_base(tiny):
    config, run = tiny
    onnx_model, model = OnnxModel(run.path("export"), None), torch_model(config, run)
    with model.disable_adapter():
        linear = model.base_model.model.classifier.original_module
        trained = model.base_model.model.classifier.modules_to_save["default"]
        linear.load_state_dict(trained.state_dict())  # PEFT turns the head off as well
        want = by_torch(model, batch())
    assert largest_error(onnx_model.logits(batch(), onnx_model.without_adapter()), want) < TIGHT
    assert largest_error(onnx_model.logits(batch()), want) > 0.05


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("labels", [3, 7])
def test_another_adapter_is_fed_without_a_reload(tiny, tmp_path, rank, labels):
    config, run = tiny
    random_adapter(run, tmp_path / "trained", rank=rank, labels=labels, seed=rank)
    peft_files.write_device(tmp_path / "device", tmp_path / "trained")
    feeds = for_graph(read_tensors(tmp_path / "device" / peft_files.TENSORS))
    from peft import PeftModel

    from edgepeft.backbone.load import quantized_model

    base = quantized_model(run.path("quantized"), [str(i) for i in range(labels)], config)
    model = PeftModel.from_pretrained(base, str(tmp_path / "device")).eval()
    onnx_model = OnnxModel(run.path("export"), None)
    before = onnx_model.logits(batch())
    got = onnx_model.logits(batch(), feeds)
    assert got.shape == (4, labels)
    assert largest_error(got, by_torch(model, batch())) < TIGHT
    assert np.array_equal(before, onnx_model.logits(batch()))


def test_padding_changes_nothing(tiny):
    onnx_model = OnnxModel(tiny[1].path("export"), None)
    together = onnx_model.logits(batch())
    for i, length in enumerate((17, 5, 1, 9)):
        alone = onnx_model.logits({name: a[i : i + 1, :length] for name, a in batch().items()})
        assert largest_error(together[i : i + 1], alone) < 1e-5
    garbage = batch()
    garbage["input_ids"] = np.where(garbage["attention_mask"] == 1, garbage["input_ids"], 33)
    assert largest_error(onnx_model.logits(garbage), together) < 1e-6


def names_of_gates(tensors):
    """The gates that go with an adapter's tensors."""
    return {name.replace("lora_A.weight", "gate") for name in tensors if name.endswith("lora_A.weight")}


def test_folder_is_complete_and_the_adapter_lies_in_it(tiny):
    """Its file serves the graph too; B alone lies there again, turned."""
    _config, run = tiny
    folder = run.path("export")
    names = set(digests(folder))
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "export.json"} < names
    assert {"adapters/default/adapter_config.json", "adapters/default/adapter_model.safetensors"} < names
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["BertForSequenceClassification"]
    assert settings["num_labels"] == len(LABELS)
    assert settings["id2label"] == {str(i): label for i, label in enumerate(LABELS)}
    tensors = read_tensors(folder / emitter.ADAPTER_FILE)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    inputs = {i.name: i for i in proto.graph.input}
    own = {name for name in inputs if not name.endswith(".gate")} - {"input_ids", "attention_mask", "token_type_ids"}
    assert set(tensors) == own
    assert set(inputs) - own == {*names_of_gates(tensors), "input_ids", "attention_mask", "token_type_ids"}
    for tensor in proto.graph.initializer:
        if tensor.name in tensors:
            place = {e.key: e.value for e in tensor.external_data}
            turned = tensor.name.endswith("lora_B.weight")
            assert place["location"] == ("model.onnx.data" if turned else emitter.ADAPTER_FILE)
            raw = (folder / place["location"]).read_bytes()[int(place["offset"]) :][: int(place["length"])]
            assert raw == for_graph(tensors)[tensor.name].tobytes()


def test_file_stays_within_what_the_oldest_runtime_reads(tiny):
    """ONNX Runtime 1.20: opset 21, IR version 10, 4-bit MatMulNBits only, no uint8 tables gathered as numbers."""
    proto = onnx.load(tiny[1].path("export") / "model.onnx", load_external_data=False)
    assert proto.ir_version <= 10
    assert {o.domain: o.version for o in proto.opset_import}[""] <= 21
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    for node in nodes:
        if node.op_type == "MatMulNBits":
            assert next(a.i for a in node.attribute if a.name == "bits") == 4
        assert node.op_type != "GatherBlockQuantized"


def test_export_is_the_same_every_time(tiny):
    config, run = tiny
    before = digests(run.path("export"))
    assert digests(export_run(config, run)) == before


def test_kept_linears_run_in_float_with_their_adapter(tmp_path):
    model = tiny_bert(tmp_path / "model", hidden=96, intermediate_size=128)  # K = 96 is no multiple of 64
    config, run = make_run(tmp_path, model=model, hidden=96, format="i4b64")
    folder = export_run(config, run)
    summary = json.loads((folder / "export.json").read_text())
    assert (summary["fused_linears"], summary["adapter_inputs"]) == (2, 41)
    device_form = torch_model(config, run, folder / "adapters" / "default")
    assert largest_error(OnnxModel(folder, None).logits(batch()), by_torch(device_form, batch())) < TIGHT


@pytest.mark.parametrize("act", ["relu", "gelu_new", "tanh"])
def test_other_activations(tmp_path, act):
    model = tiny_bert(tmp_path / "model", layers=1, hidden_act=act)
    config, run = make_run(tmp_path, model=model)
    folder = export_run(config, run)
    device_form = torch_model(config, run, folder / "adapters" / "default")
    assert largest_error(OnnxModel(folder, None).logits(batch()), by_torch(device_form, batch())) < TIGHT


@pytest.mark.parametrize(
    ("change", "words"),
    [({"hidden_act": "quick_gelu"}, "quick_gelu"), ({"is_decoder": True}, "is_decoder")],
)
def test_what_would_not_be_exact_is_refused(tiny, change, words):
    run = tiny[1]
    weights = emitter.Weights(run.path("quantized"))
    settings = {**json.loads((run.path("quantized") / "config.json").read_text()), **change}
    with pytest.raises(ModelError, match=words):
        encoder.build(FAMILIES["bert"], settings, weights, emitter.AdapterFile.read(None))


def test_merged_model_has_no_adapter_and_verifies(tmp_path):
    from edgepeft.adapt.merge import merge
    from edgepeft.export.verify import verify

    config, run = make_run(tmp_path, adapter="merged", min_retention=0.0, max_metric_drop=1.0)
    run.make("merged", "", lambda out: merge(config, run, out))
    folder = export_run(config, run)
    onnx_model = OnnxModel(folder, None)
    assert not (folder / "adapters").exists()
    assert not onnx_model.adapter_shapes
    apart = by_torch(torch_model(config, run), batch())
    assert 1e-3 < largest_error(onnx_model.logits(batch()), apart) < 0.6  # the grid swallows some of it
    report = run.make("verify", "", lambda out: verify(config, run, out))
    skipped = {name for name, figures in report.items() if figures["status"] == "skipped"}
    assert {"adapter", "effect"} <= skipped
    assert report["stock"]["largest_error"] < TIGHT


@pytest.mark.optimum
def test_optimum_loads_the_folder(tiny):
    import onnxruntime
    from optimum.onnxruntime import ORTModelForSequenceClassification

    folder, options = tiny[1].path("export"), onnxruntime.SessionOptions()
    options.log_severity_level = 3
    model = ORTModelForSequenceClassification.from_pretrained(folder, session_options=options)
    assert [model.config.id2label[i] for i in range(len(LABELS))] == list(LABELS)
    got = model(**{name: torch.from_numpy(a) for name, a in batch().items()}).logits.numpy()
    assert largest_error(got, OnnxModel(folder, None).logits(batch())) < 1e-6
