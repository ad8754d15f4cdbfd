"""The small functions inside ONNX Runtime: every kernel and the stock body against the reference; and refusals."""

import numpy as np
import onnx
import onnxruntime
import pytest

from edgepeft.deploy.compile import host_library
from edgepeft.export.functions import FUNCTIONS
from edgepeft.export.ops import DOMAIN
from tests.kernels import small_functions
from tests.kernels.small_functions import ATTENTION, EMBEDDINGS, EPSILON, GATED, NORMS, agree, inputs, model, reference

CASES = [((1,), 1), ((2, 3), 30), ((1, 5, 2), 64), ((33,), 899), ((0, 4), 128)]
F = np.float32


def session(name, values, fed=None, body=False, library=True, threads=2, saved=None, **attributes):
    """A session of one node; `fed` names the inputs that are not constants, by default all but weights.

    saved: where to write the graph as ONNX Runtime makes it.
    """
    fed = [key for key in values if key not in ("weight", "w", "scale")] if fed is None else fed
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.optimized_model_filepath = str(saved or "")
    if library:
        options.register_custom_ops_library(str(host_library()))
    made = model(name, values, fed, body, **attributes)
    return onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])


def run(name, values, **how):
    made = session(name, values, **how)
    return made.run(None, {i.name: values[i.name] for i in made.get_inputs()})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_under_every_kernel(kernel, name: str) -> None:
    for leading, columns in CASES:
        values = inputs(name, leading, -(-columns // 128) * 128 if name in EMBEDDINGS else columns)
        agree(name, values, run(name, values))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_our_library_takes_the_node_whole_and_the_body_computes_the_same(name: str, tmp_path) -> None:
    values = inputs(name, (2, 9), 384)
    with_library = run(name, values, body=True, saved=tmp_path / "ours.onnx")
    assert [(n.op_type, n.domain) for n in onnx.load(tmp_path / "ours.onnx").graph.node] == [(name, DOMAIN)]
    agree(name, values, with_library)
    stock = run(name, values, body=True, library=False, saved=tmp_path / "stock.onnx")
    assert DOMAIN not in [node.domain for node in onnx.load(tmp_path / "stock.onnx").graph.node]
    rtol, atol = (0, 0) if name in EMBEDDINGS else (1e-5, 2e-6)
    for y, ours in zip(stock, with_library, strict=True):
        np.testing.assert_allclose(y, ours, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_many_rows_are_shared_among_threads(name: str) -> None:
    values = inputs(name, (3, 301), 128)
    outputs = run(name, values, threads=3)
    agree(name, values, outputs)
    for y, alone in zip(outputs, run(name, values, threads=1), strict=True):
        np.testing.assert_array_equal(y, alone)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_input_may_come_at_run_time(name: str) -> None:
    values = inputs(name, (2, 3), 128)
    agree(name, values, run(name, values, fed=list(values)))
    agree(name, values, run(name, values, fed=list(values)[:1]))


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_single_id_gives_a_single_row(name: str) -> None:
    values = inputs(name, (), 128)
    agree(name, values, run(name, values))


@pytest.mark.parametrize("name", GATED)
def test_activations_are_exact_to_a_millionth_everywhere(kernel, name: str) -> None:
    sides = (np.linspace(-120, 90, 40_001), np.geomspace(1e-30, 100, 4_000), -np.geomspace(1e-30, 88, 4_000))
    gate = np.concatenate(sides).astype(F)
    exact = gate.astype(np.float64)
    twice = 2 * np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3) if name.endswith("tanh") else exact
    with np.errstate(over="ignore"):
        want = exact / (1 + np.exp(-twice))
    y = run(name, {"gate": gate, "up": np.ones_like(gate)})[0]
    assert (np.abs(y - want) <= 1e-6 * np.abs(want) + 5e-45).all()


@pytest.mark.parametrize("name", GATED)
def test_the_ends_of_the_activations(kernel, name: str) -> None:
    gate = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38, 0, -1000, 1000, 2, 1], F)
    up = np.array([1, 1, 1, 1, 1, 1, 1, 1, np.nan, np.inf], F)
    want = np.array([np.inf, np.nan, np.nan, 3e38, 0, 0, 0, 1000, np.nan, np.inf], F)
    np.testing.assert_array_equal(run(name, {"gate": gate, "up": up})[0], want)


