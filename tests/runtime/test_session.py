from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edgepeft.errors import ArtifactError, ConfigError, DataError, VerifyError
from edgepeft.runtime import classify, load, session
from edgepeft.runtime.adapters import BASE
from tests.runtime import standin as st

TEXTS = ["turn the kitchen lights off", "play", "turn on the lights please now now now", "a b", "music"]


def ids(model, text: str) -> list[int]:
    return model.tokens.encode([text])[0].ids


def assert_equals(model, tensors: dict, adapter: str | None = None) -> None:
    expected = np.stack([st.expected_logits(ids(model, text), tensors) for text in TEXTS])
    found = model.logits(TEXTS, adapter, batch_size=2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_batches_of_any_size_give_each_text_its_own_logits(sealed: Path) -> None:
    model = load(sealed)
    assert_equals(model, st.adapter_tensors(1))
    singly = np.concatenate([model.logits([text]) for text in TEXTS])
    np.testing.assert_allclose(model.logits(TEXTS, batch_size=3), singly, rtol=1e-5, atol=1e-5)


def test_classify_one_and_many(sealed: Path) -> None:
    model = load(sealed, threads=1)
    many = model.classify(TEXTS)
    assert [m.label for m in many] == [model.classify(text).label for text in TEXTS]
    first = many[0]
    assert first.score == max(first.scores.values()) == first.scores[first.label]
    assert sum(first.scores.values()) == pytest.approx(1, abs=1e-6)
    assert list(model.classify("play", top_k=2).scores) == list(model.classify("play").scores)[:2]
    assert model.classify([]) == []
    assert first.as_dict() == {"label": first.label, "score": first.score, "scores": first.scores}


def test_adapters_of_any_rank_and_head_swap(bundle: Path) -> None:
    st.write_adapter(bundle, "wide", seed=2, rank=9)
    st.write_adapter(bundle, "two", seed=3, rank=1, labels=["no", "yes"])
    st.write_adapter(bundle, "head", seed=4, **{st.A: None, st.B: None})
    model = load(bundle, adapter="wide")
    assert model.adapters == ["default", "head", "two", "wide"]
    assert model.adapter == "wide"
    assert_equals(model, st.adapter_tensors(2, rank=9))
    assert_equals(model, st.adapter_tensors(3, rank=1, labels=2), "two")
    assert model.classify("play", adapter="two").label in {"no", "yes"}
    head_only = {n: t for n, t in st.adapter_tensors(4).items() if "lora" not in n}
    assert_equals(model, head_only, "head")
    assert model.adapter == "wide"
    model.use("default")
    assert_equals(model, st.adapter_tensors(1))


@pytest.mark.parametrize("gated", [True, False])
def test_each_text_may_have_an_adapter_of_its_own(bundle: Path, monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    """With heads of other labels; in runs that all share, or where the graph has no gates in one after the other."""
    st.write_model(bundle, bundle / "adapters" / "default", gated)
    st.reseal(bundle)
    st.write_adapter(bundle, "wide", seed=2, rank=9)
    st.write_adapter(bundle, "two", seed=3, rank=1, labels=["no", "yes"])
    st.write_adapter(bundle, "head", seed=4, **{st.A: None, st.B: None})
    model, sizes, run = load(bundle), [], classify.Model._run
    names = ["two", "wide", None, BASE, "head"]

    def counted(self: classify.Model, binding: object, arrays: dict, columns: int = 0) -> np.ndarray:
        sizes.append(len(arrays["input_ids"]))
        return run(self, binding, arrays, columns)

    monkeypatch.setattr(classify.Model, "_run", counted)
    found = model.classify(TEXTS, adapter=names)
    assert sizes == ([5] if gated else [1] * 5)
    for text, name, answer in zip(TEXTS, names, found, strict=True):
        alone = model.classify(text, adapter=name)
        assert answer.label == alone.label
        assert answer.scores == pytest.approx(alone.scores, rel=1e-4)
    with pytest.raises(ConfigError, match="adapter: expected one, or one for each of 5, found 2"):
        model.classify(TEXTS, adapter=["two", "wide"])


def test_base_is_rank_zero_under_the_default_head(sealed: Path) -> None:
    model = load(sealed)
    model.base()
    assert model.adapter == BASE
    assert_equals(model, {n: t for n, t in st.adapter_tensors(1).items() if "lora" not in n})


def test_a_feed_of_the_default_equals_not_feeding_it(bundle: Path) -> None:
    st.write_adapter(bundle, "copy", seed=1)
    model = load(bundle)
    np.testing.assert_array_equal(model.logits(TEXTS, "copy"), model.logits(TEXTS, "default"))


def test_an_adapter_that_arrives_later_is_found(bundle: Path) -> None:
    model = load(bundle)
    st.write_adapter(bundle, "later", seed=5)
    model.use("later")
    assert_equals(model, st.adapter_tensors(5))


def test_swapping_takes_less_than_a_millisecond(bundle: Path) -> None:
    st.write_adapter(bundle, "other", seed=2)
    model = load(bundle)
    model.use("other")
    spent = []
    for name in ["default", "other"] * 20:
        started = time.perf_counter()
        model.use(name)
        spent.append(time.perf_counter() - started)
    assert sorted(spent)[len(spent) // 2] < 1e-3


def test_threads_with_different_adapters_do_not_disturb_each_other(bundle: Path) -> None:
    names = ["default", "other", "wide", BASE]
    st.write_adapter(bundle, "other", seed=2)
    st.write_adapter(bundle, "wide", seed=3, rank=11)
    model = load(bundle, threads=1)
    alone = {name: model.logits(TEXTS, name) for name in names}
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(30):
            if not np.allclose(model.logits(TEXTS, name), alone[name]):
                wrong.append(name)

    workers = [threading.Thread(target=work, args=(name,)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_no_core_is_kept_busy_behind_an_answer(sealed: Path) -> None:
    model = load(sealed, threads=3)
    model.logits(TEXTS)
    busy = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - busy < 0.05


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("base", {"base": "f" * 64}, f"names {'f' * 64}, this bundle's is {st.BASE_DIGEST}"),
        ("bits", {"weights": "nf4b64"}, "another --format: it names nf4b64, this bundle's is i4b32"),
        ("unsaid", {"weights": ""}, "another --format: it names none, this bundle's is i4b32"),
        ("shape", {st.A: np.zeros((4, 31), np.float16)}, r"lora_A.weight is float16\[4, 31\], expected float16"),
        ("dtype", {st.B: np.zeros((st.H, 4), np.float32)}, r"is float32\[4, 32\], expected float16"),
        ("rank", {st.B: np.zeros((st.H, 5), np.float16)}, "rank 4, its B another"),
        ("half", {st.B: None}, "rank 4, its B another"),
        ("head", {st.HEAD: None}, "classifier.weight is missing"),
        ("stray", {st.PREFIX + "clasifier.weight": np.zeros(3, np.float32)}, "Did you mean 'base_model.model.cl"),
        ("nan", {st.A: np.full((4, st.H), np.nan, np.float16)}, "not finite"),
        ("infinite", {st.B: np.full((st.H, 4), -np.inf, np.float16)}, "not finite"),
        ("infinite head", {st.HEAD: np.full((3, st.H), np.inf, np.float32)}, "not finite"),
    ],
)
def test_adapters_that_do_not_belong_are_refused(bundle: Path, name: str, change: dict, message: str) -> None:
    st.write_adapter(bundle, name, seed=2, **change)
    model = load(bundle)
    with pytest.raises(ArtifactError, match=message):
        model.use(name)
    assert model.adapter == "default"


@pytest.mark.parametrize(
    "change",
    [{"lora_alpha": 8}, {"use_dora": True}, {"use_rslora": True}, {"peft_type": "IA3"}, {"alpha_pattern": {"q": 2}}],
)
def test_adapters_whose_scale_is_not_folded_are_refused(bundle: Path, change: dict) -> None:
    folder = st.write_adapter(bundle, "raw", seed=2)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **change}
    st.write_json(folder / "adapter_config.json", config)
    with pytest.raises(ArtifactError, match="not an exported adapter"):
        load(bundle, adapter="raw")


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("adapter_config.json", [], r"adapter_config\.json: expected a JSON object, found list"),
        ("adapter_config.json", "LORA", r"adapter_config\.json: expected a JSON object, found str"),
        ("adapter_config.json", None, r"adapter_config\.json: expected a JSON object, found NoneType"),
        ("labels.json", {"a": 0, "b": 1, "c": 2}, r"labels\.json: expected a list of texts, found \{'a'"),
        ("labels.json", "abc", r"labels\.json: expected a list of texts, found 'abc'"),
        ("labels.json", ["a", "b", 3], r"labels\.json: expected a list of texts, found \['a', 'b', 3\]"),
        ("labels.json", ["a", "b", "a"], r"labels\.json: expected every label once, found 'a' twice"),
    ],
)
def test_files_of_an_adapter_with_something_else_in_them_are_refused(
    bundle: Path, file: str, value: object, message: str
) -> None:
    folder = st.write_adapter(bundle, "odd", seed=2)
    st.write_json(folder / file, value)
    with pytest.raises(ArtifactError, match=message):
        load(bundle, adapter="odd")


