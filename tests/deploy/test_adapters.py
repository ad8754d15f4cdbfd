"""Adapters of a bundle: each source answers as its own build does, each fault leaves the bundle as it was."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import LABELS
from click.testing import CliRunner

from edgepeft.adapt import peft_files
from edgepeft.adapt.base import Base
from edgepeft.adapt.doctor import diagnose
from edgepeft.artifact import Run, digests, read_json, read_tensors, tensor_header, write_json, write_tensors
from edgepeft.cli import cli
from edgepeft.deploy import adapters as da
from edgepeft.deploy.bundle import bundle as collect
from edgepeft.errors import ArtifactError, ConfigError, EdgePeftError, VerifyError
from edgepeft.export.genai import write_onnx_adapter
from edgepeft.runtime import load
from edgepeft.runtime.manifest import check_bundle
from tests.export.tiny_run import export_run, make_run, random_adapter

TEXTS = ["turn off the lamp", "play a song in the attic now", "kill the light"]
OTHER_LABELS = [*LABELS, "nothing"]


def finish(config, run: Run, labels: list[str], **training) -> Run:
    """Export and bundle a run whose adapter is in place."""
    told = {"method": "lora", "task": config.task, "rank": 4, "max_length": 32, "model": config.model}
    training = {"labels": labels, "config": {**told, "data": config.data}, "test": {"accuracy": 0.5}, **training}
    write_json(run.path("adapter") / "training.json", training)
    export_run(config, run)
    if not run.path("verify").exists():
        run.path("verify").mkdir()
    write_json(run.path("verify") / "report.json", {"checks": {}})
    run.make("bundle", "", lambda out: collect(config, run, out))
    return run


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(config, run) with a bundle, shared: do not write into it."""
    config, run = make_run(tmp_path_factory.mktemp("first"))
    return config, finish(config, run, list(LABELS))


def sibling(first, folder: Path, name: str, labels: list[str], change=None, **how) -> Run:
    """A second build on the same packed backbone, whose random adapter `change` may change."""
    config, run = first
    shutil.copytree(run.path("quantized"), folder / name / "quantized")
    other = Run(folder / name)
    random_adapter(other, other.path("adapter"), labels=len(labels), **how)
    if change:
        change(other)
    write_json(other.folder / "run.json", {"version": 1, "stages": {}})
    return finish(config, other, labels)


@pytest.fixture(scope="module")
def second(first, tmp_path_factory):
    """Another build: rank 7, four labels."""
    return sibling(first, tmp_path_factory.mktemp("second"), "support", OTHER_LABELS, rank=7, seed=5)


@pytest.fixture
def bundle(first, tmp_path):
    """A bundle of one's own."""
    return Path(shutil.copytree(first[1].path("bundle"), tmp_path / "place" / "bundle"))


def logits(bundle: Path, adapter: str = "default") -> np.ndarray:
    return load(bundle, threads=1).logits(TEXTS, adapter)


def foreign(run: Run, folder: Path, change=None, **settings) -> Path:
    """The run's adapter as PEFT itself would have saved it: it names no base and no labels."""
    folder.mkdir(parents=True)
    tensors = {n: np.array(t) for n, t in read_tensors(run.path("adapter") / peft_files.TENSORS).items()}
    write_tensors(folder / peft_files.TENSORS, change(tensors) if change else tensors, {"format": "pt"})
    write_json(folder / "labels.json", OTHER_LABELS)
    write_json(folder / "adapter_config.json", {**read_json(run.path("adapter") / "adapter_config.json"), **settings})
    return folder


