"""A bundle's page in a real browser, on a software GPU and without one: what Python answers, and what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgepeft.deploy import browser, web
from edgepeft.errors import TargetError
from edgepeft.runtime import load
from tests.deploy import shader_counts
from tests.deploy.served import Served

TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order
DIGITS_TOLERANCE = 5e-3  # where adapters, here as strong as the base, come in 4-bit digits
TEXTS = ("turn off the lamp", "Play a JAZZ in the hall, please!", "lamp " * 80)
PROMPT = "turn on the lamp in the attic and " * 2
DEVICES = ("webgpu", "wasm")
NEW, STREAMED = 4, 12  # tokens


def _same(found: list[float], wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert len(found) == len(wanted)
    assert np.abs(np.array(found) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("device", DEVICES)
def test_a_classifier_answers_as_python_does_under_every_adapter(bundles, pages, device: str) -> None:
    page, model = pages("classifier", device), load(bundles("classifier").folder, library="none")
    assert page.run("model.device") == device
    assert page.run("model.adapters") == ["default", "other"]
    for adapter in ("default", "other", "none"):
        wanted = model.logits(TEXTS, adapter)
        for text, row in zip(TEXTS, wanted, strict=True):
            about = json.dumps({"adapter": adapter})
            _same(page.run(f"model.logits({json.dumps(text)}, {about}).then(row => [...row])"), row)
    answer = model.classify(TEXTS[0], "other")
    found = page.run(f"model.classify({json.dumps(TEXTS[0])}, {{adapter: 'other'}})")
    assert (found["label"], pytest.approx(found["score"], abs=1e-5)) == (answer.label, answer.score)
    assert list(found["scores"]) == list(answer.scores)


WRITERS: list = [("writer", "wasm")]
MORE = [("writer", "webgpu"), *(("capped", device) for device in DEVICES)]
WRITERS += [pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE]


@pytest.mark.parametrize(("kind", "device"), WRITERS)
def test_a_language_model_writes_as_python_does_under_every_adapter(bundles, pages, kind: str, device: str) -> None:
    page, model = pages(kind, device), load(bundles(kind).folder, library="none")
    for adapter in ("default", "other", "before", "none"):
        about = json.dumps({"adapter": adapter, "maxNewTokens": NEW})
        ids = model.encode(PROMPT)
        assert len(ids) > 32  # from there on the provider's attention was wrong
        assert page.run(f"model.encode({json.dumps(PROMPT)})") == ids
        in_digits = device == "webgpu" and adapter in ("default", "other")
        for some in (ids[:1], ids):  # the whole is not read again to be gone on from
            found = page.run(f"model.logits({some}, {about}).then(row => [...row])")
            _same(found, model.logits(some, adapter, 1)[0], DIGITS_TOLERANCE if in_digits else TOLERANCE)
        wanted = model.generate(PROMPT, adapter=adapter, max_new_tokens=NEW)
        found = page.run(f"model.generate({json.dumps(PROMPT)}, {about})")
        assert found["tokens"] == wanted.tokens
        assert (found["text"], found["finish"]) == (wanted.text, wanted.finish)
    about = json.dumps({"adapter": "other", "maxNewTokens": NEW})
    wanted = model.chat("turn on the lamp", adapter="other", max_new_tokens=NEW)
    assert page.run(f"model.chat('turn on the lamp', {about})")["tokens"] == wanted.tokens
    collect = "(async () => { const all = []; for await (const p of %s) all.push(p); return all })()"
    options = f"{{stream: true, maxNewTokens: {STREAMED}}}"
    pieces = page.run(collect % f"model.generate('Hello', {options})")
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate("Hello", max_new_tokens=STREAMED).text


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["nf4", "experts", "houlsby"])
def test_every_kind_of_adapter_and_format_is_read(bundles, browsers, kind: str, device: str) -> None:
    page, model = browsers(device).open(bundles(kind).url), load(bundles(kind).folder, library="none")
    ids = list(range(5, 12))
    for adapter in ("default", "none"):
        wanted = model.logits(ids, adapter, 1)[0]
        tolerance = DIGITS_TOLERANCE if (device, adapter) == ("webgpu", "default") else TOLERANCE
        _same(page.run(f"model.logits({ids}, {{adapter: '{adapter}'}}).then(row => [...row])"), wanted, tolerance)
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_rows_before_a_text_are_read_and_left_out(bundles, browsers, kind: str, device: str) -> None:
    page, model = browsers(device).open(bundles(kind).url), load(bundles(kind).folder, library="none")
    assert page.run("model.device") == device
    for adapter in ("default", "none"):
        for text, row in zip(TEXTS[:2], model.logits(TEXTS[:2], adapter), strict=True):
            about = json.dumps({"adapter": adapter})
            _same(page.run(f"model.logits({json.dumps(text)}, {about}).then(row => [...row])"), row)
    assert np.abs(model.logits(TEXTS[:1], "default") - model.logits(TEXTS[:1], "none")).max() > 0.01
    page.close()


def test_keys_and_values_stay_on_the_gpu_where_they_are(pages) -> None:
    page = pages("writer", "webgpu")
    page.run("model.generate('Hello', {maxNewTokens: 2})")
    page.run("{ window.before = Object.values(model.cache.past) }")
    page.run("model.generate('Hello', {maxNewTokens: 3})")
    assert set(page.run("before.map(value => value.location)")) == {"gpu-buffer"}
    assert page.run("Object.values(model.cache.past).every((value, place) => value === before[place])")


# Of a token's layer, by how many storage buffers the GPU grants a shader; README.md says the same.
SHADERS = {12: {"base": 9, "naive": 36, "ours": 13}, 10: {"base": 9, "naive": 36, "ours": 15}}


@pytest.mark.slow
@pytest.mark.parametrize("buffers", SHADERS)
def test_an_adapter_costs_as_many_shaders_as_is_said(bundles, browsers, tmp_path: Path, buffers: int) -> None:
    found, bundle = {}, bundles("writer").folder
    wanted = load(bundle, library="none").logits([5])[0]
    for graph in SHADERS[buffers]:
        folder = bundle if graph == "ours" else shader_counts.with_graph(bundle, tmp_path / graph, graph)
        served = Served(folder)
        page = browsers("webgpu").open(served.url, shader_counts.COUNTING + shader_counts.GRANTING % buffers)
        assert page.run(shader_counts.BUFFERS) == buffers
        found[graph] = shader_counts.per_layer(page)
        if graph == "ours":
            _same(page.run("model.logits([5]).then(row => [...row])"), wanted, DIGITS_TOLERANCE)
        page.close()
        served.stop()
    assert found == SHADERS[buffers]


@pytest.mark.slow
def test_a_gpu_with_too_few_buffers_leaves_a_language_model_to_the_cpu(bundles, browsers) -> None:
    page = browsers("webgpu").open(bundles("writer").url, shader_counts.GRANTING % 8)
    assert page.run("model.device") == "wasm"
    assert "it takes 10 storage buffers a shader, here are 8" in page.text("notes")
    page.close()


def test_an_adapter_costs_few_shaders(pages) -> None:
    page = pages("writer", "webgpu")
    page.run(shader_counts.COUNTING)
    assert shader_counts.per_layer(page) <= 14


def test_an_adapter_that_came_later_is_taken_by_name(bundles, pages) -> None:
    folder, page = bundles("classifier").folder / "adapters", pages("classifier", "wasm")
    shutil.copytree(folder / "other", folder / "late")
    late, other = (page.run(f"model.classify('turn off the lamp', {{adapter: '{n}'}})") for n in ("late", "other"))
    assert late == other
    assert page.run("model.adapters") == ["default", "other"]


def test_no_gpu_is_said_and_the_cpu_taken(pages) -> None:
    page = pages("classifier", "wasm")
    assert page.text("status") == "Ready, on the CPU (WebAssembly)."
    assert "no WebGPU" in page.text("notes") or "finds no GPU" in page.text("notes")


def test_the_page_classifies_and_writes(pages) -> None:
    go = "document.getElementById('text').value = 'turn off the lamp'; document.getElementById('go').click()"
    for kind, device in (("classifier", "webgpu"), ("writer", "wasm")):
        page = pages(kind, device)
        page.run("document.getElementById('adapter').value = 'other'")
        page.run(go)
        page.wait(
            "return document.getElementById('output').children.length > 1 && !document.getElementById('go').disabled"
        )
        assert page.text("error") == ""
        assert page.run("model.adapter") == "other"
        page.run("model.use('default')")


def test_it_loads_again_without_the_server_and_only_what_changed(bundles, browsers) -> None:
    served = bundles("classifier")
    page = browsers("wasm").open(served.url)
    page.wait("return navigator.serviceWorker.controller !== null")
    before = page.run("model.classify('turn off the lamp')")
    served.stop()
    try:
        page.go(served.url)
        assert page.text("status").startswith("Ready")
        assert page.run("model.classify('turn off the lamp')") == before
    finally:
        served.again()
    page.close()


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "manifest.json", "tokenizer.json"])
def test_a_flipped_byte_is_said_on_the_page(bundles, browsers, tmp_path: Path, name: str) -> None:
    served = Served(shutil.copytree(bundles("classifier").folder, tmp_path / "bundle"))
    path = served.folder / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    page = browsers("wasm").open(served.url)
    assert page.text("status") == "It could not be loaded."
    assert f"{name} was changed" in page.text("error")
    page.close()
    served.stop()


def test_what_cannot_be_is_said(pages) -> None:
    page = pages("classifier", "wasm")
    for call, says in (
        ("model.classify('')", "text: empty"),
        ("model.use('othre')", "unknown adapter 'othre'. There are: default, other, none"),
        ("import('/edgepeft.js').then(m => m.load('/', {device: 'webgpu'}))", "'wasm' works everywhere"),
        ("import('/edgepeft.js').then(m => m.load('/nowhere/'))", "cannot be read (the server answers 404)"),
    ):
        with pytest.raises(RuntimeError) as caught:
            page.run(call)
        assert says in str(caught.value)


def test_packages_that_cannot_be_had_are_said(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path))
    assert "onnxruntime-web" in web.missing()
    assert web.main(["check"]) == TargetError.exit_code
    assert "deploy.web install" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TargetError, match="fetched by npm, which is not there"):
        web.write(tmp_path / "bundle")
    assert browser.main(["check"]) == TargetError.exit_code
    assert "deploy.browser install" in capsys.readouterr().err
