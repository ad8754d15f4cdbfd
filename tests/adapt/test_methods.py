"""Each method's row: what PEFT is told, and what the table costs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from edgepeft.adapt import prompts, training
from edgepeft.adapt.kinds import KINDS
from edgepeft.adapt.methods import METHODS

KEY, DOWN = "bert.encoder.layer.0.attention.self.key", "bert.encoder.layer.0.output.dense"
TARGETS = {"bitfit": {KEY}, "houlsby": {DOWN}, "pfeiffer": {DOWN}, "parallel": {DOWN}}


@pytest.mark.parametrize("tag", METHODS)
def test_a_row_is_whole(tag: str) -> None:
    row = METHODS[tag]
    assert row.tag == tag
    assert row.peft_type in KINDS
    assert set(row.hooks) <= {"prepare", "attach", "optimizer", "begin", "resume", "step", "save", "restore"}
    assert all(hasattr(training, name) for name in row.hooks.values())
    config = SimpleNamespace(
        rank=8, alpha=12.0, dropout=0.1, seed=3, experts=4, format="i4b32", prompt_tokens=5, model="", task=""
    )
    made = row.peft_config(config, [KEY, DOWN], ["head"], "SEQ_CLS")
    saved = made.to_dict()["peft_type"]
    assert getattr(saved, "value", saved) == row.peft_type
    assert made.modules_to_save == ["head"]
    if row.peft_type in prompts.TYPES:
        assert made.num_virtual_tokens == 5
    else:
        assert made.target_modules == TARGETS.get(tag, {KEY, DOWN})


@pytest.mark.parametrize("tag", ["experts", "pfeiffer", "parallel"])
def test_dropout_reaches_layers_of_our_own(tag: str) -> None:
    import torch
    from peft import get_peft_model

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.intermediate, self.output = torch.nn.ModuleDict({"dense": torch.nn.Linear(8, 8)}), torch.nn.Module()
            self.output.dense = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.output.dense(self.intermediate["dense"](x))

    config = SimpleNamespace(rank=4, alpha=4.0, dropout=0.5, experts=2)
    model = torch.nn.ModuleDict({"encoder": torch.nn.ModuleDict({"layer": torch.nn.ModuleList([Layer()])})})
    made = METHODS[tag].peft_config(config, ["encoder.layer.0.output.dense"], [], None)
    peft = get_peft_model(model, made)
    layer = peft.base_model.model["encoder"]["layer"][0]
    if tag == "parallel":
        layer.output.dense.tap(layer.intermediate["dense"])
    torch.manual_seed(0)
    for parameter in peft.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 8)
    assert not torch.equal(layer(x), layer(x))
    peft.eval()
    assert torch.equal(layer(x), layer(x))


def test_the_table_loads_nothing_heavy() -> None:
    code = (
        "import sys, edgepeft.adapt.methods, edgepeft.train.tasks; print({'numpy', 'torch', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
