"""Attention on a cache inside ONNX Runtime: every kernel against the reference and ONNX Runtime's own; and refusals."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edgepeft.deploy.compile import host_library
from edgepeft.export import ops
from edgepeft.export.functions import FUNCTIONS
from tests.kernels.small_functions import CACHED, TOLERANCES, VALUES, cached

F = np.float32
OUTPUTS = FUNCTIONS[CACHED].outputs
# heads, kv_heads, tokens, tokens before in each text, width, then attributes
CASES = {
    "a token": (9, 3, 1, [200], 64, {}),
    "a token of each text": (9, 3, 1, [70, 0, 33], 64, {}),
    "a token of many heads": (14, 1, 1, [150], 32, {}),
    "a token far behind": (4, 1, 1, [300], 256, {}),
    "tokens of which some are far behind": (8, 2, 1, [300, 0, 64], 256, {}),
    "a token far behind in a window": (8, 1, 1, [400], 128, {"local_window_size": 70}),
    "no group": (2, 2, 1, [64], 80, {}),
    "a prompt": (4, 2, 150, [0], 48, {}),
    "prompts": (6, 2, 70, [0, 0], 16, {}),
    "a part of a prompt": (9, 3, 90, [75], 64, {}),
    "some tokens": (4, 4, 5, [130], 128, {}),
    "wide heads": (4, 1, 40, [30], 256, {}),
    "half rotated": (4, 2, 20, [10], 64, {"rotated": 32}),
    "a window": (4, 2, 90, [75], 32, {"local_window_size": 13}),
    "a window longer than a square": (6, 2, 20, [250], 32, {"local_window_size": 100}),
    "a window for a token": (8, 2, 1, [200, 7], 32, {"local_window_size": 20}),
    "capped scores": (4, 2, 40, [30], 32, {"softcap": 1.5}),
    "capped scores of a token in a window": (4, 2, 1, [90], 32, {"softcap": 0.5, "local_window_size": 30}),
    "its own scale": (4, 2, 9, [30], 32, {"scale": 0.0}),
}


def make(name, spare=7):
    """The inputs and attributes of a case."""
    heads, kv_heads, tokens, before, width, more = CASES[name]
    values = cached(np.random.default_rng(0), heads, kv_heads, tokens, before, width, spare)
    more = dict(more)
    for key in ("cos_cache", "sin_cache"):
        values[key] = np.ascontiguousarray(values[key][:, : more.get("rotated", width) // 2])
    more.pop("rotated", None)
    names = FUNCTIONS[CACHED].attributes
    return values, {key: VALUES[key] for key in names} | {"num_heads": heads, "kv_num_heads": kv_heads} | more


def session(values, attributes, library=True, threads=1):
    """A session of one node; inputs that are not there are left out."""
    names = [key if key in values else "" for key in FUNCTIONS[CACHED].inputs]
    node = helper.make_node(CACHED, names, OUTPUTS, "node", domain=ops.DOMAIN, **attributes)
    kinds = {key: helper.np_dtype_to_tensor_dtype(value.dtype) for key, value in values.items()}
    fed = [helper.make_tensor_value_info(k, kinds[k], [f"{k}{i}" for i in range(v.ndim)]) for k, v in values.items()]
    results = [helper.make_tensor_value_info(key, TensorProto.FLOAT, None) for key in OUTPUTS]
    imports = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    made = helper.make_model(
        helper.make_graph([node], "one", fed, results), functions=[FUNCTIONS[CACHED].proto()], opset_imports=imports,
        ir_version=ops.IR_VERSION,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if library:
        options.register_custom_ops_library(str(host_library()))
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(values, attributes, **how):
    return session(values, attributes, **how).run(None, values)


def run_in_place(values, attributes, **how):
    """Run with the presents bound to the memory of the pasts."""
    made = session(values, attributes, **how)
    mine = {key: onnxruntime.OrtValue.ortvalue_from_numpy(value.copy()) for key, value in values.items()}
    binding = made.io_binding()
    for key, value in mine.items():
        binding.bind_ortvalue_input(key, value)
    binding.bind_output("y")
    for part in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{part}", mine[f"past_{part}"])
    made.run_with_iobinding(binding)
    return [one.numpy().copy() for one in binding.get_outputs()]


def reference(values, attributes):
    return FUNCTIONS[CACHED].reference(*(values[key] for key in FUNCTIONS[CACHED].inputs), *attributes.values())


def near(found, want, values):
    limit = TOLERANCES[CACHED] * max(np.abs(values[key]).max() for key in ("k", "v", "past_value"))
    for y, exact in zip(found, want, strict=True):
        assert (y.shape, y.dtype) == (exact.shape, F)
        np.testing.assert_allclose(y, exact, rtol=0, atol=limit)


@pytest.mark.parametrize("name", CASES)
def test_every_kernel_equals_the_reference(kernel, name):
    values, attributes = make(name)
    near(run(values, attributes), reference(values, attributes), values)


@pytest.mark.parametrize("name", CASES)
def test_in_place_and_on_several_threads_it_is_the_same(name):
    values, attributes = make(name)
    apart, there = run(values, attributes), run_in_place(values, attributes, threads=3)
    np.testing.assert_array_equal(apart[0], there[0])
    for present, part, found in zip(apart[1:], ("key", "value"), there[1:], strict=True):
        for text, last in enumerate(values["seqlens_k"]):
            past = values[f"past_{part}"][text, :, last + 1 :]
            np.testing.assert_array_equal(found[text, :, : last + 1], present[text, :, : last + 1])
            np.testing.assert_array_equal(found[text, :, last + 1 :], past)  # what is behind is not touched


@pytest.mark.parametrize("name", CASES)
def test_the_body_computes_the_same(name):
    values, attributes = make(name)
    ours, stock = (run_in_place(values, attributes, library=library) for library in (True, False))
    np.testing.assert_allclose(stock[0], ours[0], rtol=0, atol=1e-5)
    for present, other in zip(ours[1:], stock[1:], strict=True):
        np.testing.assert_allclose(present, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["a part of a prompt", "a token", "wide heads"])
def test_q_k_and_v_in_one(kernel, name):
    values, attributes = make(name)
    want = run(values, attributes)
    one = {"q": np.concatenate([values[key] for key in "qkv"], axis=-1)}
    packed = {**one, **{key: value for key, value in values.items() if key not in "qkv"}}
    for y, exact in zip(run(packed, attributes), want, strict=True):
        np.testing.assert_array_equal(y, exact)


def test_texts_padded_on_the_right_go_on_one_by_one(kernel):
    """Three prompts in one run, then two tokens each: as each of them alone."""
    attributes = make("prompts")[1]
    lengths, room = [70, 41, 1], 80
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((3, 72, n)).astype(F) for n in (96, 32, 32))
    angles = rng.uniform(0, 6, (room, 8)).astype(F)
    ropes = {"cos_cache": np.cos(angles), "sin_cache": np.sin(angles)}

    def step(rows, at, ends, cache):
        total = max(ends)
        new = {name: np.stack([x[r, slice(*at[r])] for r in rows]) for name, x in (("q", q), ("k", k), ("v", v))}
        lasts = {"seqlens_k": np.array(ends, np.int32) - 1, "total_sequence_length": np.array(total, np.int32)}
        past = {"past_key": cache[0], "past_value": cache[1]}
        y, *present = run({**new, **past, **lasts, **ropes}, attributes)
        return y, present

    empty = [np.zeros((3, 2, room, 16), F)] * 2
    y, cache = step(range(3), dict.fromkeys(range(3), (0, 70)), lengths, empty)
    together = [y]
    for i in range(2):
        at = dict.fromkeys(range(3), (70 + i, 71 + i))
        y, cache = step(range(3), at, [n + 1 + i for n in lengths], cache)
        together.append(y)
    for row, length in enumerate(lengths):
        y, cache = step([row], {row: (0, length)}, [length], [one[:1] for one in empty])
        np.testing.assert_allclose(together[0][row, :length], y[0], rtol=0, atol=1e-6)
        for i in range(2):
            y, cache = step([row], {row: (70 + i, 71 + i)}, [length + 1 + i], cache)
            np.testing.assert_allclose(together[1 + i][row], y[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["a part of a prompt", "a token", "capped scores"])
def test_a_broken_query_stays_in_its_token_and_head(kernel, name, value):
    values, attributes = make(name)
    clean, width = run(values, attributes)[0], values["past_key"].shape[3]
    token = values["q"].shape[1] // 2
    values["q"][0, token, width + 3] = value  # of the second head
    y = run(values, attributes)[0]
    assert np.isnan(y[0, token, width : 2 * width]).all()
    y[0, token, width : 2 * width] = clean[0, token, width : 2 * width]
    np.testing.assert_array_equal(y, clean)


def test_a_key_that_is_not_seen_may_be_anything(kernel):
    for name in ("a window", "a window for a token", "a token of each text"):
        values, attributes = make(name)
        clean = run(values, attributes)[0]
        for part in ("past_key", "past_value"):
            for text, last in enumerate(values["seqlens_k"]):
                values[part][text, :, last + 1 :] = np.nan
                if attributes["local_window_size"] > 0:
                    first = last + 1 - values["q"].shape[1]
                    values[part][text, :, : max(0, first + 1 - attributes["local_window_size"])] = np.nan
        np.testing.assert_array_equal(run(values, attributes)[0], clean)


WRONG = {
    "q": ({"q": np.zeros((1, 9, 100), F)}, r"input 0 \(q\): expected float32 \[1,S,128\], found float32 \[1,9,100\]"),
    "k": ({"k": np.zeros((1, 8, 64), F)}, r"input 1 \(k\): expected float32 \[1,9,64\], found float32 \[1,8,64\]"),
    "v": ({"v": np.zeros((1, 9, 32), F)}, r"input 2 \(v\): expected float32 \[1,9,64\], found float32 \[1,9,32\]"),
    "width": (
        {"past_key": np.zeros((1, 2, 40, 24), F)},
        r"input 3 \(past_key\): expected float32 \[B,2,P,D\], D of 16, 32, .. 256, found float32 \[1,2,40,24\]",
    ),
    "past_value": (
        {"past_value": np.zeros((1, 2, 9, 32), F)},
        r"input 4 \(past_value\): expected float32 \[1,2,46,32\], as past_key is, found float32 \[1,2,9,32\]",
    ),
    "seqlens_k": ({"seqlens_k": np.zeros(2, np.int32)}, r"input 5 \(seqlens_k\): expected int32 \[1\], found int32"),
    "too few": (
        {"seqlens_k": np.array([7], np.int32)},
        r"input 5 \(seqlens_k\), element 0: expected 8..38 for 9 tokens, found 7",
    ),
    "too many": (
        {"seqlens_k": np.array([39], np.int32)},
        r"input 5 \(seqlens_k\), element 0: expected 8..38 for 9 tokens, found 39",
    ),
    "angles": (
        {"cos_cache": np.zeros((38, 16), F)},
        r"input 7 \(cos_cache\): expected float32 \[at least 39,8, 16, .. 16\], found float32 \[38,16\]",
    ),
    "sine": ({"sin_cache": np.zeros((41, 8), F)}, r"input 8 \(sin_cache\): expected float32 \[41,16\], as cos_cache"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_input_is_named(what):
    values, attributes = make("its own scale")
    changed, message = WRONG[what]
    with pytest.raises(Exception, match=f"{CACHED} 'node': {message}"):
        run({**values, **changed}, attributes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "attribute num_heads: expected 1 to 64 times 2, found 5"),
        ({"kv_num_heads": 0}, "attribute kv_num_heads: expected at least 1, found 0"),
        ({"do_rotary": 0}, "attribute do_rotary: expected 1, found 0"),
        ({"rotary_interleaved": 1}, "attribute rotary_interleaved: expected 0, found 1"),
    ],
)
def test_a_wrong_attribute_is_named(change, message):
    values, attributes = make("a prompt")
    with pytest.raises(Exception, match=message):
        session(values, {**attributes, **change})
