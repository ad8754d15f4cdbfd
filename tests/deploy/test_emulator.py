"""The command line of a device on an emulated one: the same words as on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgepeft.deploy import emulator
from edgepeft.runtime import load
from tests.runtime.writer import write_bundle

ASK = ("--prompt", "turn on the lamp", "--stream", "--max-new-tokens", "12")


def on(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgepeft.deploy.emulator", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)


@pytest.mark.skipif(bool(emulator.missing()), reason=f"no emulator: {emulator.missing()}")
def test_an_answer_is_streamed_on_an_emulated_board_as_it_is_here(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    model = load(bundle)
    here = {name: model.chat(ASK[1], adapter=name, max_new_tokens=12).text for name in ("default", "other")}
    assert here["default"] != here["other"]
    done = on("run", "cortex-a72", str(bundle), *ASK, "--adapter", "other")
    assert (done.stdout.rstrip("\n"), done.returncode) == (here["other"], 0), done.stderr


@pytest.mark.skipif(bool(emulator.missing()), reason=f"no emulator: {emulator.missing()}")
def test_mistakes_are_said(tmp_path: Path) -> None:
    for cpu, words in (("cortex-a99", "cortex-a9"), ("cortex-a72", "manifest.json")):
        done = on("run", cpu, str(tmp_path), "hello")
        assert done.returncode
        assert words in done.stderr, done.stderr
    assert on("run", "cortex-a72").returncode == 2


def test_without_an_emulator_it_says_what_to_install(tmp_path: Path) -> None:
    done = on("run", "cortex-a72", str(tmp_path), "hello", EDGEPEFT_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert "install" in done.stderr
