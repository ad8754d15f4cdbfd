"""QA-LoRA: PEFT's own arithmetic on our linears, apart as a LoRA that PEFT loads, and merged without any loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepeft.adapt import peft_files
from edgepeft.adapt.base import Base
from edgepeft.adapt.merge import merge_terms
from edgepeft.artifact import read_json, read_tensors, write_json, write_tensors
from edgepeft.backbone.families import family_of
from edgepeft.backbone.load import quantized_model
from edgepeft.deploy.compile import host_library
from edgepeft.errors import ArtifactError, ConfigError
from edgepeft.export import decoder, encoder, parity
from edgepeft.export.emitter import AdapterFile, Weights
from edgepeft.export.parity import OnnxModel, largest_error
from edgepeft.quant.formats import FORMATS
from tests.adapt.conformance import SIZE, Subject

EXACT = 1e-5  # of the largest value: the same sums in another order


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Subject]:
    """A function that gives the packed model of a kind and a format, made once."""
    made: dict[tuple[str, str], Subject] = {}

    def get(kind: str, tag: str) -> Subject:
        if (kind, tag) not in made:
            made[kind, tag] = Subject(tmp_path_factory.mktemp(f"{kind}-{tag}"), kind, tag)
        return made[kind, tag]

    return get


def saved(subject: Subject) -> Path:
    """Return the folder of a random adapter, which PEFT saved once."""
    folder = subject.folder / "qalora" / "peft"
    return folder if folder.exists() else subject.made("qalora")


def merged(subject: Subject) -> tuple[Path, list[dict[str, Any]]]:
    """Merge a random adapter into a folder of packed weights; return it and the figures of all linears."""
    folder, source = subject.folder / "merged", subject.run.path("quantized")
    tensors, layers = dict(subject.base.tensors), {row["name"]: dict(row) for row in subject.base.about["layers"]}
    rows = []
    for module, terms in subject.adapter(saved(subject)).effect(subject.base).modules.items():
        figures, changed = merge_terms(module, terms, subject.base, layers[module])
        tensors.update(changed)
        rows.append(figures)
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "weights.safetensors", tensors, {"format": "pt"})
    write_json(folder / "quantized.json", {**subject.base.about, "layers": list(layers.values())})
    write_json(folder / "config.json", read_json(source / "config.json"))
    return folder, rows


def heads(subject: Subject) -> dict[str, np.ndarray]:
    return peft_files.read(saved(subject), base=subject.base, foreign=True).whole


def torch_merged(subject: Subject, folder: Path) -> Any:
    model = quantized_model(folder, subject.labels, subject.config)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in heads(subject).items()}, strict=False)
    return model.eval()


def graph_of(subject: Subject, folder: Path, out: Path) -> Path:
    out.mkdir()
    family, none = family_of(subject.settings, "tiny"), AdapterFile.read(None)
    if subject.heads:
        made = encoder.build(family, subject.settings, Weights(folder, heads(subject)), none, "int8")
    else:
        made = decoder.build(family, subject.settings, Weights(folder), none, "int8", 64)
    made.save(out)
    return out


@pytest.mark.parametrize(("kind", "tag"), [*(("bert", tag) for tag in FORMATS), ("llama", "i4b32")])
def test_a_merge_loses_nothing(subjects: Callable, tmp_path: Path, kind: str, tag: str) -> None:
    """Merged weights give what PEFT's layer gives, in float and with rounded activations, and keep every packed bit."""
    subject = subjects(kind, tag)
    folder, rows = merged(subject)
    assert all(row["retention"] > 1 - 1e-6 for row in rows)
    stored, packed = (read_tensors(place / "weights.safetensors") for place in (folder, subject.run.path("quantized")))
    assert stored.keys() - packed.keys() == {f"{row['name']}.qoffset" for row in rows}
    assert all(np.array_equal(stored[name], packed[name]) for name in packed)
    apart, whole = subject.model(saved(subject)), torch_merged(subject, folder)
    wanted = subject.logits(apart)
    assert largest_error(subject.logits(whole), wanted) < EXACT
    for row in rows:
        weight = whole.get_submodule(row["name"]).get_weight().numpy()
        np.testing.assert_array_equal(Base.open(folder).weight(row["name"]), weight)
    chance = np.random.default_rng(0)  # linear by linear: a whole model would carry a flipped rounding on
    with parity.int8_activations(apart), parity.int8_activations(whole), torch.inference_mode():
        for row in rows:
            linears = whole.get_submodule(row["name"]), apart.get_submodule(f"base_model.model.{row['name']}")
            x = torch.from_numpy(chance.standard_normal((3, linears[0].in_features)).astype(np.float32))
            assert largest_error(*(linear(x).numpy() for linear in linears)) < EXACT
    out = graph_of(subject, folder, tmp_path / "graph")
    assert largest_error(OnnxModel(out, None).logits(subject.batch), wanted) < EXACT
    assert largest_error(OnnxModel(out, host_library(), "float").logits(subject.batch), wanted) < EXACT