SOURCES = {
    "build": lambda run, _: run.folder,
    "trained": lambda run, _: run.path("adapter"),
    "exported": lambda run, _: run.path("export") / "adapters" / "default",
    "bundle": lambda run, _: run.path("bundle"),
    "in-bundle": lambda run, _: run.path("bundle") / "adapters" / "default",
    "peft": lambda run, place: foreign(run, place / "peft"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_answers_as_its_own_build(name, first, second, bundle, tmp_path):
    config, _ = first
    before = {adapter: logits(bundle, adapter) for adapter in ("default", "none")}
    source = SOURCES[name](second, tmp_path)
    found = da.add(bundle, source, "support", base=Path(config.model) if name == "peft" else None)
    assert (found["name"], found["rank"], found["labels"], found["default"]) == ("support", 7, 4, False)
    np.testing.assert_array_equal(logits(bundle, "support"), logits(second.path("bundle")))
    for adapter, wanted in before.items():
        np.testing.assert_array_equal(logits(bundle, adapter), wanted)
    manifest = check_bundle(bundle, "full")
    assert "adapters/support/adapter_model.safetensors" in manifest.files
    assert manifest["sizes_bytes"]["total"] == sum(entry["bytes"] for entry in manifest.files.values())
    assert load(bundle).classify(TEXTS, adapter="support")[0].label in OTHER_LABELS
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_requests_do_not_touch_each_other(second, bundle):
    da.add(bundle, second.folder)
    model = load(bundle, threads=1)
    alone = {name: logits(bundle, name) for name in ("default", "support", "none")}
    for name in ("support", "none", "default", "support", "default", "none"):
        np.testing.assert_array_equal(model.logits(TEXTS, name), alone[name])


def test_hugging_face_peft_loads_what_lies_in_the_bundle(first, second, bundle):
    import torch
    from peft import PeftModel

    from edgepeft.backbone.load import quantized_model
    from edgepeft.runtime.tokens import Tokens

    config, run = first
    da.add(bundle, foreign(second, bundle.parent / "peft"), "support", trust_base=True)
    (bundle.parent / "peft").rename(bundle.parent.parent / "peft")
    model = quantized_model(run.path("quantized"), OTHER_LABELS, config)
    model = PeftModel.from_pretrained(model, str(bundle / "adapters" / "support")).eval()
    _, arrays = next(iter(Tokens(bundle / "tokenizer.json", 32).batches(TEXTS[:1], 1)))
    with torch.no_grad():
        wanted = model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits.numpy()
    found = load(bundle, threads=1, activation="float", adapter="support").logits(TEXTS[:1])
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


# --- what is refused -------------------------------------------------------------------------------------------------


def renamed(tensors):
    return {n.replace("layer.1.", "layer.9."): t for n, t in tensors.items()}


def device(run: Run, folder: Path, change=lambda tensors: tensors, **metadata) -> Path:
    """The run's exported adapter with other tensors or metadata."""
    shutil.copytree(run.path("export") / "adapters" / "default", folder)
    path = folder / peft_files.TENSORS
    tensors = {n: np.array(t) for n, t in read_tensors(path).items()}
    write_tensors(path, change(tensors), {**tensor_header(path)[1], **metadata})
    return folder


def no_b(tensors):
    return {n: np.zeros_like(t) if ".lora_B." in n else t for n, t in tensors.items()}


FAULTS = {  # name: (folder, options, error, what is said)
    "other-base": (lambda r, f: device(r, f, **{"edgepeft.base": "0" * 64}), {"trust_base": True}, ArtifactError,
                   "made for another base: its digest is 000000000000"),
    "other-format": (lambda r, f: device(r, f, **{"edgepeft.format": "i8c"}), {}, ArtifactError,
                     "trained on i8c weights, the bundle has i4b32"),
    "no-base": (lambda r, f: foreign(r, f), {}, ArtifactError, "--base MODEL_DIR.*--trust-base"),
    "wrong-model": (lambda r, f: foreign(r, f), {"base": "other"}, ArtifactError, "made for another base"),
    "idle": (lambda r, f: device(r, f, no_b), {}, VerifyError, r"does nothing: .*zero are 13 of 28.*lora_B"),
    "nan": (lambda r, f: device(r, f, lambda t: {n: a * np.float16(np.nan) for n, a in t.items()}), {}, ArtifactError,
            "not finite"),
    "no-such-layer": (lambda r, f: device(r, f, renamed), {}, ArtifactError, "no place for it"),
    "peft-no-such-layer": (lambda r, f: foreign(r, f, renamed), {"trust_base": True}, ArtifactError, "layer.9"),
    "taken": (lambda r, f: r.folder, {"name": "default", "replace": True}, ConfigError, "the graph holds it"),
    "no-name": (lambda r, f: r.path("adapter"), {"name": None}, ConfigError, "--name NAME"),
    "odd-name": (lambda r, f: r.folder, {"name": "../x"}, ConfigError, "expected letters"),
    "reserved": (lambda r, f: r.folder, {"name": "none"}, ConfigError, "neither 'none'"),
    "labels": (lambda r, f: (foreign(r, f) / "labels.json").unlink() or f, {"trust_base": True}, ArtifactError,
               "its head has 4 labels and does not name them"),
    "unknown": (lambda r, f: f.mkdir() or f, {}, ArtifactError, "edgepeft doctor"),
    "absent": (lambda r, f: f, {}, ArtifactError, "no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_the_bundle_stays(name, second, bundle, tmp_path):
    folder, options, error, said = FAULTS[name]
    if "base" in options:
        from builders import tiny_bert

        options = {**options, "base": tiny_bert(tmp_path / "other", seed=9)}
    source, before = folder(second, tmp_path / "source"), digests(bundle)
    with pytest.raises(error, match=said):
        da.add(bundle, source, **{"name": "support", **options})
    assert digests(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_name_is_taken_again_only_when_that_is_said(first, second, bundle, tmp_path):
    da.add(bundle, second.folder, "support")
    third = sibling(first, tmp_path, "third", list(LABELS), rank=3, seed=8)
    with pytest.raises(ConfigError, match="has an adapter 'support' already; give --replace"):
        da.add(bundle, third.folder, "support")
    da.add(bundle, third.folder, "support", replace=True)
    np.testing.assert_array_equal(logits(bundle, "support"), logits(third.path("bundle")))
    assert check_bundle(bundle, "full")


def test_removing_leaves_nothing_and_never_takes_the_default(second, bundle):
    before = digests(bundle)
    da.add(bundle, second.folder, "support")
    with pytest.raises(ArtifactError, match=r"is what the graph holds .*--adapter support"):
        da.remove(bundle, "default")
    with pytest.raises(ArtifactError, match=r"unknown adapter 'suport'.*Did you mean 'support'"):
        da.remove(bundle, "suport")
    da.remove(bundle, "support")
    assert digests(bundle) == before


def test_a_merged_bundle_takes_none(first, second, bundle):
    from edgepeft.runtime import manifest as mf

    values = mf.unseal(bundle / mf.NAME)
    (bundle / mf.NAME).write_bytes(mf.seal({**values, "adapter": "merged"}))
    for ask in (lambda: da.add(bundle, second.folder, "x"), lambda: da.entries(bundle), lambda: da.remove(bundle, "x")):
        with pytest.raises(ArtifactError, match="merged into the weights"):
            ask()


# --- whole or not at all ---------------------------------------------------------------------------------------------


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def ctrl_c(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [full_disk, ctrl_c])
@pytest.mark.parametrize("where", ["write_device", "_widen", "_reseal", "smoke"])
def test_a_change_that_is_stopped_changes_nothing(where, stop, second, bundle, monkeypatch):
    before = digests(bundle)
    monkeypatch.setattr(da, where, stop)
    with pytest.raises((OSError, KeyboardInterrupt)):
        da.add(bundle, second.folder)
    assert digests(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_two_changes_at_once_are_refused(second, bundle):
    with da.changing(bundle), pytest.raises(ArtifactError, match="another change of it is under way"):
        da.add(bundle, second.folder)
    da.add(bundle, second.folder)


def test_a_killed_change_leaves_the_bundle_and_the_next_one_clears_up(second, bundle):
    before = digests(bundle)
    code = (
        "import os, signal; from pathlib import Path; from edgepeft.deploy import adapters as da\n"
        "da.smoke = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"da.add(Path({str(bundle)!r}), Path({str(second.folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert digests(bundle) == before
    da.add(bundle, second.folder)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_running_model_and_what_else_lies_there_stay(second, bundle):
    (bundle / "venv").mkdir()
    (bundle / "venv" / "python").symlink_to("nowhere")
    (bundle / "notes.txt").write_text("mine")
    model = load(bundle, threads=1)
    before = model.logits(TEXTS)
    da.add(bundle, second.folder)
    np.testing.assert_array_equal(model.logits(TEXTS), before)
    assert (bundle / "notes.txt").read_text() == "mine"
    assert os.readlink(bundle / "venv" / "python") == "nowhere"
    assert "notes.txt" not in check_bundle(bundle, "full").files


def test_a_bundle_given_as_here_is_changed_in_place(second, bundle, monkeypatch, capsys):
    monkeypatch.chdir(bundle)
    da.add(Path(), second.folder)
    assert "support" in [entry["name"] for entry in da.entries(bundle)]
    assert f'cd "{bundle}"' in capsys.readouterr().err


# --- a wider graph ---------------------------------------------------------------------------------------------------


def dora_with_biases(run: Run) -> None:
    """Make the run's adapter a DoRA with trained biases."""
    path = run.path("adapter")
    about = read_json(run.path("quantized") / "quantized.json")
    weights = read_tensors(run.path("quantized") / "weights.safetensors")
    rng = np.random.default_rng(3)
    tensors = {n: np.array(t) for n, t in read_tensors(path / peft_files.TENSORS).items()}
    for layer in [*about["layers"], *about["kept"]]:
        if layer["kind"] == "linear":
            name, rows = f"base_model.model.{layer['name']}", layer["shape"][0]
            tensors[f"{name}.lora_magnitude_vector"] = rng.uniform(1, 3, rows).astype(np.float32)
            bias = np.array(weights[f"{layer['name']}.bias"])[:rows]
            tensors[f"{name}.base_layer.bias"] = bias + rng.normal(size=rows).astype(np.float32) * np.float32(0.1)
    settings = {**read_json(path / "adapter_config.json"), "use_dora": True, "bias": "all"}
    peft_files.write(path, settings, tensors, about["base_digest"], about["format"])


@pytest.fixture(scope="module")
def wide(first, tmp_path_factory):
    """A build whose graph has scales and biases as inputs."""
    return sibling(first, tmp_path_factory.mktemp("wide"), "wide", list(LABELS), dora_with_biases, rank=2, seed=6)


def test_a_graph_is_widened_and_computes_what_a_build_would(second, wide, bundle, capsys):
    da.add(bundle, second.folder)
    before = {name: logits(bundle, name) for name in ("default", "none", "support")}
    da.add(bundle, wide.folder)
    assert "inputs were added to model.onnx" in capsys.readouterr().err
    np.testing.assert_array_equal(logits(bundle, "wide"), logits(wide.path("bundle")))
    for name, wanted in before.items():
        np.testing.assert_array_equal(logits(bundle, name), wanted)
    for activation, library in (("float", "auto"), (None, "none")):
        found, wanted = (
            load(b, threads=1, activation=activation, library=library).logits(TEXTS, name)
            for b, name in ((bundle, "wide"), (wide.path("bundle"), "default"))
        )
        np.testing.assert_array_equal(found, wanted)
    assert check_bundle(bundle, "full")
    assert da.details(bundle, "wide")["others"]


def with_tables(run: Run) -> None:
    """Let the run's adapter adapt the words' and the types' embeddings too, one packed and one in float."""
    path, rng = run.path("adapter"), np.random.default_rng(4)
    about = read_json(run.path("quantized") / "quantized.json")
    tensors = {n: np.array(t) for n, t in read_tensors(path / peft_files.TENSORS).items()}
    rank = next(len(array) for name, array in tensors.items() if name.endswith("lora_A.weight"))
    for part in [*about["layers"], *about["kept"]]:
        if part["name"].endswith(("word_embeddings", "token_type_embeddings")):
            name, (v, k) = f"base_model.model.{part['name']}.lora_embedding_", part["shape"]
            tensors |= {f"{name}A": rng.normal(size=(rank, v)), f"{name}B": rng.normal(size=(k, rank))}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    settings = read_json(path / "adapter_config.json")
    targets = [*settings["target_modules"], "word_embeddings", "token_type_embeddings"]
    peft_files.write(path, {**settings, "target_modules": targets}, tensors, about["base_digest"], about["format"])


@pytest.fixture(scope="module")
def tables(first, tmp_path_factory):
    """A build whose adapter adapts embeddings."""
    return sibling(first, tmp_path_factory.mktemp("tables"), "tables", list(LABELS), with_tables, rank=3, seed=7)


@pytest.mark.parametrize("source", ["build", "peft"])
def test_embeddings_are_adapted_as_a_build_would(source, second, tables, bundle, tmp_path):
    import onnx

    da.add(bundle, second.folder)
    before = {name: logits(bundle, name) for name in ("default", "none", "support")}
    peft = foreign(tables, tmp_path / "peft")
    write_json(peft / "labels.json", list(LABELS))
    da.add(bundle, tables.folder if source == "build" else peft, "tables", trust_base=source == "peft")
    np.testing.assert_array_equal(logits(bundle, "tables"), logits(tables.path("bundle")))
    for name, wanted in before.items():
        np.testing.assert_array_equal(logits(bundle, name), wanted)
    nodes, wanted = (
        [
            (node.op_type, [*node.input], [*node.output])
            for node in onnx.load(path / "model.onnx", load_external_data=False).graph.node
            if "embeddings" in node.output[0] or "embeddings" in node.input[0]
        ]
        for path in (bundle, tables.path("bundle"))
    )
    assert nodes == wanted
    assert load(bundle, adapter="tables").classify(TEXTS[0]).label in LABELS
    shown = read_tensors(bundle / "adapters" / "tables" / peft_files.TENSORS)
    assert "base_model.model.bert.embeddings.word_embeddings.lora_embedding_A" in shown, "as PEFT reads it"
    da.add(bundle, second.folder, "again")  # the graph has what it needs
    write_onnx_adapter(load(bundle, threads=1).feeds("tables"), tmp_path / "tables.onnx_adapter")
    found = diagnose(tmp_path / "tables.onnx_adapter", bundle).adapter.tensors
    for name, array in shown.items():
        if ".lora_" in name:
            np.testing.assert_array_equal(found[name], array)


def test_all_that_speaks_against_an_adapter_is_said_at_once(second, bundle, tmp_path):
    def odd(tensors):
        name = next(name for name in tensors if name.endswith("query.lora_B.weight"))
        return {**tensors, name: tensors[name][:-8]}

    folder, before = foreign(second, tmp_path / "odd", odd, use_frob=True), digests(bundle)
    (folder / "labels.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        da.add(bundle, folder, "odd")
    words = ("--trust-base", "use_frob = True", "the base's linear is", "its head has 4 labels")
    assert [word for word in words if word not in str(caught.value)] == []
    assert digests(bundle) == before


def test_an_adapter_that_needs_the_packed_weights_is_sent_to_a_build_of_its_own(wide, bundle, tmp_path):
    alone = shutil.copytree(wide.path("adapter"), tmp_path / "alone", ignore=shutil.ignore_patterns("training.json"))
    before = digests(bundle)
    with pytest.raises(ArtifactError, match=r"depend on the packed weights.*edgepeft build --adapter-from FOLDER"):
        da.add(bundle, alone)
    assert digests(bundle) == before


def test_a_whole_tensor_in_place_of_a_packed_one_is_sent_to_lora(second, bundle, tmp_path):
    def whole(tensors):
        return {**tensors, "base_model.model.bert.embeddings.word_embeddings.weight": np.ones((122, 64), np.float32)}

    folder = foreign(second, tmp_path / "x", whole, modules_to_save=["classifier", "word_embeddings"])
    with pytest.raises(ArtifactError, match=r"word_embeddings.weight: is packed.*adapt it by LoRA \(.*\)\.$"):
        da.add(bundle, folder, "x", trust_base=True)


def test_what_no_input_can_be_made_for_is_named(second, bundle, tmp_path):
    def with_scale(tensors):
        return {**tensors, "base_model.model.bert.encoder.layer.0.attention.self.key.s_in": np.ones(64, np.float32)}

    before = digests(bundle)
    with pytest.raises(ArtifactError, match=r"self.key: shares its input's scale with .*query.*Build with"):
        da.add(bundle, device(second, tmp_path / "x", with_scale), "x")
    assert digests(bundle) == before


# --- without torch and onnx, and the commands ------------------------------------------------------------------------


def test_a_device_needs_neither_torch_nor_onnx(second, wide, bundle):
    code = (
        "import sys; from pathlib import Path\n"
        "for name in ('torch', 'onnx', 'transformers', 'peft', 'safetensors'): sys.modules[name] = None\n"
        "from edgepeft.deploy import adapters as da\n"
        f"bundle, other = Path({str(bundle)!r}), Path({str(second.path('bundle') / 'adapters' / 'default')!r})\n"
        "da.add(bundle, other, 'support'); print(len(da.entries(bundle)), da.details(bundle, 'support')['rank'])\n"
        "da.remove(bundle, 'support'); print(len(da.entries(bundle)))\n"
        f"da.add(bundle, Path({str(wide.path('bundle'))!r}), 'wide')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "7", "1"], done.stderr
    assert "Making them takes the package onnx" in done.stderr


def run_cli(*words: object) -> str:
    done = CliRunner().invoke(cli, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_the_commands_show_what_is_there(second, bundle):
    assert run_cli("adapters", "add", bundle, second.folder).strip() == "support"
    listed = run_cli("adapters", "list", bundle).splitlines()
    assert [cell.strip() for cell in listed[0].split("|")[1:-1]] == [
        "name", "default", "method", "rank", "prompt tokens", "labels", "bytes", "trained on",
    ]  # fmt: skip
    assert [line.split("|")[2].strip() for line in listed[2:]] == ["*", ""]
    found = json.loads(run_cli("adapters", "list", bundle, "--json"))
    rows = [(row["name"], row["rank"], row["method"]) for row in found]
    assert rows == [("default", 4, "lora"), ("support", 7, "lora")]
    assert found[1]["trained_on"] == found[0]["trained_on"] == Path(second_data(second)).name
    shown = json.loads(run_cli("adapters", "show", bundle, "support", "--json"))
    assert set(shown["ranks"].values()) == {7}
    assert shown["labels"] == OTHER_LABELS
    assert shown["about"]["base"] == "digest"
    assert shown["base"] == check_bundle(bundle)["base_digest"]
    assert "bert.encoder.layer.0.attention.self.query" in run_cli("adapters", "show", bundle, "support")
    assert run_cli("adapters", "remove", bundle, "support") == ""
    assert len(json.loads(run_cli("adapters", "list", bundle, "--json"))) == 1


def second_data(run: Run) -> str:
    return read_json(run.path("adapter") / "training.json")["config"]["data"]


def test_what_is_no_bundle_is_said(tmp_path):
    for ask in (da.entries, lambda path: da.remove(path, "x"), lambda path: da.add(path, path, "x")):
        with pytest.raises(EdgePeftError, match="not a bundle"):
            ask(tmp_path)


def test_a_vera_needs_no_packed_weights(first, bundle, tmp_path):
    """Of the base it takes the linears' sizes alone, which the graph tells; a build's own gives the same answers."""
    _, run = first
    shapes = {part["name"]: part["shape"] for part in read_json(run.path("quantized") / "quantized.json")["layers"]}
    queries = [name for name in shapes if name.endswith(("query", "output.dense"))]
    rng, rank = np.random.default_rng(0), 6
    tensors = {"base_model.vera_A": rng.normal(size=(rank, max(shapes[n][1] for n in queries)))}
    tensors["base_model.vera_B"] = rng.normal(size=(max(shapes[n][0] for n in queries), rank))
    for name in queries:
        tensors[f"base_model.model.{name}.vera_lambda_b"] = rng.normal(size=shapes[name][0]) * 0.1
        tensors[f"base_model.model.{name}.vera_lambda_d"] = rng.normal(size=rank)
    trained = read_tensors(run.path("adapter") / peft_files.TENSORS)
    head = {name: np.array(array) for name, array in trained.items() if "classifier" in name}
    settings = {"peft_type": "VERA", "r": rank, "target_modules": queries, "modules_to_save": ["classifier"]}
    tensors = {name: array.astype(np.float32) for name, array in {**tensors, **head}.items()}
    (tmp_path / "vera").mkdir()
    write_json(tmp_path / "vera" / "adapter_config.json", settings)
    write_tensors(tmp_path / "vera" / peft_files.TENSORS, tensors, {"format": "pt"})
    da.add(bundle, tmp_path / "vera", "vera", trust_base=True)
    assert not np.array_equal(logits(bundle, "vera"), logits(bundle, "none"))
    base = Base.open(run.path("quantized"))
    peft_files.write_device(tmp_path / "device", tmp_path / "vera", base=base, foreign=True)
    places = (tmp_path / "device", bundle / "adapters" / "vera")
    wanted, found = (read_tensors(place / peft_files.TENSORS) for place in places)
    assert {n: t.tobytes() for n, t in wanted.items()} == {n: t.tobytes() for n, t in found.items()}
