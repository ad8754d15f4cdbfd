from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from edgepeft.artifact import Run, digests, read_json, staging, write_json
from edgepeft.config import Config
from edgepeft.deploy import bundle as bd
from edgepeft.deploy.compile import host_platform
from edgepeft.deploy.targets import load_target, target_names
from edgepeft.errors import ArtifactError
from edgepeft.runtime import load, vulkan
from edgepeft.runtime.library import FILE_NAME, platform_tag
from edgepeft.runtime.manifest import check_bundle
from tests.runtime import standin as st


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run folder as the stages before leave it."""
    run = Run(tmp_path_factory.mktemp("run"))
    export = st.write_bundle(run.path("export"))
    (export / "manifest.json").unlink()
    write_json(export / "export.json", {"adapter": "separate", "activation": "int8"})
    config = dataclasses.asdict(Config(max_length=16, rank=st.R))
    for folder in ("adapter", "quantized", "verify"):
        run.path(folder).mkdir()
    write_json(
        run.path("adapter") / "training.json", {"labels": st.LABELS, "config": config, "test": {"accuracy": 0.9}}
    )
    described = {"base_digest": st.BASE_DIGEST, "format": "i4b32", "embedding_format": "i4b32"}
    write_json(run.path("quantized") / "quantized.json", described)
    write_json(run.path("verify") / "report.json", {"max_error": 1e-4})
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(made.folder, tmp_path / "run")))


def build(run: Run, target: str = "host") -> Path:
    with staging(run.path("bundle")) as out:
        bd.bundle(Config(target=target), run, out)
    return run.path("bundle")


def test_the_bundle_is_whole_and_runs(run: Run, capsys: pytest.CaptureFixture) -> None:
    folder = build(run)
    manifest = check_bundle(folder, "full")
    assert {*manifest.files, "manifest.json"} == {*digests(folder)}
    assert "export.json" not in manifest.files
    assert f"lib/{host_platform()}/{FILE_NAME}" in manifest.files
    model = load(folder)
    assert model.labels == tuple(st.LABELS)
    assert model.library is not None
    assert model.library.path.is_relative_to(folder)
    assert (manifest["rank"], manifest["max_length"], manifest["verify"]) == (st.R, 16, {"max_error": 1e-4})
    assert read_json(folder / "adapters/default/labels.json") == st.LABELS
    sizes = manifest["sizes_bytes"]
    assert sizes["total"] == sum(f["bytes"] for f in manifest.files.values()) == sum(sizes.values()) - sizes["total"]
    assert all(size > 0 for size in sizes.values())
    said = capsys.readouterr().err
    assert all(f"| {part} " in said for part in sizes)


def test_bundling_changes_nothing_of_the_export(run: Run) -> None:
    before = digests(run.path("export"))
    build(run)
    assert digests(run.path("export")) == before


def test_equal_runs_give_equal_bundles(run: Run) -> None:
    first = digests(build(run))
    assert digests(build(run)) == first


@pytest.mark.parametrize("name", bd.REQUIRED)
def test_a_missing_file_leaves_the_old_bundle(run: Run, name: str) -> None:
    before = digests(build(run))
    (run.path("export") / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} missing"):
        build(run)
    assert digests(run.path("bundle")) == before
    assert not list(run.folder.glob(".bundle*"))


def test_an_export_that_cannot_run_is_not_bundled(run: Run) -> None:
    (run.path("export") / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="refuses the model"):
        build(run)
    assert not run.path("bundle").exists()


@pytest.mark.parametrize("target", target_names())
def test_each_target_explains_its_wheels_and_names_its_libraries(target: str) -> None:
    described = load_target(target)
    sentence = bd.why(described)
    assert described.onnxruntime in sentence
    assert sentence.endswith(".")
    assert set(bd.libraries(described)) >= {host_platform(), *described.libraries}
    assert host_platform() == platform_tag()


@pytest.mark.slow
def test_a_pi_gets_its_own_library_and_wheels(run: Run) -> None:
    folder = build(run, "rpi")
    values = json.loads((folder / "manifest.json").read_text())
    assert f"lib/linux-aarch64/{FILE_NAME}" in values["files"]
    assert (folder / "requirements.txt").read_text().splitlines() == list(load_target("rpi").requirements)
    assert "1.21.0 dies with SIGILL" in (folder / "README.md").read_text()
    assert load(folder).classify("play").label in st.LABELS


@pytest.mark.slow
def test_phones_get_both_libraries_under_androids_name(run: Run) -> None:
    files = json.loads((build(run, "android-gpu") / "manifest.json").read_text())["files"]
    assert {name for name in files if name.startswith("lib/")} == {
        f"lib/{platform}/{name}"
        for platform in ("android-aarch64", host_platform())
        for name in (FILE_NAME, vulkan.FILE_NAME)
    }


def test_a_target_of_browsers_has_a_page(run: Run) -> None:
    from edgepeft.deploy import web

    if reason := web.missing():
        pytest.skip(reason)
    folder = build(run, "web")
    files = check_bundle(folder, "full").files
    own = {path.relative_to(web.PAGE).as_posix() for path in web.PAGE.rglob("*") if path.is_file()}
    assert own <= set(files)
    assert {f"web/vendor/{name}" for package in web.PACKAGES for name in package.files.values()} <= set(files)
    assert "edgepeft serve" in (folder / "README.md").read_text()
    assert check_bundle(folder)["sizes_bytes"]["page"] > 40e6