def test_gelu_is_exact_to_a_millionth_everywhere(kernel) -> None:
    sides = (np.linspace(-20, 20, 40_001), np.geomspace(1e-30, 30, 4_000), -np.geomspace(1e-30, 15, 4_000))
    values = {"x": np.concatenate(sides).astype(F)}
    want = reference("ErfGelu", values)[0]
    assert (np.abs(run("ErfGelu", values)[0] - want) <= 1e-6 * np.abs(want) + 2e-44).all()


def test_the_ends_of_gelu(kernel) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38, 0, -1000, 1000, 1e-42], F)
    want = np.array([np.inf, np.nan, np.nan, 3e38, 0, 0, 0, 1000, 5e-43], F)
    np.testing.assert_array_equal(run("ErfGelu", {"x": x})[0], want)


@pytest.mark.parametrize("name", ATTENTION)
def test_padding_is_never_seen(kernel, name: str) -> None:
    values = inputs(name, (2, 70), 3 * 48)
    clean, hidden = run(name, values)[0], values["mask"] == 0
    for key in "kv":
        values[key][hidden] = 100
    np.testing.assert_array_equal(run(name, values)[0], clean)


@pytest.mark.parametrize("keys", [1, 16, 63, 64, 65, 130, 300])
def test_attention_over_any_number_of_keys(kernel, keys: int) -> None:
    values = inputs("PaddedAttention", (2, keys), 3 * 33)
    values["q"] *= 4  # so that later keys often outweigh what came before them
    agree("PaddedAttention", values, run("PaddedAttention", values))


def test_a_text_of_padding_alone_is_finite(kernel) -> None:
    values = inputs("PaddedAttention", (2, 9), 96)
    values["mask"][1] = 0
    assert np.isfinite(run("PaddedAttention", values)[0]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_query_stays_in_its_row_and_head(kernel, value: float) -> None:
    values = inputs("PaddedAttention", (1, 9), 96)
    clean = run("PaddedAttention", values)[0]
    values["q"][0, 4, 40] = value  # of the second head
    y = run("PaddedAttention", values)[0]
    assert np.isnan(y[0, 4, 32:64]).all()
    y[0, 4, 32:64] = clean[0, 4, 32:64]
    np.testing.assert_array_equal(y, clean)


@pytest.mark.parametrize("name", NORMS)
def test_what_is_not_finite_stays_so_in_its_row_alone(kernel, name: str) -> None:
    values = inputs(name, (4,), 96)
    values["x"][1, 70], values["x"][2, 95] = np.nan, np.inf
    y = run(name, values)[0]
    assert np.isnan(y[1]).all()
    assert np.isnan(y[2]).tolist() == [False] * 95 + [True]
    assert np.isfinite(y[[0, 3]]).all()


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e3, 1e25])
def test_norms_of_large_and_small_rows(kernel, scale: float) -> None:
    values = inputs("RMSNorm", (3,), 896)
    values["x"] *= F(scale)
    agree("RMSNorm", values, run("RMSNorm", values))


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - {small_functions.CACHED}))
def test_outputs_keep_the_names_of_dimensions(name: str) -> None:
    values = inputs(name, (2, 3), 128)
    first = next(iter(values))
    shape = [f"{first}0", f"{first}1", *([128] if name in EMBEDDINGS else [f"{first}2"])]
    assert [y.shape for y in session(name, values).get_outputs()] == [shape] * len(FUNCTIONS[name].outputs)


