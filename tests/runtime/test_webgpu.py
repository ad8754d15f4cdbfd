"""Bundles on a GPU: the answers of the CPU's graph, every node on the GPU, adapters swapped, no GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgepeft.artifact import read_tensors, write_tensors
from edgepeft.bench import dispatches
from edgepeft.errors import ArtifactError, ConfigError, ModelError, TargetError
from edgepeft.export import webgpu as export
from edgepeft.runtime import webgpu
from edgepeft.runtime.adapters import DOWN, TENSORS
from tests.adapt import test_qalora as qalora
from tests.adapt.conformance import Subject
from tests.export.tiny_decoder import export_decoder
from tests.export.tiny_run import export_run, make_run
from tests.runtime.gpus import sealed_bundle, stock_session

TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order
DIGITS_TOLERANCE = 5e-3  # where adapters, here as strong as the base, come in 4-bit digits
RUNS: list = [("bert", "i4b32"), ("llama", "i4b32")]
MORE = [(kind, "i4b32") for kind in ("qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3")]
MORE += [(kind, tag) for kind in ("bert", "llama") for tag in ("i8c", "nf4b64")]
RUNS += [pytest.param(*run, marks=pytest.mark.slow) for run in MORE]


SETTINGS = {"gemma2": {"attn_logit_softcapping": 0.5}}  # low enough to change these models' answers


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """Return the exported folder of a kind and format, made once, with its graph for GPUs."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, tag: str) -> Path:
        if (kind, tag) not in made:
            place = tmp_path_factory.mktemp(f"{kind}-{tag}")
            if kind == "bert":
                made[kind, tag] = export_run(*make_run(place, format=tag))
            else:
                made[kind, tag] = export_decoder(place, kind, tag, **SETTINGS.get(kind, {})).folder
            export.write(made[kind, tag])
        return made[kind, tag]

    return make


def _classified(session, rows: int | None = None) -> tuple[dict, dict]:
    rng, mask = np.random.default_rng(0), np.ones((3, 9), np.int64)
    mask[1, 6:] = 0
    arrays = {"input_ids": rng.integers(5, 40, (3, 9)), "token_type_ids": np.zeros((3, 9), np.int64)}
    arrays["attention_mask"] = mask
    return arrays, webgpu.classifier_inputs(session, arrays, rows)


def _written(session, new: int, past: int, keep: int, capacity: int = 32) -> tuple[dict, dict]:
    rng = np.random.default_rng(new)
    ids, mask = {"input_ids": rng.integers(5, 200, (1, new))}, np.ones((1, new + past), np.int64)
    small, large = {}, {}
    for item in session.get_inputs():
        if item.name.startswith("past_key_values"):
            shape = (1, item.shape[1], past, item.shape[3])
            small[item.name] = rng.normal(size=shape).astype(np.float32)
            room = np.zeros((1, item.shape[1], capacity - past, item.shape[3]), np.float32)
            large[item.name] = np.concatenate([small[item.name], room], axis=2)
    counted = webgpu.decoder_inputs(session, mask, new, keep, capacity)
    kept = {"logits_to_keep": np.array([keep], np.int64)}
    return {**ids, **small, **kept, "attention_mask": mask}, {**ids, **large, **counted}


def _runs(kind: str, session, rows: int | None = None) -> list[tuple[dict, dict]]:
    if kind == "bert":
        return [_classified(session, rows)]
    return [_written(session, 7, 0, 1), _written(session, 1, 7, 1), _written(session, 5, 4, 3)]


