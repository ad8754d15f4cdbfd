"""The Vulkan execution provider node by node, on software GPUs, against the references of the CPU's kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepeft.deploy import gpus, shaders, softgpu
from edgepeft.deploy.compile import host_vulkan_library
from edgepeft.errors import TargetError
from edgepeft.export import ops
from edgepeft.export.branches import BRANCHES
from edgepeft.export.functions import FUNCTIONS
from edgepeft.quant.formats import FORMATS
from edgepeft.runtime import vulkan
from tests.export import test_branches as one_branch
from tests.kernels import small_functions
from tests.kernels.test_ort_op import ELEMENT, GROUPS, agree, inputs

RELATIVE = 2e-6  # what drivers may lose in exp, tanh and roots
ROUNDED = 1e-3  # of the largest output, by products of 11 bits; measured: 3e-4
# Half a minute each on a software GPU: one by default, the others in the longer run.
ONE_OF_FORMATS = [tag if tag == "i4b32" else pytest.param(tag, marks=pytest.mark.slow) for tag in FORMATS]
DRIVER = os.environ.get("EDGEPEFT_TEST_GPU") or next(iter(softgpu.DRIVERS))
ALL = 0xFF  # of the features that a GPU may have
FEATURES = {"plain": 0, "subgroups": 1, "beside": 5}  # as device.h numbers them


@pytest.fixture(scope="module")
def gpu():
    """A software GPU in this process, and the provider's library."""
    if reason := softgpu.missing():
        pytest.skip(reason)
    softgpu.use(DRIVER)
    return host_vulkan_library()


@pytest.fixture(params=FEATURES)
def features(gpu, request):
    """The GPU with some of its features alone in use."""
    code, wanted = vulkan.load_library(gpu), FEATURES[request.param]
    assert code.edgepeft_vulkan_use(wanted) == wanted, f"{vulkan.device_name(gpu)}: {vulkan.about(gpu)}"
    yield gpu
    code.edgepeft_vulkan_use(ALL)


def linear(format: str, k: int, rows: Sequence[int], values, fed: Sequence[str] = ("x",)) -> bytes:
    """Return a model of one adapted linear with its body; inputs named in `fed` are the graph's, others constants."""
    offset = len(values) > len(ops.input_names(len(rows)))
    names, outs = ops.input_names(len(rows), offset), ops.output_names(len(rows))
    pairs = dict(zip(names, values, strict=True))
    node = helper.make_node(
        ops.op_type(format, len(rows), offset),
        names,
        outs,
        "node",
        domain=ops.DOMAIN,
        **ops.attributes(k, rows, "float"),
    )
    shapes = {name: [f"{name}{i}" for i in range(value.ndim)] for name, value in pairs.items()}
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info(n, ELEMENT[pairs[n].dtype.name], shapes[n]) for n in fed],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outs],
        [numpy_helper.from_array(pairs[n], n) for n in names if n not in fed],
    )  # fmt: skip
    domains = (("", ops.OPSET), (ops.DOMAIN, ops.VERSION), ("com.microsoft", 1))
    imports = [helper.make_opsetid(*domain) for domain in domains]
    functions = [ops.function_proto(format, len(rows), offset)]
    made = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=ops.IR_VERSION)
    return made.SerializeToString()


def run_linear(gpu, format: str, k: int, rows, values, fed=("x",), precision="float32") -> list[np.ndarray]:
    session = vulkan.open_session(gpu, linear(format, k, rows, values, fed), precision)
    pairs = zip(ops.input_names(len(rows)), values, strict=False)  # w_offset, which comes last, is a constant
    return session.run(None, {name: value for name, value in pairs if name in fed})


@pytest.mark.parametrize("format", FORMATS)
def test_formats_and_groups(features, format: str) -> None:
    for groups, leading, rank in (3, (2, 1), [5, 0, 70]), (1, (40,), 8):
        rows = GROUPS[groups]
        values = inputs(format, 384, rows, leading, rank)
        agree(format, "float", rows, values, run_linear(features, format, 384, rows, values))


@pytest.mark.parametrize("format", ONE_OF_FORMATS)
def test_weights_with_offsets_alone_and_under_an_adapter(gpu, format: str) -> None:
    for m, blocks, dtype, rank in (2, 6, np.float16, [5, 70]), (40, 12, np.float32, [0, 9]), (33, 1, np.float16, 0):
        values = inputs(format, 384, [48, 16], (m,), rank, dtype, scaled=True, offset=blocks)
        found, rounded = (run_linear(gpu, format, 384, [48, 16], values, precision=kind) for kind in vulkan.PRECISIONS)
        agree(format, "float", [48, 16], values, found)
        for y, wanted in zip(rounded, found, strict=True):
            assert np.abs(y - wanted).max() <= ROUNDED * np.abs(wanted).max()


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("format", ONE_OF_FORMATS)
def test_products_in_float16_are_near_where_the_gpu_has_it_and_the_same_where_not(gpu, format: str, m: int) -> None:
    values = inputs(format, 384, [48, 16], (m,), 8)
    exact, found = (run_linear(gpu, format, 384, [48, 16], values, precision=kind) for kind in vulkan.PRECISIONS)
    has = "float16" in vulkan.about(gpu)
    for y, wanted in zip(found, exact, strict=True):
        assert np.abs(y - wanted).max() <= ROUNDED * np.abs(wanted).max()
        assert has != np.array_equal(y, wanted)


