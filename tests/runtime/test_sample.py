from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from edgepeft.runtime import load, sample


def test_the_sample_needs_no_edgepeft_and_agrees_with_the_runtime(bundle: Path, tmp_path: Path) -> None:
    shutil.copy(sample.__file__, bundle / "sample.py")
    assert "edgepeft" not in {
        line.split()[1]
        for line in (bundle / "sample.py").read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    command = [sys.executable, "-I", str(bundle / "sample.py"), "turn", "the", "lights", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    shown = dict(line.split("\t") for line in done.stdout.splitlines())
    expected = load(bundle).classify("turn the lights off").scores
    assert {label: f"{score:.4f}" for label, score in expected.items()} == shown