@pytest.mark.parametrize(("kind", "tag"), RUNS)
def test_a_gpu_computes_what_the_cpu_does_with_every_node_on_it(gpu, exported, kind: str, tag: str) -> None:
    folder = exported(kind, tag)
    stock, session = stock_session(folder), webgpu.open_session(folder)  # refuses to place a node on the CPU
    taken = {item.name for item in stock.get_inputs() + stock.get_overridable_initializers()}
    for cpu_feeds, gpu_feeds in _runs(kind, session):
        wanted = stock.run(["logits"], {name: array for name, array in cpu_feeds.items() if name in taken})[0]
        found = session.run(["logits"], gpu_feeds)[0]
        tolerance = DIGITS_TOLERANCE if webgpu.in_digits(session) else TOLERANCE
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize(("kind", "tag"), [("bert", "i4b32"), ("llama", "i8c"), ("llama", "i4b32")])
def test_other_adapters_and_none_are_fed_packed(gpu, exported, kind: str, tag: str) -> None:
    from onnxruntime import OrtValue

    from edgepeft.runtime import adapters as ad

    folder = exported(kind, tag)
    stock, session = stock_session(folder), webgpu.open_session(folder)
    steps = bool(webgpu.in_digits(session))
    tolerance = DIGITS_TOLERANCE if steps else TOLERANCE
    assert steps == (kind == "llama" and tag == "i4b32")
    places, rng = ad.slots(stock), np.random.default_rng(1)
    assert set(webgpu.slots(session, ad.slots(session))) == set(places)
    cpu_feeds, gpu_feeds = _runs(kind, session)[0]
    answers = []
    for rank in (0, 3) if steps else (0, 6):
        arrays = {}
        for name, slot in places.items():
            shape = [size if isinstance(size, int) else rank for size in slot.shape]
            if slot.low_rank:
                arrays[name] = rng.normal(size=shape).astype(slot.dtype) * np.float16(0.1)
            elif slot.gate:
                ones = (1,) * (len(slot.shape) - 1)
                arrays[name] = rng.normal(size=(*ones, max(rank, 1))).astype(np.float32)
        values = {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        fed = webgpu.feeds(session, values)
        packed = {name: value.numpy() for name, value in fed.items()}
        answers.append(stock.run(["logits"], {**cpu_feeds, **arrays})[0])
        found = session.run(["logits"], {**gpu_feeds, **packed})[0]
        assert np.abs(found - answers[-1]).max() <= tolerance * np.abs(answers[-1]).max()
    assert np.abs(answers[0] - answers[1]).max() > 0.01
    if steps:
        about = next(iter(webgpu.in_digits(session).values()))
        more = {name: np.zeros((99, 64), np.float16) for name in arrays}
        with pytest.raises(TargetError, match="99 ranks, this graph for GPUs takes"):
            webgpu.pack_digits("linear", {**about, "groups": about["groups"][:1]}, more)


def test_an_adapter_costs_few_shaders(gpu, exported) -> None:
    with dispatches.graphs(exported("llama", "i4b32")) as made:
        found = {
            name: dispatches.per_layer(one) for name, one in zip(made, dispatches.programs(*made.values()), strict=True)
        }
    assert found == {"base": 8, "naive": 36, "ours": 11}


@pytest.mark.slow
def test_other_formats_and_encoders_take_few_shaders(gpu, exported) -> None:
    plain, encoder = dispatches.programs(exported("llama", "i8c"), exported("bert", "i4b32"))
    assert dispatches.per_layer(plain) <= 23
    assert len(encoder) <= 76


def _ranks(folder: Path) -> dict[str, int]:
    """Return {node: ranks} that a graph takes in digits."""
    model = onnx.load(str(folder / webgpu.FILE), load_external_data=False)
    found = {entry.key: entry.value for entry in model.metadata_props}
    return {node: about["ranks"] for node, about in json.loads(found[webgpu.DIGITS]).items()}


def test_a_graph_that_is_made_again_has_room_for_all_adapters(exported, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported("llama", "i4b32"), folder)
    before = _ranks(folder)
    own = read_tensors(folder / "adapters" / "default" / TENSORS)
    more = {n: np.zeros((20, a.shape[1]) if n.endswith(DOWN) else (len(a), 20), a.dtype) for n, a in own.items()}
    (folder / "adapters" / "more").mkdir()
    write_tensors(folder / "adapters" / "more" / TENSORS, more, {"format": "pt"})
    export.write(folder)
    after = _ranks(folder)
    assert set(before) == set(after)
    assert all(after[name] == 5 * before[name] for name in before)  # 20 ranks each, where there were 4


BRANCHES = [("llama", "experts"), ("llama", "houlsby")]
BRANCHES += [pytest.param("bert", name, marks=pytest.mark.slow) for name in ("experts", "parallel", "prompt", "prefix")]


@pytest.mark.parametrize(("kind", "name"), BRANCHES)
def test_experts_bottlenecks_and_rows_before_a_text_run_and_can_be_left_out(
    gpu, tmp_path: Path, kind: str, name: str
) -> None:
    from onnxruntime import OrtValue

    from edgepeft.runtime import adapters as ad

    subject = Subject(tmp_path, kind, "i4b32")
    folder = subject.export(subject.made(name))
    export.write(folder)
    stock, session = stock_session(folder), webgpu.open_session(folder)
    places = ad.slots(stock)
    assert set(webgpu.slots(session, ad.slots(session))) == set(places)
    neutral = {place: slot.empty() for place, slot in places.items() if slot.neutral}
    fed = webgpu.feeds(session, {place: OrtValue.ortvalue_from_numpy(array) for place, array in neutral.items()})
    taken = {item.name for item in stock.get_inputs() + stock.get_overridable_initializers()}
    left_out = {place: value.numpy() for place, value in fed.items()}
    for rows, cpu_more, gpu_more in ((None, {}, {}), (0, neutral, left_out)):
        cpu_feeds, gpu_feeds = _runs(kind, session, rows)[0]
        given = {place: array for place, array in {**cpu_feeds, **cpu_more}.items() if place in taken}
        wanted = stock.run(["logits"], given)[0]
        found = session.run(["logits"], {**gpu_feeds, **gpu_more})[0]
        tolerance = DIGITS_TOLERANCE if webgpu.in_digits(session) else TOLERANCE
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("kind", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_weights_with_offsets_run(gpu, tmp_path: Path, kind: str) -> None:
    subject = Subject(tmp_path, kind, "i4b64")
    folder = qalora.graph_of(subject, qalora.merged(subject)[0], tmp_path / "export")
    export.write(folder)
    stock, session = stock_session(folder), webgpu.open_session(folder)
    assert any(node.op_type.endswith("_offset") for node in onnx.load(folder / "model.onnx").graph.node)
    for cpu_feeds, gpu_feeds in _runs(kind, session)[-2:]:
        taken = {item.name for item in stock.get_inputs() + stock.get_overridable_initializers()}
        wanted = stock.run(["logits"], {name: array for name, array in cpu_feeds.items() if name in taken})[0]
        found = session.run(["logits"], gpu_feeds)[0]
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_a_tensor_that_no_shader_can_bind_is_refused(exported) -> None:
    folder = exported("llama", "i4b32")
    export.check_sizes(folder, 1)
    with pytest.raises(ModelError, match=r"a shader of this target binds 0 at most.*--embedding-format"):
        export.check_sizes(folder, 0)


def test_what_is_missing_is_said(sealed: Path, monkeypatch, capsys) -> None:
    from edgepeft.runtime import load, session

    with pytest.raises(ArtifactError, match=r"holds no graph for GPUs.*--target web"):
        load(sealed, device="webgpu", library="none")
    with pytest.raises(ConfigError, match="Did you mean 'webgpu'"):
        load(sealed, device="webgp")
    monkeypatch.setattr(session, "_said", set())
    assert not load(sealed, device="auto", library="none").gpu
    assert "running on the CPU" in capsys.readouterr().err


def test_a_gpu_that_does_not_run_the_graph_leaves_it_to_the_cpu(gpu, bundle: Path, monkeypatch, capsys) -> None:
    from edgepeft.runtime import load, session

    (bundle / webgpu.FILE).write_bytes(b"no graph")
    with pytest.raises(TargetError, match="this GPU does not run it"):
        load(bundle, device="webgpu", check="quick")
    shutil.copy(bundle / "model.onnx", bundle / webgpu.FILE)  # opens where the CPU's operators are on the GPU too
    monkeypatch.setattr(session, "_said", set())
    model = load(bundle, device="auto", library="none", check="quick")
    assert not model.gpu
    assert "running on the CPU" in capsys.readouterr().err


def test_a_node_that_is_not_on_the_gpu_is_refused(gpu, exported, tmp_path: Path) -> None:
    folder = shutil.copytree(exported("llama", "i4b32"), tmp_path / "bundle")
    shutil.copy(folder / "model.onnx", folder / webgpu.FILE)  # whose counts are the CPU's
    with pytest.raises(
        TargetError, match=r"this GPU does not run it: .*fallback to CPU EP has been explicitly disabled"
    ):
        webgpu.open_session(folder)


@pytest.mark.parametrize("said", ["the device was lost", "out of memory"])
def test_a_gpu_that_gives_up_ends_in_a_sentence_and_the_cpu(
    gpu, exported, tmp_path: Path, monkeypatch, capsys, said: str
) -> None:
    from onnxruntime import InferenceSession

    from edgepeft.runtime import load, session

    def gives_up(self, *_: object) -> None:
        raise RuntimeError(said)

    bundle = sealed_bundle(exported("bert", "i4b32"), tmp_path / "bundle", "bert")
    model, wanted = load(bundle, device="webgpu"), load(bundle, library="none").classify("turn off the lamp")
    with monkeypatch.context() as patched:
        patched.setattr(InferenceSession, "run_with_iobinding", gives_up)
        with pytest.raises(TargetError, match=rf"the GPU gave up: {said}\. device='cpu' works"):
            model.classify("turn off the lamp")
    trial = type(model).trial

    def lost(self) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(InferenceSession, "run_with_iobinding", gives_up)
            trial(self)

    monkeypatch.setattr(session, "_said", set())
    monkeypatch.setattr(type(model), "trial", lost)
    found = load(bundle, device="auto", library="none")
    assert not found.gpu
    assert found.classify("turn off the lamp").label == wanted.label
    assert f"running on the CPU: {bundle}: the GPU gave up: {said}" in capsys.readouterr().err


def test_no_provider_and_no_gpu_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / webgpu.FILE).touch()
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime_ep_webgpu", None)
    with pytest.raises(TargetError, match=r"edgepeft\[webgpu\].*device='cpu'"):
        webgpu.check(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("onnxruntime_ep_webgpu", reason="pip install 'edgepeft[webgpu]'")
    monkeypatch.setattr(webgpu, "_device", lambda: None)
    with pytest.raises(TargetError, match="no GPU was found"):
        webgpu.check(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_loaded_bundle_answers_on_a_gpu_as_on_the_cpu(gpu, exported, tmp_path: Path, kind: str) -> None:
    from edgepeft.runtime import load

    bundle = sealed_bundle(exported(kind, "i4b32"), tmp_path / "bundle", kind)
    cpu, found = load(bundle, library="none"), load(bundle, device="webgpu")
    assert (cpu.gpu, found.gpu) == (False, True)
    if kind == "llama":
        found.chunk = 4  # so that runs go on from each other
    for name in ("default", "none"):
        given = list(range(5, 17)) if kind == "llama" else ["turn off the lamp", "play a jazz in the hall please"]
        wanted = cpu.logits(given, name)
        tolerance = DIGITS_TOLERANCE if kind == "llama" and name == "default" else TOLERANCE
        assert np.abs(found.logits(given, name) - wanted).max() <= tolerance * np.abs(wanted).max()
    if kind == "llama":
        names = ["default", "none", "default"]
        asked = ["turn on the lamp", "turn on the light", "play"]  # some begin alike: keys and values are copied
        words = [
            [answer.text for answer in model.generate(asked, adapter=names, max_new_tokens=6)] for model in (cpu, found)
        ]
        assert words[0] == words[1]
    else:
        mixed = [model.classify(given, adapter=["none", "default"]) for model in (cpu, found)]
        assert [one.label for one in mixed[0]] == [one.label for one in mixed[1]]


def test_keys_and_values_stay_on_the_gpu(gpu, exported, tmp_path: Path, monkeypatch) -> None:
    from edgepeft.runtime import cache, load

    bundle = sealed_bundle(exported("llama", "i4b32"), tmp_path / "bundle", "llama")
    monkeypatch.setattr(cache, "STEP", 16)  # so that memory grows
    cpu, found = load(bundle, library="none"), load(bundle, device="webgpu")
    wanted, got = (model.generate("turn on", max_new_tokens=40, temperature=1, seed=3) for model in (cpu, found))
    assert wanted.tokens == got.tokens
    held = found.pool._idle[0]
    assert held.capacity > 32
    assert {value.device_name() for value in held.values(0, 1)} == {"webgpu"}
    assert dispatches.moved(found, 4) == dispatches.moved(found, 50) < 10 * 4 * found.vocabulary


@pytest.mark.parametrize("kind", ["bert", "llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_long_texts_are_read_as_on_the_cpu(gpu, exported, tmp_path: Path, kind: str) -> None:
    from edgepeft.runtime import load

    bundle = sealed_bundle(exported(kind, "i4b32"), tmp_path / "bundle", kind)
    cpu, found = load(bundle, library="none"), load(bundle, device="webgpu")
    given = ["turn off the lamp please " * 12] if kind == "bert" else [5 + i * 7 % 90 for i in range(60)]
    wanted = cpu.logits(given, "none")
    assert np.abs(found.logits(given, "none") - wanted).max() <= TOLERANCE * np.abs(wanted).max()
