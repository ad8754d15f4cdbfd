from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.builders import tiny_bert
from tests.runtime.standin import LABELS, reseal, write_bundle


@pytest.mark.slow
def test_the_float32_peer_is_fused_and_equals_pytorch(tmp_path: Path) -> None:
    import onnx

    from edgepeft.bench.memory import rows
    from edgepeft.bench.peer import export_peer, load_peer

    bundle = write_bundle(tmp_path / "bundle")
    bert = tiny_bert(tmp_path / "bert", num_labels=len(LABELS))
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(bert / name, bundle / name)
    reseal(bundle)
    files = export_peer(bundle, tmp_path)
    assert files["float32 mapped"].stat().st_size < files["float32"].stat().st_size
    path = files["float32"]
    kinds = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert {"Attention", "SkipLayerNormalization", "BiasGelu"} <= kinds
    peer = load_peer(bundle, path, 1)
    assert peer.run(rows(peer, 2, 8)).shape == (2, len(LABELS))
    assert peer.classify("turn off the lamp").label in LABELS