def test_large_numbers_do_not_overflow_in_float16(gpu) -> None:
    """No sum of products is beyond float16 as long as x is not."""
    values = inputs("i8c", 384, [48], (1,), 0)
    values[0] *= 6e4 / np.abs(values[0]).max()
    exact, found = (run_linear(gpu, "i8c", 384, [48], values, precision=kind)[0] for kind in vulkan.PRECISIONS)
    assert np.abs(found - exact).max() <= ROUNDED * np.abs(exact).max()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("m", [2, 33])
def test_gates_scales_and_adapters_at_run_time(gpu, m: int, dtype) -> None:
    fed = [name for name in ops.input_names(2) if name not in ("w", "w_scale")]
    for gate in ("number", "vector", "per row", "per text", "for all rows"):
        leading = (m, 3) if gate == "per text" else (m,)
        values = inputs("i4b32", 128, [32, 16], leading, 3, dtype, scaled=True, gate=gate)
        agree("i4b32", "float", [32, 16], values, run_linear(gpu, "i4b32", 128, [32, 16], values, fed))


def test_gates_of_texts_beside_a_float_linear(gpu) -> None:
    node = helper.make_node("Mul", ["low", "gate"], ["y"])
    fed = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [f"{n}{i}" for i in range(3)]) for n in node.input]
    graph = helper.make_graph([node], "g", fed, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ops.OPSET)], ir_version=ops.IR_VERSION)
    session, rng = vulkan.open_session(gpu, made.SerializeToString()), np.random.default_rng(0)
    low = rng.standard_normal((3, 4, 5), np.float32)
    for shape in (3, 1, 5), (3, 4, 5), (1, 1, 5), (1, 1, 1):
        gate = rng.standard_normal(shape, np.float32)
        np.testing.assert_allclose(session.run(None, {"low": low, "gate": gate})[0], low * gate, rtol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_small_functions(features, name: str) -> None:
    for leading, columns in ((1,), 1), ((2, 3), 30), ((33,), 896):
        packed = name in small_functions.EMBEDDINGS
        values = small_functions.inputs(name, leading, -(-columns // 128) * 128 if packed else columns)
        fed = [key for key in values if key not in ("weight", "w", "scale")]
        session = vulkan.open_session(features, small_functions.model(name, values, fed, body=True))
        found = session.run(None, {key: values[key] for key in fed})
        for y, want in zip(found, small_functions.reference(name, values), strict=True):
            size = np.abs(values["gate"] * values["up"]) if name in small_functions.GATED else None
            size = np.abs(values["x"]) if name == "ErfGelu" else size
            size = small_functions.size(name, values, want) if size is None else size
            assert np.all(np.abs(y - want) <= (0 if packed else RELATIVE) * size)


def branch_inputs(name: str, leading: tuple[int, ...], size: int) -> list[np.ndarray]:
    """Return inputs of a branch: `size` experts, rows, or numbers between down and up."""
    x = one_branch.normal(*leading, 48)
    if name == "Before":
        return [x, one_branch.normal(size, 48, seed=1)]
    if name == "RouterGate":
        return [x, one_branch.normal(max(size, 1), 48, seed=1), np.zeros((3 * size, 48), np.float16)]
    shapes = (*leading, 40), (*leading, 48), (size, 48), (size,), (40, size), (40,)
    return [one_branch.normal(*shape, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", BRANCHES)
def test_branches(gpu, name: str) -> None:
    for leading, size in ((1, 1), 1), ((3, 5), 4), ((2, 9), 0):
        values = branch_inputs(name, leading, size)
        model, fed = one_branch.model(name, values)
        found, wanted = vulkan.open_session(gpu, model).run(None, fed)[0], BRANCHES[name].reference(*values)[0]
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max(initial=0) <= 2 * one_branch.TIGHT * np.abs(wanted).max(initial=0)


# Ranks of each group, beyond those that a workgroup computes for itself; rows of x.
MANY_RANKS = [([130], 1), ([64, 0, 33], 1), ([17, 70], 7), ([300], 8)]


@pytest.mark.parametrize("ranks_last", [False, True])
@pytest.mark.parametrize(("ranks", "m"), MANY_RANKS)
def test_an_adapter_of_any_rank_takes_no_dispatch_more(gpu, ranks: list[int], m: int, ranks_last: bool) -> None:
    """Ranks that come last are waited for by every tile, and the last of them ends all."""
    code, rows = vulkan.load_library(gpu), [48, 32, 16][: len(ranks)]
    assert code.edgepeft_vulkan_use(ALL) & FEATURES["beside"] == FEATURES["beside"]
    code.edgepeft_vulkan_ranks_last(ranks_last)
    values = inputs("i4b32", 384, rows, (m,), ranks, scaled=True, gate="per row")
    fed = [name for name in ops.input_names(len(rows)) if name not in ("w", "w_scale")]
    session = vulkan.open_session(gpu, linear("i4b32", 384, rows, values, fed))
    feeds = {n: value for n, value in zip(ops.input_names(len(rows)), values, strict=True) if n in fed}
    before = vulkan.counts(gpu)
    for _ in range(3):  # what tiles and ranks tell each other in is as before
        agree("i4b32", "float", rows, values, session.run(None, feeds))
    took = vulkan.counts(gpu).since(before)
    code.edgepeft_vulkan_ranks_last(False)
    assert took.dispatches in (3, 4)  # a first run may find its memory too small
    code.edgepeft_vulkan_use(FEATURES["subgroups"])
    before = vulkan.counts(gpu)
    agree("i4b32", "float", rows, values, session.run(None, feeds))
    assert vulkan.counts(gpu).since(before).dispatches == 2  # A x before
    code.edgepeft_vulkan_use(ALL)


CLASSES = """
import numpy as np
from edgepeft.deploy import gpus
from edgepeft.runtime import vulkan
from tests.kernels.test_vulkan import DRIVER, ROUNDED, agree, host_vulkan_library, inputs, run_linear, softgpu

softgpu.use(DRIVER)
library = host_vulkan_library()
cases = [("i4b32", 1, 5), ("nf4b64", 2, 40), ("i8c", 40, 5)]
shared = [(format, rows, inputs(format, 1024, [48, 16], (rows,), rank)) for format, rows, rank in cases]
for name in ("adreno", "mali", "powervr", "other"):
    vulkan.load_library(library).edgepeft_vulkan_take_for(gpus.load_gpu(name).vendor)
    for format, rows, values in shared:
        found, rounded = (run_linear(library, format, 1024, [48, 16], values, precision=p) for p in vulkan.PRECISIONS)
        agree(format, "float", [48, 16], values, found)
        for y, wanted in zip(rounded, found, strict=True):
            assert np.abs(y - wanted).max() <= ROUNDED * np.abs(wanted).max()
    print(vulkan.about(library))
"""


def test_each_class_of_gpus_computes_its_own_way(gpu) -> None:
    about = vulkan.about(gpu)
    done = subprocess.run([sys.executable, "-c", CLASSES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        name, workgroups, *features = line.split(", ")
        kind = gpus.load_gpu(name)
        assert workgroups in (f"workgroups of {kind.threads}", "workgroups of 128")
        assert any("subgroups" in feature for feature in features) == ("subgroups" in kind.features)
        assert ("float16" in features) == ("float16" in kind.features and softgpu.DRIVERS[DRIVER].float16)
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == ["adreno", "mali", "powervr", "other"]
    assert about.startswith("software, workgroups of 64")


def test_a_driver_that_does_not_compile_a_variant_gets_the_plain_shader(gpu) -> None:
    code, values = vulkan.load_library(gpu), inputs("i4b32", 128, [16], (1,), 7)
    assert "subgroups" in vulkan.about(gpu)
    code.edgepeft_vulkan_plant(4)
    agree("i4b32", "float", [16], values, run_linear(gpu, "i4b32", 128, [16], values))
    assert "subgroups" not in vulkan.about(gpu)
    code.edgepeft_vulkan_use(ALL)


def test_a_graph_with_a_node_that_has_no_shader_is_refused_by_its_name(gpu) -> None:
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    nodes = [helper.make_node("Relu", ["x"], ["z"]), helper.make_node("Softmax", ["z"], ["y"], name="odd")]
    graph = helper.make_graph(nodes, "g", shape[:1], shape[1:])
    imports = [helper.make_opsetid("", ops.OPSET)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ops.IR_VERSION)
    with pytest.raises(TargetError, match=r"Softmax 'odd': it has no shader.*device='cpu'"):
        vulkan.open_session(gpu, model.SerializeToString())


def test_the_kept_words_are_of_these_shaders() -> None:
    assert shaders.digest() == shaders.kept_digest(), "python -m edgepeft.deploy.shaders write"
    assert sorted(shaders.words()) == shaders.names()


@pytest.mark.skipif(not shutil.which("glslc"), reason="no glslc: apt-get install glslc")
@pytest.mark.parametrize("name", shaders.names())
def test_the_compiler_makes_a_valid_shader_of_every_source(name: str) -> None:
    assert shaders.compiled(name)[:4] == shaders.words()[name][:1].tobytes()  # SPIR-V's magic number


@pytest.mark.skipif(not shutil.which("spirv-val"), reason="no spirv-val: apt-get install spirv-tools")
@pytest.mark.parametrize("name", shaders.names())
def test_the_kept_words_are_valid(name: str, tmp_path) -> None:
    (tmp_path / "shader.spv").write_bytes(shaders.words()[name].tobytes())
    shaders.validate(tmp_path / "shader.spv")
