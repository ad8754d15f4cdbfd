"""The whole road on a tiny model: what it leaves, and that no interruption changes or loses anything."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import tiny_bert, tiny_data

from edgepeft import pipeline
from edgepeft.artifact import Run, digests
from edgepeft.config import Config
from edgepeft.errors import ArtifactError, EdgePeftError
from edgepeft.pipeline import STAGES

SETTINGS = ["--rank", "4", "--epochs", "2", "--batch-size", "8", "--target", "host", "--adapter", "separate"]
# Files that hold measured times or memory; everything else has to be the same, byte for byte.
MEASURED = {"training.json", "report.json", "manifest.json", "curves.png", "README.md"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return ["--model", str(tiny_bert(folder / "model")), "--data", str(tiny_data(folder / "data"))]


def start(inputs, output, *more):
    """Start a build as a user does, in a process of its own."""
    command = [sys.executable, "-m", "edgepeft", "build", *inputs, *SETTINGS, "--output", str(output), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Wait for a build and return its standard error; it must have worked."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def result(output):
    """Return the digests of everything in the bundle that does not depend on the clock."""
    return {name: value for name, value in digests(output / "bundle").items() if name.split("/")[-1] not in MEASURED}


@pytest.fixture(scope="module")
def built(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("built")
    finish(start(inputs, output))
    return output


def test_a_build_leaves_every_stage_and_a_second_one_does_nothing(inputs, built):
    expected = {stage.folder for stage in STAGES if stage.folder != "merged"}
    assert set(json.loads((built / "run.json").read_text())["stages"]) == expected
    said = finish(start(inputs, built))
    assert said.count("up to date") == len(expected)
    assert not list(built.glob(".*.work"))


def test_the_bundle_runs(built):
    command = [sys.executable, "-m", "edgepeft", "run", str(built / "bundle"), "--json", "turn off the lamp"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["label"] in ("light_on", "light_off", "music")


def test_a_changed_byte_is_made_again_and_nothing_before_it(inputs, built, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(built, output)
    model = output / "export" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    said = finish(start(inputs, output))
    assert "quantize: up to date" in said
    assert "train: up to date" in said
    assert "export: up to date" not in said
    assert result(output) == result(built)


def test_a_stage_refuses_what_an_earlier_one_did_not_see(built, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(built, output)

    def command(*words):
        full = [sys.executable, "-m", "edgepeft", *words, "--output", str(output)]
        return subprocess.run(full, capture_output=True, text=True, check=False)

    assert command("export", "--activation", "float").returncode == 0
    done = command("bundle")
    assert done.returncode == 1
    assert "Run 'edgepeft verify' first" in done.stderr
    assert command("verify").returncode == 0
    assert command("bundle").returncode == 0


READ_BY = {"model": ("quantize",), "data": ("train", "merge", "verify"), "target": ("verify", "bundle")}


def record(config, run):
    """Record every stage as done, with nothing in its folder."""
    for stage in STAGES:
        run.make(stage.folder, pipeline.stage_key(stage, config, run), lambda out: {"written to": out.name})


@pytest.fixture
def recorded(inputs, tmp_path):
    """(config, run) that was recorded with copies of the inputs."""
    model, data = shutil.copytree(inputs[1], tmp_path / "model"), shutil.copy(inputs[3], tmp_path / "data.csv")
    config = Config(model=str(model), data=str(data), output=str(tmp_path / "out"), adapter="merged")
    run = Run(Path(config.output))
    record(config, run)
    return config, run


def look(monkeypatch, name, digest):
    """Let something outside have another digest."""
    monkeypatch.setitem(pipeline.OUTSIDE, name, dataclasses.replace(pipeline.OUTSIDE[name], digest=digest))


@pytest.mark.parametrize(
    ("what", "maker", "words"),
    [
        ("model", "quantize", "the model that was quantized"),
        ("data", "train", "the data trained with"),
        ("target", "verify", "the target verified for"),
    ],
)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_refuses_what_was_made_from_other_files(recorded, tmp_path, monkeypatch, stage, what, maker, words):
    config, run = recorded
    before = pipeline.stage_key(stage, config, run)
    if what == "target":
        look(monkeypatch, "target", lambda _: "other")
    else:
        with open(tmp_path / {"model": "model/config.json", "data": "data.csv"}[what], "a") as stream:
            stream.write("\n")
    if pipeline.stage_named(maker) in pipeline._needs(stage, config):
        with pytest.raises(ArtifactError, match=rf"expected {words}, found other\. Run 'edgepeft {maker}' first\."):
            pipeline.stage_key(stage, config, run)
    else:
        assert (pipeline.stage_key(stage, config, run) != before) == (stage.name in READ_BY[what])


@pytest.mark.parametrize("what", ["model", "data"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_does_without_files_that_it_does_not_read(recorded, tmp_path, stage, what):
    config, run = recorded
    before = pipeline.stage_key(stage, config, run)
    shutil.rmtree(tmp_path / "model") if what == "model" else (tmp_path / "data.csv").unlink()
    if stage.name in READ_BY[what]:
        with pytest.raises(EdgePeftError, match="no such f"):
            pipeline.stage_key(stage, config, run)
    else:
        assert pipeline.stage_key(stage, config, run) == before


@pytest.mark.parametrize("model", ["minilm", "some/hub-model"])
def test_only_quantize_looks_for_a_model_that_is_no_folder(recorded, monkeypatch, model):
    config, run = recorded[0].replace(model=model), recorded[1]
    look(monkeypatch, "model", lambda _: "found")
    record(config, run)
    look(monkeypatch, "model", lambda _: pytest.fail("looked for the model"))
    assert all(run.holds(stage.folder, pipeline.stage_key(stage, config, run)) for stage in STAGES[1:])


@pytest.mark.parametrize("stage", ["merge", "verify"])
def test_other_labels_than_were_trained_with_are_said_by_the_stages_that_read_them(recorded, tmp_path, stage):
    with open(tmp_path / "data.csv", "a") as stream:
        stream.write("be quiet,silence\nbe very quiet,silence\n")
    with pytest.raises(ArtifactError, match="expected the data trained with, found other"):
        pipeline.build(recorded[0], [pipeline.stage_named(stage)])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": "none.csv"}, "no such file"),
        ({"label_column": "topic"}, "no column 'topic'"),
        ({"adapter_from": "."}, "no adapter"),
        ({"teacher": "slf"}, "expected none, self, tuned or a model folder"),
        ({"method": "prompt", "prompt_tokens": 64}, "--prompt-tokens: expected at most 60"),
    ],
)
def test_a_build_looks_at_all_it_reads_before_the_first_stage(inputs, tmp_path, monkeypatch, settings, said):
    config = Config(**{"model": inputs[1], "data": inputs[3], "output": str(tmp_path / "out"), **settings})
    monkeypatch.setattr(pipeline, "run_stage", lambda stage, *_: pytest.fail(f"{stage.name} was begun"))
    with pytest.raises(EdgePeftError, match=said):
        pipeline.build(config)


def test_settings_stay_once_a_stage_was_done_with_them(tmp_path, monkeypatch):
    config, train = Config(output=str(tmp_path)), [pipeline.stage_named("train")]

    def remembered(config, stages, stop):
        """Build until a stage stops it; return what the folder remembers."""

        def run_stage(stage, _, run):
            if stage.name == stop:
                raise KeyboardInterrupt
            run.make(stage.folder, "key", lambda out: {"written to": out.name})

        monkeypatch.setattr(pipeline, "run_stage", run_stage)
        with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
            pipeline.build(config, stages)
        return pipeline.saved_settings(tmp_path).get("rank")

    assert remembered(config.replace(rank=2), STAGES, stop="quantize") is None
    assert remembered(config.replace(rank=4), STAGES, stop="train") == 4
    assert remembered(config.replace(rank=8), train, stop="train") == 4
    assert remembered(config.replace(rank=8), train, stop=None) == 8


def test_a_command_that_failed_leaves_none_of_its_settings(built, tmp_path):
    output, settings = tmp_path / "out", (built / "config.json").read_text()
    shutil.copytree(built, output)
    for words in (["quantize", "--model", str(tmp_path / "none")], ["bundle", "--format", "i8c"]):
        command = [sys.executable, "-m", "edgepeft", *words, "--output", str(output)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1
        assert (output / "config.json").read_text() == settings


def test_a_folder_of_somebody_else_is_left_alone(inputs, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine").write_text("mine")
    (tmp_path / "config.json").write_text("mine")
    process = start(inputs, tmp_path)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Give another --output" in said
    assert (tmp_path / "config.json").read_text() == (tmp_path / "export" / "mine").read_text() == "mine"


def test_a_stage_takes_flags_before_the_file_before_what_it_remembers(built, tmp_path):
    output, settings = tmp_path / "out", tmp_path / "edgepeft.toml"
    shutil.copytree(built, output)
    settings.write_text(f'output = "{output}"\nactivation = "float"\nmin_retention = 0.25\n')
    command = [sys.executable, "-m", "edgepeft", "export", "--config", str(settings), "--min-retention", "0.125"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    saved = json.loads((output / "config.json").read_text())
    assert (saved["activation"], saved["min_retention"], saved["rank"]) == ("float", 0.125, 4)


def litter(output):
    """Return what a finished or failed build must not leave."""
    return [path.name for path in output.glob(".*.tmp")]


def interrupt(inputs, output, stage, how):
    """Start a build and send it a signal as soon as the stage has begun to write."""
    process = start(inputs, output)
    while process.poll() is None:
        if any(output.glob(f".{stage.folder}.*.tmp")):
            time.sleep(0.3)
            process.send_signal(how)
            break
        time.sleep(0.002)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
@pytest.mark.parametrize("stage", [s for s in STAGES if s.folder != "merged"], ids=lambda stage: stage.name)
def test_an_interrupted_build_goes_on_to_the_same_result(inputs, built, tmp_path, stage, how):
    status, said = interrupt(inputs, tmp_path, stage, how)
    if status != 0:  # the stage may have been over before the signal came
        # 130 or death by the signal, which a shell reports as 130: Python chooses the second by itself where the signal
        # met a string being executed, as named tuples do while a module loads.
        assert (128 - status if status < 0 else status) == 128 + how, said
        assert how is signal.SIGKILL or not litter(tmp_path)
        assert "Traceback" not in said
    done = finish(start(inputs, tmp_path))
    earlier = [s for s in STAGES[: STAGES.index(stage)] if s.folder != "merged"]
    assert all(f"{s.name}: up to date" in done for s in earlier)
    assert result(tmp_path) == result(built)
    assert not litter(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of one size in bytes; needs root."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_full_disk_is_said_and_loses_nothing(inputs, built, small_disk, share):
    need = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
    output = small_disk(int(need * share) // 4096 * 4096 + 65536) / "out"
    process = start(inputs, output)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert "the disk is full" in said
    assert not litter(output)
    subprocess.run(["mount", "-o", f"remount,size={need * 4}", str(output.parent)], check=True)
    finish(start(inputs, output))
    assert result(output) == result(built)
