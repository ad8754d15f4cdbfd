"""optimum's ONNX Runtime class opens the bundle as it is, with our library and without it."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from edgepeft.runtime import load
from tests.neighbours.conftest import Made

TEXTS = ["turn off the lamp in the kitchen please", "play a song"]

pytestmark = pytest.mark.optimum


def _has_optimum() -> bool:
    try:
        return importlib.util.find_spec("optimum.onnxruntime") is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.skipif(not _has_optimum(), reason="optimum.onnxruntime is not installed: pip install 'edgepeft[optimum]'")
@pytest.mark.parametrize("library", ["none", "auto"])
def test_optimum_gives_the_runtime_s_logits(made: Made, library: str) -> None:
    import onnxruntime
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer

    ours = load(made.bundle, library=library)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if ours.library is not None:
        options.register_custom_ops_library(str(ours.library.path))
    theirs = ORTModelForSequenceClassification.from_pretrained(made.bundle, session_options=options)
    tokens = AutoTokenizer.from_pretrained(made.bundle)(TEXTS, padding=True, return_tensors="pt")
    found = theirs(**tokens).logits.numpy()
    np.testing.assert_allclose(found, ours.logits(TEXTS), rtol=1e-4, atol=1e-4 * np.abs(found).max())
    assert [theirs.config.id2label[i] for i in found.argmax(1)] == [p.label for p in ours.classify(TEXTS)]


@pytest.mark.skipif(not _has_optimum(), reason="optimum.onnxruntime is not installed: pip install 'edgepeft[optimum]'")
def test_its_pipeline_runs_a_bundle(made: Made) -> None:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    model = ORTModelForSequenceClassification.from_pretrained(made.bundle)
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(made.bundle))
    expected = load(made.bundle, library="none").classify(TEXTS)
    for answer, own in zip(classify(TEXTS), expected, strict=True):
        assert answer["label"] == own.label
        assert answer["score"] == pytest.approx(own.score, abs=1e-4)
