"""Verify, for language models: a right export passes, and each planted fault is named by the check it meets."""

import json
import shutil

import numpy as np
import onnx
import pytest
from builders import conversations, tiny_decoder, write_rows

from edgepeft.adapt import peft_files
from edgepeft.artifact import Run, read_json, read_tensors, write_json
from edgepeft.config import Config
from edgepeft.errors import VerifyError
from edgepeft.export import genai, parity, token_checks
from edgepeft.export import verify as stage
from edgepeft.export.stage import export
from tests.export.test_verify import Here, change_b, copy, damage, edit_graph, emulated, run_stage, swap_b, zero  # noqa: F401 - fixtures among them
from tests.export.tiny_decoder import random_adapter

LAYER = "model.layers"


def make_run(folder, kind, **settings):
    """A run of a tiny decoder up to its export, with a random adapter in place of a trained one."""
    from edgepeft.quant.stage import quantize

    data = write_rows(folder / "chats.jsonl", conversations(40))
    config = Config(
        model=str(tiny_decoder(folder / "model", kind)), data=str(data), output=str(folder / "run"), threads=1,
        task="text-generation", max_length=96, context=128, **settings,
    )  # fmt: skip
    run = Run(folder / "run")
    run.make("quantized", "", lambda out: quantize(config, run, out))
    random_adapter(run.path("quantized"), folder / "adapter")
    shutil.copytree(folder / "adapter" / "trained", run.path("adapter"))
    write_json(run.path("adapter") / "training.json", {"labels": [], "config": {"method": "lora"}})
    run.make("export", "", lambda out: export(config, run, out))
    return config, run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(config, run) of an exported tiny Llama with everything tied, shared: do not write into it."""
    return make_run(tmp_path_factory.mktemp("llama3"), "llama3")


@pytest.mark.parametrize("kind", ["llama3", "gemma3", "phi4"])
def test_right_export_passes_and_reports(tiny, tmp_path, kind):
    config, run = tiny if kind == "llama3" else make_run(tmp_path, kind)
    report = stage.verify(config, run, tmp_path)
    assert list(report) == list(stage.CHECKS["text-generation"])
    assert {name for name, figures in report.items() if figures["status"] == "skipped"} <= {
        "device",
        "gpu",
        "library",
        "rounding",
    }
    assert report["stock"]["largest_error"] < 1e-5
    assert report["steps"]["largest_error"] < 1e-5
    found = report["metric"]["perplexity"]
    assert found["exported"] == pytest.approx(found["trained"], rel=0.02)
    assert found["base"] != pytest.approx(found["trained"], rel=0.01)
    assert found["float_base"] == pytest.approx(found["base"], rel=0.5)
    cache, about = report["cache"], read_json(run.path("export") / "export.json")["decoder"]
    assert abs(cache["loss_rise"]) < token_checks.LOSS_RISE
    assert cache["bytes_a_token"] == 2 * about["layers"] * about["kv_heads"] * about["head_dim"]
    scales = read_tensors(tmp_path / "kv_cache.safetensors")
    assert sum(scale.size for scale in scales.values()) == cache["bytes_a_token"]
    assert all(np.isfinite(scale).all() and (scale > 0).all() for scale in scales.values())
    assert read_json(tmp_path / "report.json")["checks"] == json.loads(json.dumps(report))


def test_the_base_is_what_it_was_before_its_biases_were_trained(tmp_path):
    """PEFT switches an adapter off, but leaves the biases that it trained in the base."""
    from edgepeft.backbone.load import quantized_model
    from edgepeft.train.loop import adapted
    from tests.adapt.foreign_settings import randomize

    config, run = make_run(tmp_path, "qwen2", activation="float")
    before = stage.verify(config, run, tmp_path)["metric"]["perplexity"]
    tuned = adapted(quantized_model(run.path("quantized"), [], config), config.replace(method="bitfit"))
    randomize(tuned)
    shutil.rmtree(run.path("export"))
    tuned.save_pretrained(str(tmp_path / "tuned"))
    adapter = peft_files.read(tmp_path / "tuned", foreign=True)
    about = read_json(run.path("quantized") / "quantized.json")
    peft_files.write(run.path("adapter"), adapter.settings, adapter.tensors, about["base_digest"], about["format"])
    run.make("export", "biases", lambda out: export(config, run, out))
    after = stage.verify(config, run, tmp_path)["metric"]["perplexity"]
    assert after["base"] == before["base"]
    assert after["trained"] != pytest.approx(before["base"], rel=1e-3)
    assert after["exported"] == pytest.approx(after["trained"], rel=1e-3)


def flip_a_scale(run):
    def change(scales):
        scales[19] = -scales[19]

    damage(run, f"{LAYER}.1.mlp.down_proj.qscale", np.float16, change)


def roll_the_shared_embedding(run):
    def change(codes):
        codes[:] = np.roll(codes, 64)

    damage(run, "model.embed_tokens.qweight", np.uint8, change)


def spoil_a_norm(run):
    def change(weight):
        weight[3] += 1

    damage(run, f"{LAYER}.1.post_attention_layernorm.weight", np.float32, change)


def turn_backwards(run):
    def change(sin):
        sin *= -1

    damage(run, "rope_0.sin", np.float32, change)


def swap_k_and_v(run):
    swap_b(run, [f"{LAYER}.0.self_attn.{part}_proj.lora_B.weight" for part in "kv"])


def zero_a_trained_adapter(run):
    change_b(run, f"{LAYER}.1.mlp.up_proj.lora_B.weight", zero, trained=True)


def see_a_window(run):
    def change(proto):
        for node in proto.graph.node:
            for attribute in node.attribute:
                if attribute.name == "local_window_size":
                    attribute.i = 4

    edit_graph(run, change)


def forget_a_past(run):
    def change(proto):
        other, node = (n for n in proto.graph.node if n.op_type == "GroupQueryAttention")
        node.input[3] = other.input[3]

    edit_graph(run, change)


FAULTS = {
    flip_a_scale: rf"stock.*starts in {LAYER}\.1\.mlp\.down_proj:",
    roll_the_shared_embedding: r"stock.*starts in model\.embed_tokens:",
    spoil_a_norm: rf"stock.*starts in {LAYER}\.1\.post_attention_layernorm:",
    turn_backwards: rf"stock.*starts in {LAYER}\.0\.self_attn\.o_proj:",
    swap_k_and_v: rf"stock.*starts in {LAYER}\.0\.self_attn\.k_proj:",
    zero_a_trained_adapter: rf"effect.*{LAYER}\.1\.mlp\.up_proj\.lora_[AB]\.weight",
    see_a_window: rf"stock.*starts in {LAYER}\.0\.self_attn\.o_proj:",
    forget_a_past: r"a text in parts against the whole: the difference starts in 1 token a run",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_fault_is_named(copy, fault):  # noqa: F811 - the fixture
    config, run = copy
    fault(run)
    with pytest.raises(VerifyError, match=FAULTS[fault]):
        run_stage(config, run)
    assert not run.path("verify").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"), [("AGREEMENT", 1.01, "prefers"), ("LOSS_RISE", -9.0, "loss on the")]
)
def test_answers_and_loss_have_limits(tiny, tmp_path, monkeypatch, name, value, words):
    monkeypatch.setattr(token_checks, name, value)
    with pytest.raises(VerifyError, match=words):
        stage.verify(*tiny, tmp_path)


def test_judging_is_cross_entropy():
    import torch

    rng = np.random.default_rng(0)
    z, goal = rng.standard_normal((7, 11)).astype(np.float32) * 9, rng.integers(0, 11, 7)
    labels = [-100, -100, *goal[1:6].tolist(), -100]
    found = token_checks.judge(
        [{"input_ids": [0] * 7, "labels": labels[:7]}], lambda _: iter((z[None, :3], z[None, 3:]))
    )
    kept = torch.from_numpy(z[1:6]), torch.from_numpy(goal[1:6])
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(*kept)), rel=1e-6)
    assert found.likeliest.tolist() == z[1:6].argmax(-1).tolist()


@pytest.mark.parametrize(("spoil", "words"), [(None, ""), (1.001, "starts in cortex-a72, float")])
def test_device_is_compared_for_prompts_and_steps(copy, emulated, monkeypatch, spoil, words):  # noqa: F811 - the fixtures
    config, run = copy
    emulated(Here(spoil))
    monkeypatch.setattr(stage.rewrite, "NEW_WINDOWS", (0,))  # this machine plays the device, on a newer ONNX Runtime
    if words:
        with pytest.raises(VerifyError, match=words):
            run_stage(config.replace(target="rpi4"), run)
    else:
        assert run_stage(config.replace(target="rpi4"), run)["device"]["cortex-a72"]["float_error"] < 1e-6


def test_int8_rounding_in_pieces_is_the_whole_layer(monkeypatch):
    import torch

    from edgepeft.quant.linear import QuantLinear

    torch.manual_seed(0)
    layer = QuantLinear.from_float(torch.nn.Linear(64, 40), "i4b32")
    monkeypatch.setattr(parity, "PIECE_ROWS", 16)
    assert np.array_equal(np.concatenate(list(parity._rounded_weight(layer)))[:40], layer.get_weight().numpy())


def test_genai_config_names_what_the_graph_has(tiny):
    run = tiny[1]
    about = read_json(run.path("export") / "export.json")
    config = genai.genai_config("llama", about["context"], about["decoder"], "lib/x/lib.so")["model"]
    proto = onnx.load(run.path("export") / "model.onnx", load_external_data=False)
    graph = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    decoder = config["decoder"]
    names = {**decoder["inputs"], **decoder["outputs"]}.values()
    named = {name.replace("%d", str(i)) for name in names for i in range(decoder["num_hidden_layers"])}
    assert named == {name for name in graph if not name.startswith("base_model.") and name != "logits_to_keep"}
    assert about["decoder"]["add_bos"] is False  # this tokenizer puts nothing before a text
    assert config["context_length"] == 128
    assert config["eos_token_id"] == [2]
