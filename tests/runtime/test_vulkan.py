"""Bundles on Vulkan: the CPU's own graph, every node on the GPU in one submit; adapters, caches, and no GPU."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgepeft.artifact import write_json, write_tensors
from edgepeft.deploy import softgpu
from edgepeft.deploy.compile import host_vulkan_library
from edgepeft.errors import ConfigError, TargetError
from edgepeft.runtime import load, vulkan
from edgepeft.runtime.adapters import slots
from edgepeft.runtime.library import platform_tag
from tests.adapt.conformance import Subject
from tests.runtime import writer
from tests.runtime.gpus import sealed_bundle, stock_session, writing

TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order
FLOAT16_TOLERANCE = 2e-3  # of the largest logit: products, keys and values of 11 bits
KINDS = ["bert", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3"]
DISPATCHES = {"bert": 37, "llama": 23}  # of one text, and of one token, through two layers: 9 a layer for the latter


@pytest.fixture(scope="module")
def gpu() -> Path:
    """A software GPU in this process, and the provider's library."""
    if reason := softgpu.missing():
        pytest.skip(reason)
    softgpu.use(os.environ.get("EDGEPEFT_TEST_GPU", softgpu.available()[0]))
    return host_vulkan_library()


def _classified() -> dict[str, np.ndarray]:
    rng, mask = np.random.default_rng(0), np.ones((3, 9), np.int64)
    mask[1, 6:] = 0
    ids = rng.integers(5, 40, (3, 9))
    return {"input_ids": ids, "token_type_ids": np.zeros_like(ids), "attention_mask": mask}


def _runs(kind: str, session) -> list[dict[str, np.ndarray]]:
    if kind == "bert":
        return [_classified()]
    return [writing(session, 7, 0, 1), writing(session, 1, 7, 1), writing(session, 5, 4, 3)]


@pytest.mark.parametrize(("kind", "tag"), [*((kind, "i4b32") for kind in KINDS), ("llama", "nf4b64"), ("bert", "i8c")])
def test_every_node_of_the_cpus_graph_runs_there_in_one_submit(gpu, exported, kind: str, tag: str) -> None:
    folder = exported(kind, tag)
    stock, session = stock_session(folder), vulkan.open_session(gpu, folder / "model.onnx")  # refuses nodes on the CPU
    taken = {item.name for item in stock.get_inputs() + stock.get_overridable_initializers()}
    names = [item.name for item in stock.get_outputs()]
    for given in _runs(kind, stock):
        feeds = {name: array for name, array in given.items() if name in taken}
        found = session.run(names, feeds)
        before = vulkan.counts(gpu)
        found = session.run(names, feeds)
        took = vulkan.counts(gpu).since(before)
        assert took.submits == 1
        if tag == "i4b32" and given["input_ids"].shape[1] in (1, 9):
            assert took.dispatches <= DISPATCHES.get(kind, took.dispatches)
        for y, wanted in zip(found, stock.run(names, feeds), strict=True):
            assert np.abs(y - wanted).max() <= TOLERANCE * np.abs(wanted).max()


BRANCHES = [("llama", "experts"), ("bert", "houlsby"), ("bert", "prompt")]
BRANCHES += [pytest.param(*pair, marks=pytest.mark.slow) for pair in (("bert", "experts"), ("llama", "parallel"))]


