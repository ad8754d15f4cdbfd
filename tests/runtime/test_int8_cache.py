"""Keys and values in int8: a quarter of the memory, the same whatever runs they came in, and near float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgepeft.artifact import write_tensors
from edgepeft.errors import ArtifactError, ConfigError, TargetError
from edgepeft.runtime import Generator, load
from edgepeft.runtime.rewrite import with_int8_cache
from edgepeft.runtime.session import CACHE_SCALES
from tests.runtime import writer as w
from tests.runtime.test_generate import NEW, PROMPTS, greedy

CLOSE = 0.05  # of the largest logit: what rounding to 127 steps costs this model


def scales(model: Generator) -> dict[str, np.ndarray]:
    """Return scales that hold what a model keeps of the prompts, and a quarter more."""
    tops: dict[str, np.ndarray] = {}
    for prompt in PROMPTS:
        cache = model._cache(model._get("default"), 1)
        model._run(cache, 0, np.array([model.tokens.ids(prompt)]))
        for place, view in enumerate(cache.views(0, 1)):
            name = f"past_key_values.{place // 2}.{('key', 'value')[place % 2]}"
            top = np.abs(view[0, :, : len(cache.tokens[0])]).max(1, keepdims=True)
            tops[name] = np.maximum(tops.get(name, top), top)
    return {name: (top * 1.25 / 127).astype(np.float32) for name, top in tops.items()}


@pytest.fixture
def scaled(writer_bundle: Path) -> Path:
    """A bundle that has scales."""
    write_tensors(writer_bundle / CACHE_SCALES, scales(load(writer_bundle)))
    w.reseal(writer_bundle)
    return writer_bundle


@pytest.fixture
def model(scaled: Path) -> Generator:
    return load(scaled, threads=1, kv_cache="int8")


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_logits_are_near_those_of_float_and_the_same_whatever_the_parts(
    model: Generator, scaled: Path, chunk: int
) -> None:
    ids = model.tokens.ids(PROMPTS[2])
    whole, exact = model.logits(ids), load(scaled).logits(ids)
    model.chunk = chunk
    lost = np.abs(whole - exact).max()
    # Sums in another order may round a key or a value to the next of its steps.
    np.testing.assert_allclose(model.logits(ids), whole, rtol=0, atol=0.1 * lost)
    error = lost / np.abs(exact).max()
    assert 1e-5 < error < CLOSE
    assert (whole.argmax(-1) == exact.argmax(-1)).mean() > 0.9


def test_keys_and_values_take_a_quarter(model: Generator, scaled: Path) -> None:
    sizes = []
    for one in (model, load(scaled)):
        greedy(one, PROMPTS[0])
        sizes.append(sum(view.nbytes for view in one.pool._idle[0].views(0, 1)))
    assert sizes[0] * 4 == sizes[1]


def test_batches_of_several_adapters_and_what_is_known_already(model: Generator) -> None:
    adapters = ["default", "other", "none", "other"]
    found = model.generate(PROMPTS, adapter=adapters, max_new_tokens=NEW)
    alone = [greedy(model, prompt, adapter=name) for prompt, name in zip(PROMPTS, adapters, strict=True)]
    assert [a.tokens for a in found] == [a.tokens for a in alone]
    again = greedy(model, PROMPTS[3], adapter="other")
    assert again.reused_tokens == again.prompt_tokens - 1
    assert again.tokens == alone[3].tokens


def test_only_attention_and_its_cache_change(scaled: Path) -> None:
    before = onnx.load(scaled / "model.onnx", load_external_data=False)
    wanted = scales(load(scaled))
    after = onnx.load_from_string(with_int8_cache(before.SerializeToString(), wanted))
    for node in after.graph.node:
        if node.op_type == "GroupQueryAttention":
            layer = node.name or node.input[3].split(".")[1]
            names = [f"past_key_values.{layer}.{part}:scale" for part in ("key", "value")]
            assert list(node.input[9:]) == ["", "", "", *names]
            kinds = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute[-3:]}
            assert kinds == {"k_quant_type": b"PER_CHANNEL", "v_quant_type": b"PER_CHANNEL", "kv_cache_bit_width": 8}
            assert node.domain == "com.microsoft"  # where int8 is
            del node.input[9:], node.attribute[-3:]
            node.domain = "edgepeft"
    for value in (*after.graph.input, *after.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            assert value.type.tensor_type.elem_type == onnx.TensorProto.INT8
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    found = after.graph.initializer[-len(wanted) :]
    assert {t.name.removesuffix(":scale"): onnx.numpy_helper.to_array(t).tolist() for t in found} == {
        name: array.tolist() for name, array in wanted.items()
    }
    del after.graph.initializer[-len(wanted) :]
    assert after == before


def test_what_cannot_be_is_said(writer_bundle: Path, sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="has no scales for an int8 cache"):
        load(writer_bundle, kv_cache="int8")
    with pytest.raises(ConfigError, match="its task is text-classification"):
        load(sealed, kv_cache="int8")
    with pytest.raises(ConfigError, match="unknown kind of cache 'int4'"):
        load(writer_bundle, kv_cache="int4")
    write_tensors(writer_bundle / CACHE_SCALES, scales(load(writer_bundle)))
    w.reseal(writer_bundle)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Type Error: Type 'tensor(int8)'")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(TargetError, match=r"has no int8 cache: take a newer one .*tensor\(int8\)"):
        load(writer_bundle, kv_cache="int8")
