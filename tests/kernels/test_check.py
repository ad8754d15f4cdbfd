"""The kernels of this machine: each row against the scalar one, and a comparer that notices planted faults."""

import subprocess
from pathlib import Path

import pytest

from edgepeft.deploy.compile import check_program, host_platform
from edgepeft.quant.formats import FORMATS

FAULTS = ("value", "zero", "nan", "missing", "outside")
FUNCTIONS = (
    "rms_norm", "layer_norm", "gelu", "gated_silu", "gated_gelu_tanh", "packed_embedding", "row_embedding", "attention",
    "extend_cache", "cached_attention",
)  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return check_program(host_platform(), tmp_path_factory.mktemp("check") / "check")


def check(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def test_every_row_that_runs_here_agrees_with_the_scalar_one(program):
    done = check(program)
    proved = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ok")]
    assert done.returncode == 0, done.stdout
    for tag in FORMATS:
        for activation in ("int8", "float32"):
            assert any(row.startswith(f"{tag}_{activation}_") for row in proved), (tag, activation)
    for function in FUNCTIONS:
        assert any(row.startswith(f"{function}_") and not row.endswith("_scalar") for row in proved), function
    assert any(not row.endswith("_scalar") for row in proved)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(program, fault):
    said = check(program, "--break", fault).stdout
    assert said.endswith(" failed\n")
    assert "\n0 rows proved, " in said


@pytest.mark.slow
def test_the_avx512_rows_agree_on_a_cpu_without_avx512(tmp_path):
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("the SIMDe headers are missing: Debian's libsimde-dev has them")
    done = check(check_program(host_platform(), tmp_path / "check", simde=True), "--row", "avx512vnni")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 * len(FORMATS) + len(FUNCTIONS)} rows proved, 0 failed" in done.stdout
