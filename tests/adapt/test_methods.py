"""Each method's row: its place in the equation, and what the device and a merge receive."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgepeft.adapt import peft_files
from edgepeft.adapt.methods import METHODS, PREFIX, Method, Terms
from edgepeft.errors import ArtifactError


def folder_of(path: Path, b_scale: float = 1.0) -> Path:
    chance = np.random.default_rng(3)
    tensors = {f"{PREFIX}head.weight": np.ones((2, 8), np.float32)}
    for module in ("b.dense", "a.dense"):
        tensors[f"{PREFIX}{module}.lora_A.weight"] = chance.standard_normal((4, 32)).astype(np.float32)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_scale * chance.standard_normal((16, 4)).astype(np.float32)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6.0, "modules_to_save": ["head"]}
    peft_files.write(path, settings, tensors, "ab", "i4b32")
    return path


@pytest.mark.parametrize("tag", METHODS)
def test_a_row_is_whole(tag: str) -> None:
    row = METHODS[tag]
    assert row.tag == tag
    assert set(row.tensors) <= set(Terms.__dataclass_fields__)
    config = SimpleNamespace(rank=8, alpha=12.0, dropout=0.1)
    made = row.peft_config(config, ["b", "a"], ["head"], "SEQ_CLS")
    assert made.peft_type.value == row.peft_type
    assert made.target_modules == {"a", "b"}
    assert made.modules_to_save == ["head"]


def test_lora_folds_its_scale_into_b(tmp_path: Path) -> None:
    tensors = peft_files.read(folder_of(tmp_path)).tensors
    deltas = METHODS["lora"].deltas(tmp_path)
    assert list(deltas) == ["a.dense", "b.dense"]
    b_nr, a_rk = deltas["a.dense"]
    assert np.array_equal(b_nr, tensors[f"{PREFIX}a.dense.lora_B.weight"] * np.float32(1.5))
    assert np.array_equal(a_rk, tensors[f"{PREFIX}a.dense.lora_A.weight"])


def test_terms_for_the_device_are_halves_under_pefts_names(tmp_path: Path) -> None:
    adapter = peft_files.read(folder_of(tmp_path))
    tensors = METHODS["lora"].half_terms(adapter)
    assert sorted(tensors) == sorted(name for name in adapter.tensors if "lora_" in name)
    assert {str(t.dtype) for t in tensors.values()} == {"float16"}


def test_what_overflows_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a.dense: b_nr reaches .*65504"):
        METHODS["lora"].half_terms(peft_files.read(folder_of(tmp_path, b_scale=1e5)))


def test_what_is_no_sum_is_not_merged(tmp_path: Path) -> None:
    gated = Method("x", "LORA", {}, METHODS["lora"]._peft_config, lambda adapter, module: Terms(s_out=np.ones(16)))
    with pytest.raises(ArtifactError, match="s_out: not a sum"):
        gated.deltas(folder_of(tmp_path))


def test_the_table_loads_nothing_heavy() -> None:
    code = (
        "import sys, edgepeft.adapt.methods, edgepeft.train.tasks; print({'numpy', 'torch', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