WRONG: dict[str, tuple[str, dict[str, np.ndarray], str]] = {
    "weight": (
        "RMSNorm",
        {"weight": np.zeros(5, F)},
        r"input 1 \(weight\): expected float32 \[64\], found float32 \[5\]",
    ),
    "no axis": ("RMSNorm", {"x": np.zeros((), F)}, r"input 0 \(x\): expected float32 \[..,H\], found float32 \[\]"),
    "skip": (
        "SkipRMSNorm",
        {"skip": np.zeros((1, 64), F)},
        r"input 1 \(skip\): expected float32 \[3,64\], as x is, found float32 \[1,64\]",
    ),
    "skip's weight": ("SkipRMSNorm", {"weight": np.zeros(5, F)}, r"input 2 \(weight\): expected float32 \[64\]"),
    "up": (
        "GatedActivation_silu",
        {"up": np.zeros((3, 32), F)},
        r"input 1 \(up\): expected float32 \[3,64\], as gate is, found float32 \[3,32\]",
    ),
    "layer norm's bias": ("SkipLayerNorm", {"bias": np.zeros(5, F)}, r"input 3 \(bias\): expected float32 \[64\]"),
    "heads": (
        "PaddedAttention",
        {"q": np.zeros((3, 1, 64), F)},
        r"input 0 \(q\): expected float32 \[B,Q,3\*D\], D of 1..256, found float32 \[3,1,64\]",
    ),
    "k": (
        "PaddedAttention",
        {"k": np.zeros((3, 4, 64), F)},
        r"input 1 \(k\): expected float32 \[3,S,63\], found float32 \[3,4,64\]",
    ),
    "v": ("PaddedAttention", {"v": np.zeros((3, 5, 63), F)}, r"input 2 \(v\): expected float32 \[3,4,63\], as k is"),
    "mask": ("PaddedAttention", {"mask": np.zeros((3, 5), np.int64)}, r"input 3 \(mask\): expected int64 \[3,4\]"),
    "rows": (
        "RowEmbedding_i4b32",
        {"w": np.zeros((40, 40), np.uint8)},
        r"input 1 \(w\): expected uint8 \[V,K\*4/8\] with K a multiple of 32, found uint8 \[40,40\]",
    ),
    "rows' scale": (
        "RowEmbedding_i8b32",
        {"scale": np.zeros((40, 1), np.float16)},
        r"input 2 \(scale\): expected \[40,2\], found float16 \[40,1\]",
    ),
    "rows' ids": (
        "RowEmbedding_i8b32",
        {"ids": np.array([0, 40])},
        r"input 0 \(ids\), element 1: expected 0..39, found 40",
    ),
    "w": (
        "PackedEmbedding_i4b32",
        {"w": np.zeros((2, 3, 512), np.uint8)},
        r"input 1 \(w\): expected uint8 \[T,K/32,256\] with K a multiple of 32, found uint8 \[2,3,512\]",
    ),
    "K": (
        "PackedEmbedding_nf4b64",
        {"w": np.zeros((2, 3, 256), np.uint8)},
        r".*with K a multiple of 64, found uint8 \[2,3,256\]",
    ),
    "scale": (
        "PackedEmbedding_i8c",
        {"scale": np.zeros((2, 1, 16), F)},
        r"input 2 \(scale\): expected \[3,1,16\], found float32 \[2,1,16\]",
    ),
    "ids": (
        "PackedEmbedding_i4b64",
        {"ids": np.array([0, 47, 48])},
        r"input 0 \(ids\), element 2: expected 0..47, found 48",
    ),
    "negative": (
        "PackedEmbedding_i8c",
        {"ids": np.array([-1])},
        r"input 0 \(ids\), element 0: expected 0..47, found -1",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_input_is_named(what: str) -> None:
    name, changed, message = WRONG[what]
    with pytest.raises(Exception, match=f"{name} 'node': {message}"):
        run(name, {**inputs(name, (3,), 64), **changed})


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_needs_its_epsilon(name: str) -> None:
    with pytest.raises(Exception, match="epsilon"):
        session(name, inputs(name, (3,), 64), other=1.0)


def test_a_rows_epsilon_counts() -> None:
    values = {"x": np.full((1, 64), 1e-4, F), "weight": np.ones(64, F)}
    assert run("RMSNorm", values)[0][0, 0] == pytest.approx(1e-4 / (1e-8 + EPSILON) ** 0.5)
    assert reference("RMSNorm", values)[0][0, 0] == pytest.approx(1e-4 / (1e-8 + EPSILON) ** 0.5)


def test_kernels_are_listed_and_forced_by_name(library) -> None:
    rows = library.edgepeft_kernels().decode().split()
    functions = ("rms_norm", "layer_norm", "gelu", "gated_silu", "gated_gelu_tanh", "packed_embedding", "row_embedding")
    for function in (*functions, "attention", "extend_cache", "cached_attention"):
        assert f"{function}_scalar" in rows
        assert library.edgepeft_force_kernel(f"{function}_scalar".encode()) == 0
    assert library.edgepeft_force_kernel(None) == 0
