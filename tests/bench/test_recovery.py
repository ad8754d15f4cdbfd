"""The bench of recovery: the error it measures is that of quantization, and falls when the float self has taught."""

import json
from pathlib import Path

from builders import tiny_bert, tiny_data

from edgepeft.bench import recovery
from edgepeft.config import Config
from edgepeft.pipeline import build, stage_named


def test_what_quantization_took_comes_back_by_the_words_of_the_float_self(tmp_path: Path) -> None:
    model, data = tiny_bert(tmp_path / "model"), tiny_data(tmp_path / "data", "folder")
    config = Config(
        model=str(model), data=str(data), output=str(tmp_path / "out"), format="i4b128", teacher="self",
        lesson_hidden=100.0, epochs=8, batch_size=12, rank=8, learning_rate=1e-2, dropout=0.0, max_length=24, threads=1,
    )  # fmt: skip
    build(config, [stage_named(name) for name in ("quantize", "train")])
    assert recovery.main([str(tmp_path / "out"), "--texts", "20", "--json", str(tmp_path / "r.json")]) == 0
    without, adapted = json.loads((tmp_path / "r.json").read_text())
    assert 0.0 < without["error"] < 0.1
    assert 0.9 < without["cosine"] < 1.0
    assert without["recovered"] == 0.0
    assert 0.05 < adapted["recovered"] < 1.0