def test_a_merged_linear_multiplies_by_the_kernel_that_ships(subjects: Callable) -> None:
    from edgepeft.quant.linear import multiply_int8

    subject, chance = subjects("bert", "i4b64"), np.random.default_rng(0)
    folder, rows = merged(subject)
    model = torch_merged(subject, folder)
    linears = [model.get_submodule(row["name"]) for row in rows]
    xs = [torch.from_numpy(chance.standard_normal((3, linear.in_features)).astype(np.float32)) for linear in linears]
    with parity.int8_activations(model), torch.inference_mode():
        wanted = [linear(x).numpy() for linear, x in zip(linears, xs, strict=True)]
    multiply_int8(model)
    with torch.inference_mode():
        for linear, x, y in zip(linears, xs, wanted, strict=True):
            assert largest_error(linear(x).numpy(), y) < EXACT


def test_offsets_survive_a_cast_and_leave_with_the_weight(subjects: Callable) -> None:
    subject = subjects("bert", "i4b32")
    name = "bert.encoder.layer.0.output.dense"
    layer = torch_merged(subject, merged(subject)[0]).get_submodule(name)
    before = layer.get_weight()
    assert torch.equal(layer.half().get_weight(), before)
    layer.set_weight(before)
    assert layer.qoffset is None
    assert not torch.equal(layer.get_weight(), before), "a grid alone cannot hold it"


def test_blocks_that_no_offset_fits_go_into_the_grid(subjects: Callable) -> None:
    """PEFT's own default takes means over 16 inputs, half a unit of our kernels."""
    from edgepeft.adapt.terms import Terms

    subject, chance = subjects("bert", "i4b32"), np.random.default_rng(0)
    module = "bert.encoder.layer.0.attention.output.dense"
    a, b = (chance.standard_normal(shape).astype(np.float32) * 0.1 for shape in ((4, SIZE // 16), (SIZE, 4)))
    terms = Terms(a_rk=np.repeat(a, 16, axis=1), b_nr=b, group=16)
    layer = next(dict(row) for row in subject.base.about["layers"] if row["name"] == module)
    figures, changed = merge_terms(module, terms, subject.base, layer)
    assert set(changed) == {f"{module}.qweight", f"{module}.qscale"}
    assert figures["retention"] < 0.999


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qalora_group_size": 64}, "the base's linear is"),
        ({"qalora_group_size": 0}, "expected a whole qalora_group_size"),
        ({"use_dora": True}, "no use_dora"),
        ({"use_qalora": False}, "the base's linear is"),
    ],
)
def test_what_would_mean_another_thing_is_refused(
    subjects: Callable, tmp_path: Path, changes: dict, words: str
) -> None:
    subject = subjects("bert", "i4b32")
    source = saved(subject)
    settings = read_json(source / "adapter_config.json")
    assert (settings["use_qalora"], settings["qalora_group_size"]) == (True, 32), "as PEFT saves it"
    write_json(tmp_path / "adapter_config.json", {**settings, **changes})
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match=words):
        subject.adapter(tmp_path)


def test_the_doctor_finds_it_well_and_fitting(subjects: Callable) -> None:
    from edgepeft.adapt.doctor import diagnose

    subject = subjects("bert", "i4b32")
    report = diagnose(saved(subject), subject.run.folder)
    assert report.usable, report.text()
    assert "lora (qalora)" in report.text()


def test_inputs_that_blocks_do_not_cut_are_refused(subjects: Callable) -> None:
    from edgepeft.adapt.methods import METHODS

    subject = subjects("bert", "i4b32")
    config = subject.config.replace(format="i4b128", method="qalora")
    model = subject.model()
    model.base_model.encoder.layer[0].output.dense = torch.nn.Linear(50, SIZE)
    with pytest.raises(ConfigError, match=r"in blocks of 128.*encoder\.layer\.0\.output\.dense \(K=50\)"):
        METHODS["qalora"].at("prepare", model, config)