def test_metadata_that_is_no_object_is_refused(bundle: Path) -> None:
    path = st.write_adapter(bundle, "odd", seed=2) / "adapter_model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = {**json.loads(data[8:end]), "__metadata__": 3}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        load(bundle, adapter="odd")


def test_unknown_adapter_names_the_nearest(sealed: Path) -> None:
    with pytest.raises(ArtifactError, match="Did you mean 'default'"):
        load(sealed, adapter="defualt")
    with pytest.raises(ArtifactError, match="Did you mean 'default'"):
        load(sealed).classify("play", adapter="Default")


def test_labels_of_another_head_are_refused(bundle: Path) -> None:
    folder = st.write_adapter(bundle, "odd", seed=2)
    st.write_json(folder / "labels.json", ["only", "two"])
    with pytest.raises(ArtifactError, match="3 logits, it names 2 labels"):
        load(bundle, adapter="odd").classify("play")


@pytest.mark.parametrize("text", ["", " \n", ["play", "\t"], ["play", None], [b"play"], 3])
def test_texts_that_are_none_are_refused(sealed: Path, text) -> None:
    with pytest.raises((DataError, TypeError)):
        load(sealed).classify(text)


def test_logits_that_are_not_finite_are_an_error(bundle: Path) -> None:
    data = np.fromfile(bundle / "model.onnx.data", np.float32)
    data[:] = np.nan
    data.tofile(bundle / "model.onnx.data")
    st.reseal(bundle)
    with pytest.raises(VerifyError, match="not finite"):
        load(bundle).classify("play")


