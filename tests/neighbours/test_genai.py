"""ONNX Runtime GenAI hosts a bundle: the same tokens as our runtime, also with another adapter swapped in."""

import json

import numpy as np
import pytest

from edgepeft.adapt.peft_files import TENSORS
from edgepeft.artifact import read_json, read_tensors, tensor_header, write_json, write_tensors
from edgepeft.deploy import adapters
from edgepeft.deploy.bundle import bundle as collect
from edgepeft.runtime import load
from tests.export.test_token_checks import make_run
from tests.export.tiny_decoder import random_adapter

og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this machine")
TOKENS = 24


@pytest.fixture(scope="module", params=["llama3", "gemma3"])
def bundle(request, tmp_path_factory):
    """A sealed bundle of a tiny decoder with a second adapter beside the default one."""
    folder = tmp_path_factory.mktemp(request.param)
    config, run = make_run(folder, request.param)
    training = run.path("adapter") / "training.json"
    write_json(training, {**read_json(training), "config": {"method": "lora", "task": config.task, "rank": 4}})
    run.path("verify").mkdir()
    write_json(run.path("verify") / "report.json", {"checks": {}})
    run.make("bundle", "", lambda out: collect(config, run, out))
    random_adapter(run.path("quantized"), folder / "other", rank=7, seed=5)
    path = folder / "other" / "trained" / TENSORS  # on part of the linears, so that the default's others must go
    tensors = {name: np.array(array) for name, array in read_tensors(path).items() if ".mlp." not in name}
    write_tensors(path, tensors, tensor_header(path)[1])
    adapters.add(run.path("bundle"), path.parent, "other")
    return run.path("bundle")


def genai_tokens(folder, rows, adapter=None):
    """Return the tokens GenAI writes greedily after each row of ids; the shorter ones are padded on the right."""
    model = og.Model(str(folder))
    parameters, length = og.GeneratorParams(model), max(map(len, rows))
    full = {"max_length": length + TOKENS, "min_length": length + TOKENS}
    parameters.set_search_options(**full, do_sample=False, batch_size=len(rows))
    pad = read_json(folder / "genai_config.json")["model"]["pad_token_id"]
    generator = og.Generator(model, parameters)
    if adapter:
        loaded = og.Adapters(model)
        loaded.load(str(adapter), "other")
        generator.set_active_adapter(loaded, "other")
    generator.append_tokens(np.array([[*ids, *[pad] * (length - len(ids))] for ids in rows], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [list(generator.get_sequence(row))[length:] for row in range(len(rows))]


def own_tokens(folder, ids, adapter):
    """Return the likeliest tokens after ids by our runtime, whether they end the text or not."""
    model = load(folder, threads=1)
    ids = list(ids)
    for _ in range(TOKENS):
        logits = model.logits(ids, adapter, keep=1)[-1]
        logits[list(model.manifest["decoder"]["eos"])] = -np.inf  # min_length keeps GenAI from ending
        ids.append(int(logits.argmax()))
    return ids[-TOKENS:]


def test_it_writes_what_our_runtime_does_with_either_adapter(bundle):
    ids = load(bundle).encode([{"role": "user", "content": "turn on the lamp in the attic"}])
    default, other = own_tokens(bundle, ids, "default"), own_tokens(bundle, ids, "other")
    assert genai_tokens(bundle, [ids]) == [default]
    assert genai_tokens(bundle, [ids], bundle / "adapters" / "other" / adapters.ONNX_ADAPTER) == [other]
    assert default != other


def test_prompts_of_unlike_length_share_a_batch(bundle):
    model = load(bundle)
    rows = [model.encode(text) for text in ("turn on the lamp in the attic", "hello", "is it warm?")]
    assert genai_tokens(bundle, rows) == [own_tokens(bundle, ids, "default") for ids in rows]


def test_its_chat_template_is_ours(bundle):
    messages = [{"role": "user", "content": "turn on the lamp"}]
    tokenizer = og.Tokenizer(og.Model(str(bundle)))
    text = tokenizer.apply_chat_template(messages=json.dumps(messages), add_generation_prompt=True)
    assert tokenizer.encode(text).tolist() == load(bundle).encode(messages)