@pytest.mark.parametrize(("kind", "name"), BRANCHES)
def test_routers_bottlenecks_and_rows_before_a_text_run_there(gpu, tmp_path: Path, kind: str, name: str) -> None:
    subject = Subject(tmp_path, kind)
    folder = subject.export(subject.made(name))
    stock, session = stock_session(folder), vulkan.open_session(gpu, folder / "model.onnx")
    taken = {item.name for item in stock.get_inputs() + stock.get_overridable_initializers()}
    neutral = {name: slot.empty() for name, slot in slots(stock).items() if slot.neutral}
    for given in _runs(kind, stock):
        for more in {}, neutral:
            feeds = {name: array for name, array in {**given, **more}.items() if name in taken}
            wanted = stock.run(["logits"], feeds)[0]
            assert np.abs(session.run(["logits"], feeds)[0] - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_loaded_bundle_answers_there_as_on_the_cpu(gpu, exported, tmp_path: Path, kind: str) -> None:
    bundle = sealed_bundle(exported(kind, "i4b32"), tmp_path / "bundle", kind)
    cpu, found = load(bundle, library="none"), load(bundle, device="vulkan", library=gpu)
    if kind == "llama":
        found.chunk = 4  # so that runs go on from each other
    for name in ("default", "none"):
        given = list(range(5, 17)) if kind == "llama" else ["turn off the lamp", "play a jazz in the hall please"]
        wanted = cpu.logits(given, name)
        assert np.abs(found.logits(given, name) - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    if kind == "llama":
        asked = {"prompt": ["turn on the lamp", "a", "play a song in the attic now"], "max_new_tokens": 8}
        asked |= {"adapter": ["default", "none", "default"]}
        first = cpu.generate(**asked)[0].text
        words = [
            [(answer.text, answer.finish) for answer in model.generate(**asked, stop=[first[2:4]])]
            for model in (cpu, found)
        ]
        assert words[0] == words[1]
        assert {finish for _, finish in words[0]} == {"stop", "length"}  # the others go on in a run of fewer rows


@pytest.mark.parametrize(("kind", "tokens"), [("llama", 1), ("bert", 5)])
def test_an_adapter_takes_no_dispatch_of_its_own_whatever_its_rank(gpu, exported, kind: str, tokens: int) -> None:
    """Of one token, and of the few of a short text."""
    folder = exported(kind, "i4b32")
    stock, session = stock_session(folder), vulkan.open_session(gpu, folder / "model.onnx")
    given = writing(stock, tokens, 7, 1) if kind == "llama" else {n: a[:1, :tokens] for n, a in _classified().items()}
    took, rng = {}, np.random.default_rng(0)
    for rank in (0, 4, 100):
        feeds = dict(given)
        for name, slot in slots(stock).items():
            shape = [size if isinstance(size, int) else rank for size in slot.shape]
            if slot.low_rank:
                feeds[name] = (rng.normal(size=shape) / 10).astype(slot.dtype)
            elif slot.gate:
                feeds[name] = np.ones((*(1 for _ in slot.shape[1:]), max(rank, 1)), np.float32)
        session.run(["logits"], feeds)
        before = vulkan.counts(gpu)
        found = session.run(["logits"], feeds)[0]
        took[rank] = vulkan.counts(gpu).since(before).dispatches
        wanted = stock.run(["logits"], feeds)[0]
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    assert len(set(took.values())) == 1, took


def test_bundles_with_a_library_each_share_a_process(gpu, exported, tmp_path: Path) -> None:
    texts = ["turn off the lamp", "play a jazz in the hall please"]
    for name in ("one", "other"):
        bundle = sealed_bundle(exported("bert", "i4b32"), tmp_path / name, "bert", gpu)
        model, wanted = load(bundle, device="vulkan"), load(bundle, library="none").logits(texts)
        assert np.abs(model.logits(texts) - wanted).max() <= TOLERANCE * np.abs(wanted).max()
        own = bundle / "lib" / platform_tag() / vulkan.FILE_NAME
        assert vulkan.counts(own).submits > 0  # by its own library, not by the one that came first


def test_a_long_run_is_several_submits_of_the_same_numbers(gpu, exported) -> None:
    folder, code = exported("llama", "i4b32"), vulkan.load_library(gpu)
    session = vulkan.open_session(gpu, folder / "model.onnx")
    feeds = writing(session, 7, 0, 1)
    whole, before = session.run(None, feeds), vulkan.counts(gpu)
    code.edgepeft_vulkan_split(ctypes.c_uint64(1))
    parts, took = session.run(None, feeds), vulkan.counts(gpu).since(before)
    code.edgepeft_vulkan_split(ctypes.c_uint64(8 << 30))
    assert took.submits == 10  # one for each linear, and one for what comes last
    assert all(np.array_equal(part, one) for part, one in zip(parts, whole, strict=True))


def test_float16_halves_the_cache_and_stays_near(gpu, exported, tmp_path: Path) -> None:
    bundle = sealed_bundle(exported("llama", "i4b32"), tmp_path / "bundle", "llama")
    cpu, found = load(bundle, library="none"), load(bundle, device="vulkan", library=gpu, precision="float16")
    found.chunk = 4
    for name in ("default", "none"):
        wanted = cpu.logits(list(range(5, 17)), name)
        error = np.abs(found.logits(list(range(5, 17)), name) - wanted).max() / np.abs(wanted).max()
        assert 0 < error <= FLOAT16_TOLERANCE
    assert found.generate("turn on the lamp", max_new_tokens=4).text
    assert {view.dtype.name for view in found._cache(found._get("default"), 1).views(0, 1)} == {"float16"}
    with pytest.raises(ConfigError, match="precision='float16' is for device='vulkan'"):
        load(bundle, precision="float16")
    with pytest.raises(ConfigError, match="precision: unknown precision 'half'"):
        load(bundle, device="vulkan", precision="half")


def with_prompt(bundle: Path) -> Path:
    """Give a bundle an adapter "polite": what the base keeps of five tokens, before every text."""
    model = load(bundle, library="none")
    cache, about = model._cache(model._get("none"), 1), model.manifest
    model._run(cache, 0, np.arange(20, 25)[None])
    kept = [view[:, :, :5].copy() for view in cache.views(0, 1)]
    names = [f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(kept))]
    same = {"base_digest": about["base_digest"], "format": about["format"], "activation": "float"}
    metadata = {"format": "pt", "edgepeft.base": same["base_digest"], "edgepeft.format": same["format"]}
    folder = bundle / "adapters" / "polite"
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"peft_type": "PREFIX_TUNING"})
    write_tensors(folder / "adapter_model.safetensors", {"prompt_embeddings": np.ones((1, 2), np.float32)}, metadata)
    write_tensors(folder / "terms.safetensors", dict(zip(names, kept, strict=True)), metadata)
    writer.reseal(bundle, context=64, **same)
    return bundle


