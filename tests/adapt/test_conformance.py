"""Every setting that PEFT can save, and every method, is exact on the device or refused with its reason."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgepeft.adapt.methods import METHODS
from edgepeft.adapt.terms import TERMS_FILE
from edgepeft.artifact import read_tensors
from edgepeft.errors import EdgePeftError
from edgepeft.export.emitter import ADAPTER_FILE
from edgepeft.quant.formats import FORMATS
from tests.adapt.conformance import (
    BEGIN,
    COLUMNS,
    END,
    FLOAT,
    HALF,
    KINDS_OF_MODELS,
    Outcome,
    Subject,
    cell,
    merged,
    separate,
    table,
    write_into,
)
from tests.adapt.foreign_settings import DECODER_SETTINGS, LORA_SETTINGS

TAGS = ("i4b32", "i8c", "nf4b64")
EACH = {**dict.fromkeys(METHODS), **LORA_SETTINGS}
PROMPTS = [name for name, method in METHODS.items() if method.prompt]
CELLS = [
    *(("bert", name) for name in EACH),
    *(("llama", name) for name in {**EACH, **DECODER_SETTINGS} if name != "bitfit"),
    *(("tied", name) for name in DECODER_SETTINGS),
]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Subject]:
    """A function that gives the packed model of a kind and a format, made once."""
    made: dict[tuple[str, str], Subject] = {}

    def get(kind: str, tag: str) -> Subject:
        if (kind, tag) not in made:
            place = tmp_path_factory.mktemp(f"{kind}-{tag}")
            tied = kind == "tied"
            made[kind, tag] = Subject(place, "llama" if tied else kind, tag, "llama3" if tied else "")
        return made[kind, tag]

    return get


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_the_graph_gives_what_peft_gives(subjects: Callable, kind: str, name: str) -> None:
    tag = TAGS[[pair[1] for pair in CELLS].index(name) % len(TAGS)]
    found = separate(subjects(kind, tag), name)
    assert found["graph"] <= FLOAT
    assert found["layers"] <= FLOAT
    assert found["float16"] <= HALF
    assert found["rounding"] <= 1
    assert found["effect"] > 0.05, "the adapter should matter"


@pytest.mark.parametrize("form", ["separate", "merged"])
def test_what_cannot_be_is_refused(subjects: Callable, form: str) -> None:
    assert "no biases to train" in cell(subjects("llama", "i4b32"), "bitfit", form)
    for name in PROMPTS:
        found = cell(subjects("llama", "i4b32"), name, "merged")
        assert found == "refused: a prompt stands before the text and in no weight"
    apart = [name for name in METHODS if "beside its weight" in cell(subjects("llama", "i4b32"), name, "merged")]
    assert sorted([*apart, *PROMPTS]) == sorted(name for name, method in METHODS.items() if method.apart)
    with pytest.raises(EdgePeftError, match="is an embedding"):
        merged(subjects("llama", "i4b32"), "embeddings")


def test_shared_tensors_are_stored_once(subjects: Callable) -> None:
    from edgepeft.adapt.terms import aliases
    from edgepeft.artifact import tensor_header

    subject = subjects("bert", "i4b32")
    out = subject.export(subject.made("share-layers"))
    header, metadata, _ = tensor_header((out / ADAPTER_FILE).with_name(TERMS_FILE))
    alias = aliases(metadata)
    assert len(alias) == 12, "all but the pooler's two and the head's, in a model of two layers"
    assert set(alias.values()) <= set(header)
    assert not set(alias) & set(header)
    peft = json.loads((out / ADAPTER_FILE).with_name("adapter_config.json").read_text())
    assert len(peft["target_modules"]) == 13, "PEFT's own file repeats them"


@pytest.mark.parametrize("name", PROMPTS)
def test_padding_behind_a_prompt_changes_nothing(subjects: Callable, name: str) -> None:
    from edgepeft.export.parity import OnnxModel

    subject = subjects("bert", "i4b32")
    out = subject.export(subject.made(name))
    short = {key: array[:, :6] for key, array in subject.batch.items()}
    padded = {key: np.where(np.arange(9) < 6, array, 0) for key, array in subject.batch.items()}
    model, torch_model = OnnxModel(out, None), subject.model((out / ADAPTER_FILE).parent)
    for batch in (short, padded):
        assert np.abs(model.logits(batch) - subject.logits(torch_model, short)).max() <= FLOAT
    assert np.abs(model.logits(padded) - model.logits(subject.batch)).max() > FLOAT


@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for k in ("bert", "llama") for n in ("experts", "houlsby", "parallel")] + [("bert", n) for n in PROMPTS],
)
def test_a_branch_can_be_switched_off_or_left_out(subjects: Callable, kind: str, name: str) -> None:
    """The runtime's neutral tensors leave the base; a LoRA in a graph of experts has a gate of 1."""
    from edgepeft.export.parity import OnnxModel
    from edgepeft.runtime.adapters import for_graph, slots

    subject = subjects(kind, "i4b32")
    model = OnnxModel(subject.export(subject.made(name)), None)
    places = slots(model.session)
    neutral = {key: slot.empty() for key, slot in places.items() if slot.neutral}
    assert any(slot.branch for slot in places.values())
    base = subject.logits(subject.model())
    if not subject.heads:  # a head comes with its adapter
        assert np.abs(model.logits(subject.batch, neutral) - base).max() <= FLOAT
    assert np.array_equal(model.logits(subject.batch, neutral), model.logits(subject.batch, model.without_adapter()))
    if name in ("experts", *PROMPTS):
        folder = subject.export(subject.made("lora"))
        tensors = {key: value for key, value in read_tensors(folder / ADAPTER_FILE).items() if key in places}
        lora = for_graph(tensors)
        wanted = subject.logits(subject.model((folder / ADAPTER_FILE).parent))
        assert np.abs(model.logits(subject.batch, {**neutral, **lora}) - wanted).max() <= FLOAT


