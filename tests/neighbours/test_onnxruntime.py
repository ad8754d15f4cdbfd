"""ONNX Runtime's own loader takes the .onnx_adapter that `edgepeft adapters add` writes: the same logits as ours."""

import numpy as np
import onnxruntime as ort

from edgepeft.adapt.peft_files import TENSORS
from edgepeft.artifact import read_json, read_tensors, tensor_header, write_json, write_tensors
from edgepeft.deploy import adapters
from edgepeft.deploy.bundle import bundle as collect
from edgepeft.export.parity import OnnxModel
from tests.export.test_token_checks import make_run
from tests.export.tiny_decoder import random_adapter


def test_an_onnx_adapter_is_what_our_runtime_feeds(tmp_path):
    """Another rank than the graph's own, and on part of its linears, so that the others' defaults have to go."""
    config, run = make_run(tmp_path, "llama3")
    training = run.path("adapter") / "training.json"
    write_json(training, {**read_json(training), "config": {"method": "lora", "task": config.task, "rank": 4}})
    run.path("verify").mkdir()
    write_json(run.path("verify") / "report.json", {"checks": {}})
    run.make("bundle", "", lambda out: collect(config, run, out))
    bundle = run.path("bundle")
    random_adapter(run.path("quantized"), tmp_path / "other", rank=7, seed=5)
    path = tmp_path / "other" / "trained" / TENSORS
    tensors = {name: np.array(array) for name, array in read_tensors(path).items() if ".mlp." not in name}
    write_tensors(path, tensors, tensor_header(path)[1])
    settings = read_json(path.with_name("adapter_config.json"))
    attention = [name for name in settings["target_modules"] if ".mlp." not in name]
    write_json(path.with_name("adapter_config.json"), {**settings, "target_modules": attention})
    adapters.add(bundle, path.parent, "other")

    ids = np.arange(5, 17).reshape(1, -1)
    model, ours = OnnxModel(bundle, None), adapters.runtime.load(bundle, threads=1, library="none")
    loaded, options = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(bundle / "adapters" / "other" / adapters.ONNX_ADAPTER))
    options.add_active_adapter(loaded)
    feeds = model.feeds({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    found, default = (model.session.run(["logits"], feeds, chosen)[0][0] for chosen in (options, None))
    assert np.abs(found - default).max() > 0.05, "the adapter should matter"
    for logits, name in ((found, "other"), (default, "default")):
        np.testing.assert_allclose(logits, ours.logits(ids[0].tolist(), name), atol=1e-4)
