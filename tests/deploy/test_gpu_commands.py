"""The commands as a user gives them: a web bundle and its page, a bundle for phones and its parity report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import conversations, tiny_bert, tiny_data, tiny_decoder, write_rows

from edgepeft.deploy import serve, softgpu, web
from edgepeft.runtime import load

DIGITS_TOLERANCE = 5e-3  # where a language model's adapter comes in 4-bit digits
TOLERANCE = 1e-5  # of the largest logit
TEXT = "turn on the lamp"
SETTINGS = ["--rank", "4", "--epochs", "1", "--learning-rate", "1e-2", "--adapter", "separate"]
pytestmark = pytest.mark.slow


def _edgepeft(*words: str, **variables: str) -> str:
    command = [sys.executable, "-m", "edgepeft", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the output of `edgepeft build` for a target and task, of a small seeded model, made once."""
    made: dict[tuple[str, str], Path] = {}

    def build(target: str, task: str) -> Path:
        if (target, task) not in made:
            place = tmp_path_factory.mktemp(f"{target}-{task}")
            if task == "text-generation":
                model, data = tiny_decoder(place / "model"), write_rows(place / "chats.jsonl", conversations())
            else:
                model, data = tiny_bert(place / "model"), tiny_data(place / "data")
            given = ["--model", str(model), "--data", str(data), "--task", task, "--output", str(place / "out")]
            _edgepeft("build", "--target", target, *given, *SETTINGS)
            made[target, task] = place / "out"
        return made[target, task]

    return build


def _gpu_report(output: Path) -> dict[str, Any]:
    found = json.loads((output / "verify" / "report.json").read_text())["checks"]["gpu"]
    assert found["status"] == "passed"
    assert found["nodes_on_cpu"] == 0
    assert found["gpu"] in softgpu.available()
    return found


@pytest.mark.parametrize("task", ["text-classification", "text-generation"])
def test_one_command_builds_a_web_bundle_and_another_shows_it(built, browsers, task: str) -> None:
    if reason := softgpu.missing() or web.missing():
        pytest.skip(reason)
    bundle = built("web", task) / "bundle"
    assert _gpu_report(bundle.parent)["webgpu_float_error"] <= DIGITS_TOLERANCE
    command = [sys.executable, "-m", "edgepeft", "serve", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address.startswith(f"http://{serve.HOST}:")
        page = browsers("webgpu").open(address)
        assert page.text("status") == "Ready, on the GPU (WebGPU)."
        assert page.run("crossOriginIsolated")
        model = load(bundle, library="none")
        if task == "text-generation":
            ids = model.encode(TEXT)
            found, wanted = page.run(f"model.logits({ids}).then(row => [...row])"), model.logits(ids)[-1]
        else:
            found, wanted = page.run(f"model.logits('{TEXT}').then(row => [...row])"), model.logits([TEXT])[0]
        page.run(f"document.getElementById('text').value = '{TEXT}'")
        page.run("document.getElementById('go').click()")
        page.wait(
            "return document.getElementById('output').children.length > 1 && !document.getElementById('go').disabled"
        )
        assert page.text("error") == ""
        page.close()
        server.terminate()
    allowed = DIGITS_TOLERANCE if task == "text-generation" else TOLERANCE
    assert np.abs(np.array(found) - wanted).max() <= allowed * np.abs(wanted).max()


@pytest.mark.parametrize("task", ["text-classification", "text-generation"])
def test_one_command_builds_the_vulkan_bundle_and_its_parity_report(built, task: str) -> None:
    if reason := softgpu.missing():
        pytest.skip(reason)
    output = built("android-gpu", task)
    report = _gpu_report(output)
    assert 0 < report["vulkan_float_error"] <= TOLERANCE
    assert 0 < report["vulkan_float16_error"] <= 1e-2
    assert 0 < report["webgpu_float_error"] <= DIGITS_TOLERANCE
    assert json.loads((output / "bundle" / "manifest.json").read_text())["verify"]["checks"]["gpu"] == report
    asked = ["--prompt", TEXT, "--max-new-tokens", "5"] if task == "text-generation" else [TEXT]
    software = softgpu.environment(softgpu.available()[0])
    model = load(output / "bundle", library="none")
    for device in ("vulkan", "webgpu"):
        said = _edgepeft("run", str(output / "bundle"), *asked, "--device", device, **software)
        if task == "text-generation":
            assert said.strip() == model.chat(TEXT, max_new_tokens=5).text.strip()
        else:
            assert model.classify(TEXT).label in said