@pytest.mark.parametrize("name", ["experts", "houlsby", "parallel"])
def test_a_branch_is_never_merged(subjects: Callable, name: str) -> None:
    with pytest.raises(EdgePeftError, match="has a branch beside its weight"):
        merged(subjects("bert", "i4b32"), name)


def test_a_router_that_fits_no_experts_is_refused(subjects: Callable) -> None:
    from safetensors.torch import load_file, save_file

    subject = subjects("bert", "i4b32")
    folder = subject.made("experts")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_router.weight"))
    save_file({**tensors, name: tensors[name][:3].clone()}, folder / "adapter_model.safetensors")
    with pytest.raises(EdgePeftError, match="do not go together"):
        subject.adapter(folder)


def test_a_changed_embedding_is_not_taken_for_the_base(subjects: Callable, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    subject = subjects("llama", "i4b32")
    folder = subject.made("embeddings")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.base_layer.qscale"))
    tensors[name] = tensors[name] * 2
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(EdgePeftError, match="the vocabulary was resized"):
        subject.adapter(folder)


def table_of(text: str) -> list[list[str]]:
    """Return the formats named between README's marker lines, then the table there, row by row."""
    lines = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [re.findall("`(.+?)`", lines[0]), *rows]


def test_readme_names_every_method_and_format_and_no_other() -> None:
    formats, head, _, *rows = table_of((Path(__file__).parents[2] / "README.md").read_text())
    assert formats == list(FORMATS)
    assert head[1:] == [f"{kind}, {form}" for kind, form in COLUMNS]
    assert [row[0].strip("`") for row in rows] == list(METHODS)
    assert all(re.search("exact|kept|refused", part) for row in rows for part in row[1:])
    assert not any("off," in part for row in rows for part in row)


def test_a_cell_is_the_worst_of_all_formats_or_tells_them_apart(tmp_path: Path) -> None:
    whole = {tag: Outcome("exact", error=2e-6, rounding=0.5) for tag in FORMATS}
    cells = {(method, *column): whole for method in METHODS for column in COLUMNS}
    cells["lora", "encoder", "merged"] = {**whole, "nf4b64": Outcome("refused", "it is full")}
    cells["dora", "decoder", "separate"] = {**whole, "i8c": Outcome("exact", error=3e-5, rounding=0.7)}
    (tmp_path / "r.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_into(tmp_path / "r.md", table(cells))
    text = (tmp_path / "r.md").read_text()
    rows = {row[0].strip("`"): row[1:] for row in table_of(text)[3:]}
    assert rows["lora"][1] == "`i8c` `i4b32` `i4b64` `i4b128`: exact, 1e-5; 0.50; `nf4b64`: refused (1)"
    assert rows["dora"][2] == "exact, 1e-4; 0.70"
    assert "1. it is full" in text
    assert (text.startswith("before\n"), text.endswith("after\n"), "old" in text) == (True, True, False)


@pytest.mark.slow
@pytest.mark.parametrize("tag", FORMATS)
@pytest.mark.parametrize("kind", KINDS_OF_MODELS.values())
def test_every_method_in_every_format(tmp_path: Path, kind: str, tag: str) -> None:
    subject = Subject(tmp_path, kind, tag)
    odd = {name: found for name in METHODS if (found := cell(subject, name, "separate")) != "exact"}
    assert set(odd) <= {"bitfit"}, odd


def test_terms_and_rounding_are_not_lost_in_numpy(subjects: Callable) -> None:
    subject = subjects("bert", "i4b32")
    effect = subject.adapter(subject.made("lokr")).effect(subject.base)
    for terms in effect.modules.values():
        halves = [value.astype(np.float16).astype(np.float32) for value in (terms.a_rk, terms.b_nr)]
        for value, half in zip((terms.a_rk, terms.b_nr), halves, strict=True):
            assert np.allclose(value, half, rtol=1e-3, atol=1e-4 * np.abs(value).max())
