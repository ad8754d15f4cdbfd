"""The ARM kernels on emulated CPUs: each row against the scalar one, and the op inside the device's ONNX Runtime."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgepeft.bench import instructions
from edgepeft.deploy import emulator
from edgepeft.deploy.compile import check_program, cross_library
from edgepeft.errors import TargetError
from edgepeft.export import ops
from edgepeft.export.functions import FUNCTIONS
from edgepeft.quant.formats import FORMATS
from tests.kernels import small_functions

# The row that each CPU is there to prove: the best it can run.
BEST = {"cortex-a53": "neon", "cortex-a72": "neon", "cortex-a76": "dotprod", "max": "i8mm"}
ROWS, K = (48, 32), 128

GUEST = """
import json, os, sys
import numpy, onnxruntime
folder = sys.argv[1]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
options.register_custom_ops_library(os.path.join(folder, "libedgepeft_ops.so"))
for name in json.load(open(os.path.join(folder, "cases.json"))):
    path = os.path.join(folder, name)
    session = onnxruntime.InferenceSession(path + ".onnx", options, providers=["CPUExecutionProvider"])
    feeds = dict(numpy.load(path + ".npz"))
    numpy.savez(path + ".y.npz", *session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()}))
"""


@pytest.fixture(scope="module")
def machine() -> emulator.Emulator:
    found = emulator.available()
    if found is None:
        pytest.skip(f"no emulator: {emulator.missing()}")
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return check_program("linux-aarch64", tmp_path_factory.mktemp("check") / "check")


# The Cortex-A53 runs the rows of the A72.
@pytest.mark.parametrize(
    "cpu", [pytest.param(cpu, marks=pytest.mark.slow) if cpu == "cortex-a53" else cpu for cpu in emulator.CPUS]
)
def test_the_rows_of_a_cpu_agree_with_the_scalar_ones(machine, program: Path, cpu: str) -> None:
    said = machine.run(cpu, [str(program), "--row", BEST[cpu]]).stdout
    proved = [line for line in said.splitlines() if line.startswith("ok") and line.split()[1].endswith(BEST[cpu])]
    assert len(proved) >= len(FORMATS), said
    if BEST[cpu] == "neon":
        assert sum("_int8_" not in line and "_float32_" not in line for line in proved) == 10, said
    assert "skip" not in said


@pytest.mark.parametrize("fault", ["value", "zero", "nan", "missing", "outside"])
def test_the_comparer_sees_a_planted_fault(machine, program: Path, fault: str) -> None:
    argv = [str(program), "--row", "i4b32_int8_neon", "--break", fault]
    assert machine.run("cortex-a72", argv, check=False).returncode != 0


def test_an_instruction_that_a_cpu_lacks_is_named_as_such(machine, tmp_path: Path) -> None:
    from edgepeft.deploy.compile import _compiler, _job, _link

    source = tmp_path / "dot.cc"
    source.write_text('int main() { asm volatile(".inst 0x4e829420" ::: "v0"); }\n')  # sdot v0.4s, v1.16b, v2.16b
    command = _compiler("linux-aarch64", program=True)
    program = _link(command, [_job(command, [], source)], tmp_path / "dot")
    machine.run("cortex-a76", [str(program)])
    with pytest.raises(TargetError, match="died with SIGILL: it used an instruction that this CPU does not have"):
        machine.run("cortex-a72", [str(program)])


def write_case(folder: Path, tag: str, m: int, activation: str) -> tuple[str, list[np.ndarray], list[np.ndarray]]:
    """Write a node of two groups with every input in use; returns its name, expected outputs and magnitudes."""
    from onnx import TensorProto, helper, numpy_helper

    rng, n = np.random.default_rng(m), sum(ROWS)
    packed = FORMATS[tag].quantize(rng.standard_normal((n, K), np.float32))
    inputs = [rng.standard_normal((1, m, K), np.float32), packed.w, packed.scale]
    inputs.append(rng.random(K, np.float32) + 0.5)
    for rows, rank in zip(ROWS, (4, 20), strict=True):
        inputs += [
            rng.standard_normal((rank, K)).astype(np.float16),
            rng.standard_normal((rank, rows)).astype(np.float16),
        ]
        inputs += [rng.random((1, m, rank), np.float32), rng.random(rows, np.float32) + 0.5]
        inputs += [rng.standard_normal(rows, np.float32)]
    inputs.append(rng.standard_normal((K // FORMATS[tag].act_block, n)).astype(np.float16))
    name, names, outputs = f"{tag}-{m}-{activation}", ops.input_names(2, offset=True), ops.output_names(2)
    fixed = ("w", "w_scale", "w_offset")
    values = dict(zip(names, inputs, strict=True))
    kinds = {key: helper.np_dtype_to_tensor_dtype(value.dtype) for key, value in values.items()}
    fed = [helper.make_tensor_value_info(key, kinds[key], v.shape) for key, v in values.items() if key not in fixed]
    node = helper.make_node(
        ops.op_type(tag, 2, offset=True), names, outputs, domain=ops.DOMAIN, **ops.attributes(K, ROWS, activation)
    )
    results = [helper.make_tensor_value_info(key, TensorProto.FLOAT, None) for key in outputs]
    constants = [numpy_helper.from_array(values[key], key) for key in fixed]
    graph = helper.make_graph([node], "one", fed, results, constants)
    imports = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ops.IR_VERSION)
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    np.savez(folder / f"{name}.npz", **values)
    return name, ops.reference(tag, activation, ROWS, inputs), ops.magnitude(tag, ROWS, inputs)


def write_function(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Write a node of a small function; returns its inputs."""
    values = small_functions.inputs(name, (2, 150), K)
    fixed = ("weight", "w", "scale")
    fed = [key for key in values if key not in fixed]
    (folder / f"{name}.onnx").write_bytes(small_functions.model(name, values, fed, body=True))
    np.savez(folder / f"{name}.npz", **values)
    return values


