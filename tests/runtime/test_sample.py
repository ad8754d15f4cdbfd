from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgepeft.runtime import load, sample, sample_generate
from tests.runtime import writer


def imported(path: Path) -> set[str]:
    lines = path.read_text().splitlines()
    return {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}


def test_the_sample_needs_no_edgepeft_and_agrees_with_the_runtime(bundle: Path, tmp_path: Path) -> None:
    shutil.copy(sample.__file__, bundle / "sample.py")
    assert "edgepeft" not in imported(bundle / "sample.py")
    command = [sys.executable, "-I", str(bundle / "sample.py"), "turn", "the", "lights", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    shown = dict(line.split("\t") for line in done.stdout.splitlines())
    expected = load(bundle).classify("turn the lights off").scores
    assert {label: f"{score:.4f}" for label, score in expected.items()} == shown


@pytest.mark.parametrize("bos", [False, True])
def test_the_sample_that_writes_agrees_with_the_runtime(writer_bundle: Path, tmp_path: Path, bos: bool) -> None:
    shutil.copy(sample_generate.__file__, writer_bundle / "sample.py")
    writer.reseal(writer_bundle, decoder={"bos": 1, "add_bos": bos})
    assert imported(writer_bundle / "sample.py").isdisjoint({"edgepeft", "jinja2"})
    command = [sys.executable, "-I", str(writer_bundle / "sample.py"), "the", "lights"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    expected = load(writer_bundle).generate("the lights", max_new_tokens=sample_generate.MAX_NEW_TOKENS)
    assert done.stdout == expected.text + "\n"
    assert f"{len(expected.tokens)} tokens, " in done.stderr


def test_the_sample_leaves_windows_to_the_runtime_where_onnxruntime_counts_otherwise(writer_bundle: Path) -> None:
    text = Path(sample_generate.__file__).read_text()
    (writer_bundle / "sample.py").write_text(text.replace("NEW_WINDOWS = (1, 24)", "NEW_WINDOWS = (99, 0)"))
    writer.reseal(writer_bundle, decoder={"windows": [8]})
    command = [sys.executable, "-I", str(writer_bundle / "sample.py"), "the", "lights"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "use edgepeft.runtime" in done.stderr