def test_long_texts_are_cut_where_training_cut_them(sealed: Path) -> None:
    model = load(sealed)
    assert len(ids(model, "play " * 100)) == 16
    np.testing.assert_array_equal(model.logits(["play " * 14]), model.logits(["play " * 100]))


def test_a_merged_bundle_has_no_adapters(bundle: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle / "model.onnx")
    for tensor in list(model.graph.initializer):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    del model.graph.input[3:]
    onnx.save(model, bundle / "model.onnx")
    st.reseal(bundle)
    merged = load(bundle)
    assert merged.adapters == []
    assert merged.classify("play").label == load(bundle).classify(["play"])[0].label
    assert_equals(merged, st.adapter_tensors(1))
    with pytest.raises(ArtifactError, match="merged"):
        merged.use("other")


def test_a_damaged_model_is_a_sentence(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"no model at all")
    st.reseal(bundle)
    with pytest.raises(ArtifactError, match="refuses the model"):
        load(bundle)


def test_another_activation_needs_the_library(sealed: Path) -> None:
    with pytest.raises(ConfigError, match="needs the op library"):
        load(sealed, library="none", activation="float")
    load(sealed, library="none", activation="int8")


@pytest.mark.parametrize("version", ["1.20.1", "1.21.0"])
def test_a_model_as_bytes_is_put_beside_its_weights_for_an_older_runtime(sealed: Path, version: str) -> None:
    with session._placed(b"other model", sealed, version) as place:
        if version != "1.20.1":
            assert place == b"other model"
            return
        assert Path(place).read_bytes() == b"other model"
        for name in ("model.onnx.data", "adapters/default/adapter_model.safetensors"):
            assert (Path(place).parent / name).read_bytes() == (sealed / name).read_bytes()
    assert not Path(place).parent.exists()
    assert (sealed / "model.onnx.data").exists()


PROBE = """
import sys, time
import numpy, onnxruntime
started = time.perf_counter()
from edgepeft.runtime import load
model = load(sys.argv[1])
model.classify("play")
print(time.perf_counter() - started)
heavy = {"torch", "transformers", "onnx", "safetensors", "peft", "click", "tqdm"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_runtime_is_light(sealed: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, str(sealed)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2
    assert "overridable" not in done.stderr.lower()
    assert "W:onnxruntime" not in done.stderr


def test_a_missing_library_is_said_once(
    sealed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("edgepeft.runtime.library.INSTALLED", Path("nowhere"))
    monkeypatch.setattr("edgepeft.runtime.session._said", set())
    for _ in range(2):
        assert load(sealed).library is None
    assert capsys.readouterr().err.count("no op library for linux-") == 1