@pytest.mark.parametrize(
    ("cpu", "release"),
    [
        ("cortex-a72", emulator.SAFE),
        ("cortex-a76", emulator.NEWEST),
        pytest.param("cortex-a53", emulator.SAFE, marks=pytest.mark.slow),
        pytest.param("cortex-a72", emulator.NEWEST, marks=pytest.mark.slow),
        pytest.param("max", emulator.NEWEST, marks=pytest.mark.slow),
    ],
)
def test_the_op_in_the_devices_runtime_computes_what_the_reference_says(machine, tmp_path, cpu, release) -> None:
    cross_library("linux-aarch64", tmp_path / "libedgepeft_ops.so")
    kinds = [(tag, m, kind) for tag in FORMATS for m, kind in ((1, "int8"), (7, "int8"), (7, "float"))]
    cases = [(tag, kind, *write_case(tmp_path, tag, m, kind)) for tag, m, kind in kinds]
    functions = {name: write_function(tmp_path, name) for name in FUNCTIONS}
    (tmp_path / "cases.json").write_text(json.dumps([*(name for _, _, name, _, _ in cases), *functions]))
    machine.python(cpu, ["-c", GUEST, str(tmp_path)], onnxruntime=release)
    for tag, activation, name, expected, magnitudes in cases:
        with np.load(tmp_path / f"{name}.y.npz") as found:
            for y, want, magnitude in zip(found.values(), expected, magnitudes, strict=True):
                assert np.isfinite(y).all()
                assert np.all(np.abs(y - want) <= ops.tolerance(tag, activation, K) * magnitude), (name, cpu)
    for name, inputs in functions.items():
        with np.load(tmp_path / f"{name}.y.npz") as found:
            small_functions.agree(name, inputs, list(found.values()))


@pytest.mark.slow
@pytest.mark.parametrize("cpu", instructions.CPUS)
def test_the_op_takes_no_more_instructions_than_promised(machine, cpu: str) -> None:
    rows = instructions.count(machine, cpu)
    assert rows[0]["peer/ours"] >= instructions.BOUNDS[cpu]


def test_without_the_emulator_the_reason_is_said(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path))
    assert emulator.available() is None
    assert "qemu-user" in emulator.missing() or "emulator install" in emulator.missing()
    monkeypatch.setattr(emulator.shutil, "which", lambda name: None)
    assert "Debian package qemu-user" in emulator.missing()
