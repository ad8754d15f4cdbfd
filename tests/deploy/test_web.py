"""A bundle's page in a real browser, on a software GPU and without one: what Python answers, and what is said."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
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
def test_a_node_that_is_not_on_the_gpu_leaves_the_model_to_the_cpu(bundles, browsers, tmp_path: Path) -> None:
    served = Served(shader_counts.with_graph(bundles("writer").folder, tmp_path / "bundle", "cpu"))
    page = browsers("webgpu").open(served.url)
    assert page.run("model.device") == "wasm"
    assert "fallback to CPU EP has been explicitly disabled" in page.text("notes")
    page.close()
    served.stop()


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


OFFLINE = [("classifier", "wasm"), pytest.param("writer", "webgpu", marks=pytest.mark.slow)]
ANSWERS = {
    "classifier": "model.logits('turn off the lamp', {adapter: %s}).then(row => [...row])",
    "writer": "model.generate('turn on', {adapter: %s, maxNewTokens: 4}).then(found => found.tokens)",
}


@pytest.mark.parametrize(("kind", "device"), OFFLINE)
def test_all_adapters_answer_without_the_server(bundles, browsers, tmp_path: Path, kind: str, device: str) -> None:
    served = Served(shutil.copytree(bundles(kind).folder, tmp_path / "bundle"))  # of which nothing is kept yet
    page = browsers(device).open(served.url)
    page.wait("return navigator.serviceWorker.controller !== null")
    assert page.run("model.kept")
    default = page.run(ANSWERS[kind] % "'default'")
    page.go(served.url)
    fetched = page.run("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert not [name for name in fetched if name.endswith((".data", ".onnx", ".wasm", ".safetensors"))]
    served.stop()
    page.go(served.url)
    assert page.text("status").startswith("Ready")
    assert page.run("model.device") == device
    assert page.run(ANSWERS[kind] % "'default'") == default
    model = load(served.folder, library="none")
    for adapter in ("other", "none"):  # of which none was in use while the server was there
        found = page.run(ANSWERS[kind] % json.dumps(adapter))
        if kind == "classifier":
            _same(found, model.logits(["turn off the lamp"], adapter)[0])
        else:
            assert found == model.generate("turn on", adapter=adapter, max_new_tokens=4).tokens
    page.close()


def test_loading_tells_how_far_it_is(pages) -> None:
    code = """(async () => {
      const seen = [];
      const { load } = await import("/edgepeft.js");
      await (await load("/", { device: "wasm", onProgress: (at) => seen.push(at) })).close();
      return seen;
    })()"""
    seen = pages("classifier", "wasm").run(code)
    stages = [at["stage"] for at in seen]
    assert stages == sorted(stages, key=["load", "prepare", "ready"].index)
    assert set(stages) == {"load", "prepare", "ready"}
    loads = [at for at in seen if at["stage"] == "load"]
    assert {"model.onnx", "model.onnx.data"} <= {at["file"] for at in loads}
    for at, later in itertools.pairwise(loads):
        assert 0 < at["loaded"] <= at["total"]
        assert later["loaded"] > at["loaded"] or at["loaded"] == at["total"]
    assert loads[-1]["loaded"] == loads[-1]["total"]


@pytest.mark.parametrize("kind", ["classifier", pytest.param("writer", marks=pytest.mark.slow)])
def test_a_gpu_that_is_lost_is_said_and_the_cpu_goes_on(bundles, browsers, kind: str) -> None:
    model = load(bundles(kind).folder, library="none")
    wanted = (
        model.logits(TEXTS[:1], "other")[0] if kind == "classifier" else model.generate("turn on", max_new_tokens=4)
    )
    page = browsers("webgpu").open(bundles(kind).url)
    page.run("model.engine.gpu.destroy()")
    if kind == "classifier":
        page.run("model.use('other')")
        _same(page.run(f"model.logits('{TEXTS[0]}').then(row => [...row])"), wanted)
        assert page.run("model.adapter") == "other"
    else:
        assert page.run("model.generate('turn on', {maxNewTokens: 4})")["tokens"] == wanted.tokens
    assert page.run("model.device") == "wasm"
    assert "running on WebAssembly, which is slower: the run failed" in page.run("model.notes.join()")
    page.go(bundles(kind).url + "?device=webgpu")
    page.run("model.engine.gpu.destroy()")
    with pytest.raises(RuntimeError, match=r"If the GPU was lost or is full, load again, or with device 'wasm'"):
        page.run("model.classify('turn off')" if kind == "classifier" else "model.generate('turn off')")
    page.close()


def test_a_gpu_without_memory_leaves_the_model_to_the_cpu(bundles, browsers) -> None:
    full = "GPUDevice.prototype.createBuffer = () => { throw new RangeError('out of memory') };"
    page = browsers("webgpu").open(bundles("classifier").url, full)
    assert page.text("status") == "Ready, on the CPU (WebAssembly)."
    assert "this GPU does not run it" in page.text("notes")
    assert page.run("model.classify('turn off the lamp')")["label"]
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


INTERFACE = re.compile(r"export interface (\w+)(?: extends \w+)? \{(.*?)^\}", re.M | re.S)
MEMBER = re.compile(r"^  (?:readonly )?(\w+)\??[(:]", re.M)


def test_the_types_are_of_what_there_is(pages) -> None:
    text = (web.PAGE / "edgepeft.d.ts").read_text()
    members = {name: sorted(set(MEMBER.findall(body))) for name, body in INTERFACE.findall(text)}
    for kind, name in (("classifier", "Classifier"), ("writer", "Generator")):
        page = pages(kind, "wasm")
        for member in [*members["Model"], *members[name]]:
            assert page.run(f"'{member}' in model"), member
        own = "Object.getOwnPropertyNames(Object.getPrototypeOf(model)).filter(name => name != 'constructor')"
        public = set(page.run(own)) - {"prepare", "template"}
        assert public <= set(members[name]), kind
    answer = pages("writer", "wasm").run("model.generate('a', {maxNewTokens: 1})")
    assert sorted(answer) == members["Answer"]
    prediction = pages("classifier", "wasm").run("model.classify('a')")
    assert sorted(prediction) == members["Prediction"]
    code = "".join(path.read_text() for path in sorted(web.PAGE.rglob("*.js")))
    for options in ("LoadOptions", "ClassifyOptions", "GenerateOptions"):
        assert not [name for name in members[options] if not re.search(rf"\b{name}\b", code)]


USE = """
import { load, Classifier, Generator, Model, EdgePeftError } from "./edgepeft";

export async function use(show: (text: string) => void): Promise<number[]> {
  const classifier = await load<Classifier>("./", { onProgress: ({ loaded, total }) => show(String(loaded / total)) });
  const { label, scores } = await classifier.classify("a", { adapter: "other", topK: 2 });
  show(label + String(scores[label]) + classifier.notes.join());
  const one = await load("./", { device: "wasm" });
  if ("classify" in one) return [(await one.classify(["a"]))[0].score];
  for await (const piece of one.chat("a", { stream: true })) show(piece);
  return (await one.generate("a", { maxNewTokens: 3 })).tokens;
}
"""


@pytest.mark.skipif(not shutil.which("tsc"), reason="no tsc: npm install --global typescript")
def test_the_types_are_good_typescript(tmp_path: Path) -> None:
    shutil.copy(web.PAGE / "edgepeft.d.ts", tmp_path)

    def compiled(text: str) -> str:
        (tmp_path / "use.ts").write_text(text)
        command = ["tsc", "--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "use.ts"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout

    assert compiled(USE) == ""
    assert "topk" in compiled(USE.replace("topK: 2", "topk: 2"))


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
