"""Each method's row: what PEFT is told, and what the table costs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from edgepeft.adapt import training
from edgepeft.adapt.kinds import KINDS
from edgepeft.adapt.methods import METHODS

TRAINED_ON = ["a.output.dense", "a.key"]


@pytest.mark.parametrize("tag", METHODS)
def test_a_row_is_whole(tag: str) -> None:
    row = METHODS[tag]
    assert row.tag == tag
    assert row.peft_type in KINDS
    assert set(row.hooks) <= {"prepare", "attach", "optimizer", "begin", "step"}
    assert all(hasattr(training, name) for name in row.hooks.values())
    config = SimpleNamespace(rank=8, alpha=12.0, dropout=0.1, seed=3)
    made = row.peft_config(config, TRAINED_ON, ["head"], "SEQ_CLS")
    assert made.peft_type.value == row.peft_type
    assert made.target_modules == ({"a.key"} if tag == "bitfit" else set(TRAINED_ON))
    assert made.modules_to_save == ["head"]


def test_the_table_loads_nothing_heavy() -> None:
    code = (
        "import sys, edgepeft.adapt.methods, edgepeft.train.tasks; print({'numpy', 'torch', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