@pytest.mark.parametrize("precision", vulkan.PRECISIONS)
def test_a_prompt_of_keys_and_values_stands_before_a_text_there(gpu, exported, tmp_path: Path, precision: str) -> None:
    bundle = with_prompt(sealed_bundle(exported("llama", "i4b32"), tmp_path / "bundle", "llama"))
    cpu, found = load(bundle, library="none"), load(bundle, device="vulkan", library=gpu, precision=precision)
    ids = list(range(5, 12))
    wanted, plain = cpu.logits(ids, "polite"), cpu.logits(ids, "none")
    allowed = TOLERANCE if precision == "float32" else FLOAT16_TOLERANCE
    assert np.abs(wanted - plain).max() > 10 * FLOAT16_TOLERANCE * np.abs(wanted).max()
    assert np.abs(found.logits(ids, "polite") - wanted).max() <= allowed * np.abs(wanted).max()


def test_adapters_and_the_cache_are_not_copied(gpu, exported, tmp_path: Path) -> None:
    """What a step uploads is a few hundred bytes however long the cache is: else growing it would show."""
    bundle = sealed_bundle(exported("llama", "i4b32"), tmp_path / "bundle", "llama")
    model = load(bundle, device="vulkan", library=gpu)
    model.generate("turn on the lamp", max_new_tokens=2)
    before = vulkan.counts(gpu)
    model.generate("turn on the lamp", max_new_tokens=6)
    assert vulkan.counts(gpu).since(before).copied <= 6 * (4096 + 4 * model.vocabulary)


