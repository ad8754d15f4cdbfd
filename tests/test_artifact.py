"""Files are whole or absent, and a changed byte is noticed."""

import errno
import json

import numpy as np
import pytest
import safetensors.numpy

from edgepeft import artifact
from edgepeft.errors import ArtifactError

TENSORS = {
    "codes": np.arange(7, dtype=np.uint8),
    "half": np.linspace(-1, 1, 6, dtype=np.float16).reshape(2, 3),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(2.5, np.float32),
    "ids": np.array([[1, -2]], np.int64),
}


def test_tensors_come_back_and_the_library_of_the_format_agrees(tmp_path):
    path = tmp_path / "t.safetensors"
    artifact.write_tensors(path, TENSORS, {"format": "pt"})
    back = artifact.read_tensors(path)
    theirs = safetensors.numpy.load_file(path)
    for name, array in TENSORS.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)
        np.testing.assert_array_equal(theirs[name], array)
    header, meta, base = artifact.tensor_header(path)
    assert (meta, base % artifact.ALIGNMENT_BYTES, set(header)) == ({"format": "pt"}, 0, set(TENSORS))


def test_bfloat16_is_widened_exactly(tmp_path):
    import torch
    from safetensors.torch import save_file

    values = torch.randn(5, 3).bfloat16()
    save_file({"w": values}, tmp_path / "b.safetensors")
    np.testing.assert_array_equal(artifact.read_tensors(tmp_path / "b.safetensors")["w"], values.float().numpy())


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_tensor_file_is_refused_by_name(tmp_path, keep):
    path = tmp_path / "t.safetensors"
    artifact.write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"t\.safetensors: truncated"):
        artifact.read_tensors(path)


@pytest.mark.parametrize(
    "change",
    [{"shape": [3]}, {"shape": "x"}, {"shape": [-2]}, {"data_offsets": [-8, 8]}, {"dtype": ["F32"]}, {"dtype": "F16"}],
    ids=str,
)
def test_a_header_that_does_not_fit_its_bytes_is_refused(tmp_path, change):
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}
    header = json.dumps({"x": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ArtifactError, match=r"a\.safetensors"):
        artifact.tensor_header(path)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    artifact.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        artifact.write_json(path, {"a": 2})
    with pytest.raises(OSError, match="No space"):
        artifact.write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_stage_that_fails_leaves_the_earlier_result(tmp_path):
    run = artifact.Run(tmp_path)
    run.make("quantized", "key", lambda out: (out / "a").write_text("one") and {})

    def broken(out):
        (out / "a").write_text("two")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        run.make("quantized", "other", broken)
    assert (tmp_path / "quantized" / "a").read_text() == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quantized", "run.json"]


@pytest.mark.parametrize("change", ["key", "byte", "missing", "extra", None])
def test_a_stage_holds_only_while_key_and_every_byte_agree(tmp_path, change):
    artifact.Run(tmp_path).make("export", "key", lambda out: (out / "a").write_bytes(b"abc") and {})
    file = tmp_path / "export" / "a"
    if change == "byte":
        file.write_bytes(b"abd")
    elif change == "missing":
        file.unlink()
    elif change == "extra":
        (file.parent / "b").touch()
    again = artifact.Run(tmp_path)
    assert again.holds("export", "other" if change == "key" else "key") == (change is None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[]", "list without a table of stages"),
        ("{}", "dict without a table of stages"),
        ('{"version": 1, "stages": []}', "dict without a table of stages"),
        ('{"version": 2, "stages": {}}', "version 2, not 1"),
        ('{"version": 1, "stages": {"export": []}}', "stage 'export' without its key, files, summary"),
        ('{"version": 1, "stages": {"export": {"key": 1, "files": {}, "summary": {}}}}', "stage 'export' without"),
        ('{"version": 1', "no JSON"),
        ("\udcff", "no JSON"),
    ],
)
def test_a_record_of_another_shape_is_refused_before_anything_is_written(tmp_path, text, found):
    (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match=rf"run\.json: expected .*, found {found}.* Give another --output, or"):
        artifact.Run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_one_folder_takes_one_build_and_litter_of_a_killed_one_is_swept(tmp_path):
    (tmp_path / "run.json").write_text('{"version": 1, "stages": {}}')
    (tmp_path / ".quantized.1.tmp").mkdir()
    with artifact.Run(tmp_path).lock():
        assert not (tmp_path / ".quantized.1.tmp").exists()
        with pytest.raises(ArtifactError, match="another build"), artifact.Run(tmp_path).lock():
            pass


def test_work_outlives_an_interruption_but_not_another_key(tmp_path):
    run = artifact.Run(tmp_path)
    (run.work("train", "a") / "checkpoint").touch()
    assert (run.work("train", "a") / "checkpoint").exists()
    assert not (run.work("train", "b") / "checkpoint").exists()
    run.clear("train")
    assert not list(run.folder.glob(".*.work"))
