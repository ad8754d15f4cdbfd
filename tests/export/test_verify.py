"""The verify stage passes a right export, and names the right layer or tensor for each fault planted in a copy."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest

from edgepeft.artifact import Run, read_json, read_tensors, tensor_header, write_json
from edgepeft.deploy import compile, emulator, softgpu
from edgepeft.errors import TargetError, VerifyError
from edgepeft.export import ops, parity
from edgepeft.export import verify as stage
from edgepeft.export.emitter import ADAPTER_FILE

PREFIX = "base_model.model."
LAYER = "bert.encoder.layer"


@pytest.fixture
def copy(tiny, tmp_path):
    """(config, run) in a folder of its own, to be damaged."""
    shutil.copytree(tiny[1].folder, tmp_path / "run")
    return tiny[0].replace(output=str(tmp_path / "run")), Run(tmp_path / "run")


def run_stage(config, run):
    return run.make("verify", "", lambda out: stage.verify(config, run, out))


def test_right_export_passes_and_reports(copy):
    config, run = copy
    report = run_stage(config, run)
    assert list(report) == list(stage.CHECKS[config.task])
    skipped = {name for name, figures in report.items() if figures["status"] == "skipped"}
    assert skipped <= {"device", "gpu", "library", "rounding"}
    assert report["device"]["reason"]
    assert report["stock"]["largest_error"] < 1e-5
    assert report["answers"]["agreement"] == 1
    assert read_json(run.path("verify") / "report.json")["checks"] == json.loads(json.dumps(report))


# --- planted faults: each changes one thing and returns nothing ---


def damage(run, name, dtype, change):
    """Change the values of one initializer, flat, wherever its bytes lie."""
    path = run.path("export") / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    place = {e.key: e.value for e in tensor.external_data}
    if not place:  # small ones stand in the graph
        values = np.frombuffer(tensor.raw_data, dtype).copy()
        change(values)
        tensor.raw_data = values.tobytes()
        path.write_bytes(proto.SerializeToString(deterministic=True))
        return
    count = int(place["length"]) // np.dtype(dtype).itemsize
    change(np.memmap(path.parent / place["location"], dtype, "r+", int(place["offset"]), (count,)))


def change_b(run, name, change, trained=False):
    """Change B of a module, flat, in the export's graph and file, and in what was trained."""
    damage(run, f"{PREFIX}{name}", np.float16, change)
    change(adapter_of(run.path("export") / ADAPTER_FILE, name))
    if trained:
        change(adapter_of(run.path("adapter") / "adapter_model.safetensors", name))


def zero(values):
    values[:] = 0


def adapter_of(path, name):
    """Map one tensor of an adapter file for writing."""
    header, _, base = tensor_header(path)
    start, end = header[PREFIX + name]["data_offsets"]
    dtype = {"F16": np.float16, "F32": np.float32}[header[PREFIX + name]["dtype"]]
    return np.memmap(path, dtype, "r+", base + start, ((end - start) // np.dtype(dtype).itemsize,))


def flip_a_scale(run):
    def change(scales):
        scales[19] = -scales[19]

    damage(run, f"{LAYER}.1.output.dense.qscale", np.float16, change)


def nan_scale(run):
    def change(scales):
        scales[40] = np.nan

    damage(run, f"{LAYER}.0.intermediate.dense.qscale", np.float16, change)


def flip_a_weight_bit(run):
    def change(codes):
        codes[100] ^= 0x80

    damage(run, f"{LAYER}.1.attention.output.dense.qweight", np.uint8, change)


def shift_an_embedding(run):
    def change(codes):
        codes[:] = np.roll(codes, 32)  # one row of 64 codes

    damage(run, "bert.embeddings.word_embeddings.qweight", np.uint8, change)


def swap_b(run, names):
    found = []
    for name in names:
        damage(run, f"{PREFIX}{name}", np.float16, lambda values: found.append(values.copy()))
    for name, other in zip(names, found[::-1], strict=True):
        damage(run, f"{PREFIX}{name}", np.float16, lambda values, other=other: np.copyto(values, other))


def swap_q_and_k(run):
    swap_b(run, [f"{LAYER}.0.attention.self.{part}.lora_B.weight" for part in ("query", "key")])


def zero_an_adapter(run):
    change_b(run, f"{LAYER}.1.intermediate.dense.lora_B.weight", zero)


def zero_a_trained_adapter(run):
    change_b(run, f"{LAYER}.0.attention.self.value.lora_B.weight", zero, trained=True)


def tiny_adapter(run):
    def change(values):
        values[:] = (values * 1e-3).astype(values.dtype)

    for name in read_tensors(run.path("export") / ADAPTER_FILE):
        if name.endswith("lora_B.weight"):
            change_b(run, name.removeprefix(PREFIX), change, trained=True)


def forget_the_scale(run):
    def change(values):
        values[:] = values / 2

    for name in read_tensors(run.path("export") / ADAPTER_FILE):
        if name.endswith("lora_B.weight"):
            change_b(run, name.removeprefix(PREFIX), change)


def edit_graph(run, change):
    path = run.path("export") / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def wire_q_to_k(run):
    def change(proto):
        node = next(n for n in proto.graph.node if n.name.startswith(f"{LAYER}.0.attention.self.query|"))
        q, k = (ops.input_names(3).index(name) for name in ("a_0", "a_1"))
        node.input[q], node.input[k] = node.input[k], node.input[q]

    edit_graph(run, change)


def forget_the_mask(run):
    def change(proto):
        node = next(n for n in proto.graph.node if n.name == f"{LAYER}.0.attention.self")
        node.input[3] = "token_type_ids"  # 0 for all keys, which hides none from the others

    edit_graph(run, change)


def drop_an_adapter_input(run):
    def change(proto):
        node = next(n for n in proto.graph.node if n.name == f"{LAYER}.1.output.dense")
        gate = next(i for i, name in enumerate(node.input) if name == "one")
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "off"))
        node.input[gate + 3] = "off"  # gate_0

    edit_graph(run, change)