def test_no_library_and_no_gpu_are_told_apart(gpu, sealed: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from edgepeft.runtime import session

    with pytest.raises(TargetError, match="holds no Vulkan library"):
        load(sealed, device="vulkan")
    with pytest.raises(TargetError, match="does not load here"):
        load(sealed, device="vulkan", library=tmp_path / "none.so")
    with pytest.raises(ConfigError, match="leave kv_cache='int8' out"):
        load(sealed, device="vulkan", library=gpu, kv_cache="int8")
    monkeypatch.setattr(session, "_said", set())
    assert load(sealed, device="auto", library="none").memory is None
    assert "running on the CPU" in capsys.readouterr().err


FAULTS = """
import sys
from pathlib import Path
from edgepeft.errors import TargetError
from edgepeft.runtime import load, vulkan
library, bundle, fault = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
try:
    model = load(bundle, device="vulkan", library=library)
    vulkan.load_library(library).edgepeft_vulkan_plant(fault)
    if fault == 1:
        load(bundle, device="vulkan", library=library)
    for _ in range(2):
        try:
            model.classify("turn off the lamp")
            print("ran")
        except TargetError as error:
            print(error)
except TargetError as error:
    print(error)
model = load(bundle, device="auto")
print("auto:", "the CPU" if model.memory is None else "the GPU", model.classify("turn off the lamp").label)
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (0, ["ran", "ran"]),
        (1, ["out of the GPU's memory .* bytes asked for.*device='cpu' works"]),
        (2, ["the GPU gave up: .*the GPU was lost.*device='cpu' works", "was lost in an earlier run"]),
        (3, ["device 'vulkan': (Vulkan: no driver|Vulkan's loader, .* is not installed|no GPU).*device='cpu' works"]),
    ],
)
def test_a_driver_that_fails_ends_in_a_sentence_and_the_cpu(gpu, exported, tmp_path: Path, fault: int, words) -> None:
    bundle = sealed_bundle(exported("bert", "i4b32"), tmp_path / "bundle", "bert", gpu)
    nothing = {"VK_ICD_FILENAMES": "/none.json", "VK_DRIVER_FILES": "/none.json"}
    env = {**os.environ, **(nothing if fault == 3 else softgpu.environment(softgpu.available()[0]))}
    own = bundle / "lib" / platform_tag() / vulkan.FILE_NAME
    argv = [sys.executable, "-c", FAULTS, str(own), str(bundle), str(fault)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    label = load(bundle, library="none").classify("turn off the lamp").label
    assert last == f"auto: {'the CPU' if fault else 'the GPU'} {label}"
    assert bool(re.search(f"running on the CPU: .*{words[-1]}", done.stderr)) == bool(fault)
    assert len(said) == len(words)
    for line, wanted in zip(said, words, strict=True):
        assert re.search(wanted, line)


GOING_ON = """
import sys
from edgepeft.runtime import load, vulkan
bundle, library, fault = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, said = load(bundle, device="auto"), []
for planted in (0, fault):
    vulkan.load_library(library).edgepeft_vulkan_plant(planted)
    call = getattr(model, "classify", None) or (lambda text: model.generate(text, max_new_tokens=3))
    answer = call("turn off the lamp " * (3 if planted else 1))
    print(model.memory is not None, model.adapter, getattr(answer, "label", None) or answer.tokens)
"""


@pytest.mark.parametrize("fault", [1, 2])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_gpu_that_gives_up_later_leaves_the_answer_to_the_cpu(gpu, exported, tmp_path: Path, kind, fault) -> None:
    bundle = sealed_bundle(exported(kind, "i4b32"), tmp_path / "bundle", kind, gpu)
    env = {**os.environ, **softgpu.environment(softgpu.available()[0])}
    own = bundle / "lib" / platform_tag() / vulkan.FILE_NAME
    argv = [sys.executable, "-c", GOING_ON, str(bundle), str(own), str(fault)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["True", "default"], ["False", "default"]]
    model, text = load(bundle, library="none"), "turn off the lamp " * 3
    wanted = model.classify(text).label if kind == "bert" else model.generate(text, max_new_tokens=3).tokens
    assert done.stdout.splitlines()[1].endswith(str(wanted))
    assert "going on on the CPU" in done.stderr


VALIDATED = """
import sys
from pathlib import Path
from edgepeft.runtime import load, vulkan
library = Path(sys.argv[1])
for bundle, precision in zip(sys.argv[3:], ("float16", "float32", "float16")):
    model = load(bundle, device="vulkan", library=library, precision=precision)
    model.trial()
    vulkan.load_library(library).edgepeft_vulkan_plant(int(sys.argv[2]))
    model.trial()
print("ran")
"""
LAYER = "VK_LAYER_KHRONOS_validation"


@pytest.mark.parametrize("fault", [0, 3])
def test_khronos_validation_minds_nothing_but_a_planted_error(gpu, exported, tmp_path: Path, fault: int) -> None:
    places = [os.environ.get("VK_LAYER_PATH", ""), "/usr/share/vulkan/explicit_layer.d"]
    if not any(list(Path(place).glob("VkLayer_khronos_validation.json")) for place in places if place):
        pytest.skip("no validation layer: apt-get install vulkan-validationlayers")
    bundles = [sealed_bundle(exported(kind, "i4b32"), tmp_path / kind, kind) for kind in ("bert", "llama")]
    bundles.append(bundles[-1])
    env = {**os.environ, **softgpu.environment(softgpu.available()[-1]), "VK_INSTANCE_LAYERS": LAYER}
    argv = [sys.executable, "-c", VALIDATED, str(gpu), str(fault), *map(str, bundles)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert ("VUID-" in said) == (fault == 3), said
    assert fault or done.stdout == "ran\n", said
