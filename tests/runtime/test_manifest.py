from __future__ import annotations

import random
from pathlib import Path

import pytest

from edgepeft.errors import ArtifactError
from edgepeft.runtime import load
from edgepeft.runtime import manifest as mf
from edgepeft.runtime.manifest import check_bundle
from tests.runtime.standin import reseal


def files_of(bundle: Path) -> list[Path]:
    return sorted(p for p in bundle.rglob("*") if p.is_file())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_whole_bundle_passes(sealed: Path) -> None:
    assert check_bundle(sealed).checked == "full"
    load(sealed).verify()


def test_one_flipped_bit_in_any_file_is_refused_and_named(bundle: Path) -> None:
    chance = random.Random(0)
    for path in files_of(bundle):
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(8))}:
            flip(path, place)
            with pytest.raises(ArtifactError, match=path.name):
                load(bundle)
            path.write_bytes(whole)
    check_bundle(bundle)


def test_every_bit_of_the_manifest_counts(bundle: Path) -> None:
    path = bundle / mf.NAME
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        flip(path, place)
        with pytest.raises(ArtifactError, match=mf.NAME):
            mf.unseal(path)
        path.write_bytes(whole)


def test_every_missing_or_cut_file_is_named_at_once(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    data = (bundle / "model.onnx.data").read_bytes()
    (bundle / "model.onnx.data").write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=f"model.onnx.data has {len(data) - 1} bytes, .*tokenizer.json is missing"):
        load(bundle)


def test_quick_leaves_large_files_to_full(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mf, "FULL_CHECK_BYTES", 100)
    monkeypatch.setattr(mf, "SMALL_FILE_BYTES", 1500)
    assert (bundle / "model.onnx.data").stat().st_size > 1500
    flip(bundle / "model.onnx.data", 7)
    assert check_bundle(bundle).checked == "quick"
    with pytest.raises(ArtifactError, match=r"model.onnx.data was changed"):
        check_bundle(bundle, "full")
    flip(bundle / "config.json", 3)
    with pytest.raises(ArtifactError, match=r"config.json was changed"):
        check_bundle(bundle)


def test_folders_that_are_no_bundle_say_what_to_take(sealed: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        load(tmp_path / "none")
    with pytest.raises(ArtifactError, match="not a bundle"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match=f"Take {sealed}"):
        load(sealed.parent)
    with pytest.raises(ArtifactError, match="no such folder"):
        load(sealed / "config.json")


def test_a_manifest_cannot_reach_outside(bundle: Path) -> None:
    (bundle.parent / "secret").write_text("x")
    reseal(bundle)
    values = mf.unseal(bundle / mf.NAME)
    values["files"]["../secret"] = {"bytes": 1, "sha256": "0" * 64}
    (bundle / mf.NAME).write_bytes(mf.seal(values))
    with pytest.raises(ArtifactError, match="outside the bundle"):
        check_bundle(bundle)


def test_another_schema_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mf, "SCHEMA", 2)
    with pytest.raises(ArtifactError, match="schema 1, this edgepeft reads 2"):
        load(bundle)


def test_a_bundle_for_other_ops_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mf, "OP_ABI", 7)
    with pytest.raises(ArtifactError, match=r"made for op ABI \d, this edgepeft needs 7"):
        load(bundle)


def test_unknown_check(sealed: Path) -> None:
    with pytest.raises(ArtifactError, match="Did you mean 'quick'"):
        load(sealed, check="quik")
