"""The graph builder: what is written can be loaded, lies aligned, exists once, and is the same every time."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgepeft.artifact import tensor_header, write_tensors
from edgepeft.export.graph import FLOAT, Graph, Place, Value

BIG = np.arange(3 * 20000, dtype=np.float32).reshape(3, 20000)
MIDDLE = np.arange(300, dtype=np.float32)[None]


def build(folder):
    """y = x @ (w + extra)^T with w stored in two parts, and an adapter tensor in a file of its own."""
    graph = Graph("test")
    x = graph.input("x", FLOAT, ("m", 300))
    graph.constant("middle", MIDDLE)
    w = graph.constant("w", BIG[:1, :300], BIG[1:, :300])
    graph.constant("big", BIG)
    codes = graph.constant("codes", np.full((2000,), 0x12, np.uint8))
    extra = Value("extra", FLOAT, (3, 300))
    write_tensors(folder / "adapter.safetensors", {"other": BIG, "extra": np.full((3, 300), 2, np.float32)})
    header, _, base = tensor_header(folder / "adapter.safetensors")
    start, end = header["extra"]["data_offsets"]
    extra = graph.overridable(extra, Place("adapter.safetensors", base + start, end - start), ("labels", 300))
    both = graph.node("Add", w, extra, shape=(3, 300), name="both")
    turned = graph.node("Transpose", both, perm=[1, 0], shape=(300, 3), name="turned")
    graph.output(graph.node("MatMul", x, turned, shape=("m", 3), name="y"))
    graph.output(graph.node("Identity", codes, dtype=codes.dtype, shape=codes.shape, name="copied"))
    return graph


def session(path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_written_file_runs(tmp_path):
    path = build(tmp_path).save(tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    x = np.ones((2, 300), np.float32)
    y, copied = session(path).run(None, {"x": x})
    np.testing.assert_allclose(y, x @ (BIG[:, :300] + 2).T, rtol=1e-6)
    assert (copied == 0x12).all()
    fed, _ = session(path).run(None, {"x": x, "extra": np.zeros((3, 300), np.float32)})
    np.testing.assert_allclose(fed, x @ BIG[:, :300].T, rtol=1e-6)


def test_bytes_are_the_same_every_time(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        build(folder).save(folder)
    for name in ("model.onnx", "model.onnx.data"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_offsets_are_aligned_and_lie_within_the_file(tmp_path):
    path = build(tmp_path).save(tmp_path)
    size = (tmp_path / "model.onnx.data").stat().st_size
    seen = 0
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries.get("location") == "model.onnx.data":
            offset, length = int(entries["offset"]), int(entries["length"])
            assert offset % (4096 if length >= 1 << 16 else 64) == 0
            assert offset + length <= size
            seen += 1
    assert seen == 4


def test_large_constants_are_streamed_not_copied(tmp_path):
    """A mapped gibibyte costs no anonymous memory, and no single write may exceed a chunk."""
    source = np.memmap(tmp_path / "zeros", dtype=np.uint8, mode="w+", shape=(1 << 27,))
    graph = Graph("large")
    graph.output(graph.node("Size", graph.constant("w", source), dtype=7, shape=(), name="n"))

    def anonymous_bytes():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10

    before = anonymous_bytes()
    graph.save(tmp_path)
    assert anonymous_bytes() - before < 1 << 25
    assert (tmp_path / "model.onnx.data").stat().st_size == 1 << 27


@pytest.mark.parametrize("name", ["w", "big"])
def test_a_constant_is_stored_once(tmp_path, name):
    graph = build(tmp_path)
    before = graph.data_bytes
    assert graph.constant(name, BIG) == graph.constants[name]
    assert graph.data_bytes == before