def better_figure(run):
    path = run.path("adapter") / "training.json"
    training = read_json(path)
    training["test"]["accuracy"] = 0.99
    write_json(path, training)


FAULTS = {
    flip_a_scale: rf"stock.*starts in {LAYER}\.1\.output\.dense:",
    nan_scale: rf"stock.*starts in {LAYER}\.0\.intermediate\.dense:.*found inf",
    flip_a_weight_bit: rf"stock.*starts in {LAYER}\.1\.attention\.output\.dense:",
    shift_an_embedding: r"stock.*starts in bert\.embeddings\.word_embeddings:",
    swap_q_and_k: rf"stock.*starts in {LAYER}\.0\.attention\.self\.query:",
    zero_an_adapter: rf"exported adapter.*starts in {LAYER}\.1\.intermediate\.dense:",
    forget_the_scale: rf"exported adapter.*starts in {LAYER}\.0\.attention\.self\.query:",
    zero_a_trained_adapter: rf"effect.*{LAYER}\.0\.attention\.self\.value\.lora_[AB]\.weight",
    tiny_adapter: r"effect: turning the adapter off",
    wire_q_to_k: rf"stock.*starts in {LAYER}\.0\.attention\.self\.query:",
    forget_the_mask: rf"stock.*starts in {LAYER}\.0\.attention\.self:",
    drop_an_adapter_input: rf"stock.*starts in {LAYER}\.1\.output\.dense:",
    better_figure: r"accuracy on the test split: expected at least 0\.8",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_fault_is_named(copy, fault):
    config, run = copy
    fault(run)
    with pytest.raises(VerifyError, match=FAULTS[fault]):
        run_stage(config, run)
    assert not run.path("verify").exists()


class Scores:
    """Plays a model whose keys have a bias, which a softmax takes away; it takes a tensor that nothing uses."""

    def logits(self, batch, given=()):
        bias, scale = (given[name] if name in given else np.ones(1) for name in ("k.bias", "k.s_out"))
        scores = batch["scores"] * scale + bias
        return np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()


def test_a_tensor_whose_effect_cancels_is_in_use_and_one_that_is_zero_or_not_wired_is_not():
    batch = {"scores": np.array([1.0, 2.0, 4.0])}
    full = Scores().logits(batch, {})
    assert np.array_equal(Scores().logits(batch, {"k.bias": np.zeros(1)}), full)
    assert stage._idle(Scores(), batch, {"k.bias": np.ones(1), "unused": np.ones(1)}) == ["unused"]
    assert stage._idle(Scores(), batch, {"k.bias": np.zeros(1), "unused.bias": np.zeros(1)}) == ["unused.bias"]
    zero = {"scores": np.zeros(3)}  # for which the scale makes no difference
    assert stage._idle(Scores(), zero, {"k.s_out": np.ones(1)}) == []
    assert stage._idle(Scores(), zero, {"k.s_out": np.zeros(1)}) == ["k.s_out"]


def test_wrong_int8_kernel_is_found(tiny, monkeypatch):
    """With PyTorch's own rounding switched off nothing but the floor is allowed, so our int8 noise must miss."""
    config, run = tiny
    monkeypatch.setattr(parity, "int8_activations", lambda model: __import__("contextlib").nullcontext())
    with pytest.raises(VerifyError, match="int8 activations against PyTorch"):
        run_stage(config, run)


@pytest.mark.parametrize(
    "bad", [np.array([1, np.nan]), np.array([np.inf, 2]), np.array([1.0]), np.array([1, 2.01])], ids=str
)
def test_comparer_fails_on(bad):
    rows = parity.differences({"layer": bad}, {"layer": np.array([1.0, 2.0])}, 1e-3)
    with pytest.raises(VerifyError, match="starts in layer"):
        parity.require("test", rows, "")


# --- what is not on every machine: the emulator and the library, each played by something else ---


class Here:
    """Plays the emulator with this machine's Python; `spoil` changes the arrays it hands back."""

    def __init__(self, spoil=None):
        self.spoil = spoil

    def python(self, cpu, argv, onnxruntime):
        if self.spoil == "dies":
            raise TargetError(f"emulated {cpu}: died with SIGILL")
        subprocess.run([sys.executable, *argv], check=True)
        if self.spoil:
            for model in argv[3:]:
                path = model.replace(".onnx", ".npz")
                with np.load(path) as arrays:
                    wrong = {n: a * np.float32(self.spoil) for n, a in arrays.items() if n.endswith("/logits")}
                    np.savez(path, **{**arrays, **wrong})


@pytest.fixture
def emulated(monkeypatch):
    """Give the target rpi4 an emulator that is this machine."""

    def install(machine):
        monkeypatch.setattr(emulator, "available", lambda: machine)
        monkeypatch.setattr(compile, "cross_library", lambda _, dest: shutil.copy(compile.host_library(), dest))

    return install


def test_device_is_compared(copy, emulated):
    config, run = copy
    emulated(Here())
    device = run_stage(config.replace(target="rpi4"), run)["device"]
    assert device["status"] == "passed"
    assert device["cortex-a72"]["float_error"] < 1e-6
    assert sorted(p.name for p in run.path("verify").iterdir()) == ["report.json"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [("dies", "rpi4 cannot run.*SIGILL"), (1.001, "starts in cortex-a72, float"), (np.nan, "cortex-a72.*found inf")],
)
def test_device_that_differs_is_named(copy, emulated, spoil, words):
    config, run = copy
    emulated(Here(spoil))
    with pytest.raises(VerifyError, match=words):
        run_stage(config.replace(target="rpi4"), run)


def test_a_gpu_is_compared_each_way_that_is_there(copy, monkeypatch):
    def no_webgpu(work):
        raise stage.Skipped("no WebGPU here")

    if reason := softgpu.missing():
        pytest.skip(reason)
    config, run = copy
    monkeypatch.setitem(stage.GPU_RUNS, "webgpu", no_webgpu)
    gpu = run_stage(config.replace(target="android-gpu"), run)["gpu"]
    assert gpu["status"] == "passed"
    assert gpu["webgpu_skipped"] == "no WebGPU here"
    assert 0 < gpu["vulkan_float_error"] < 1e-5
    assert 0 < gpu["vulkan_float16_error"] < 1e-2
    assert gpu["gpu"] in softgpu.available()
    monkeypatch.setattr(stage, "LOOK", "print('Adreno (TM) 740')")
    assert stage._choose_gpu() == "Adreno (TM) 740"  # preferred to a software one
    monkeypatch.setitem(stage.GPU_RUNS, "vulkan", lambda work: (0.01, 1e-5))
    with pytest.raises(VerifyError, match="logits, vulkan"):
        run_stage(config.replace(target="android-gpu"), run)


def test_without_a_compiler_the_bodies_are_verified(copy, monkeypatch):
    def no_library():
        raise TargetError("no C++ compiler")

    monkeypatch.setattr(compile, "host_library", no_library)
    report = run_stage(*copy)
    assert {name for name, f in report.items() if f["status"] == "skipped"} == {"library", "rounding", "device", "gpu"}
    assert "no C++ compiler" in report["library"]["reason"]
    assert report["effect"]["tensors_in_use"] == 28
