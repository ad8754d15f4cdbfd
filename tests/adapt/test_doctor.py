"""The doctor: every layout becomes the same adapter, every fault is named, and nothing damaged is believed."""

import contextlib
import json
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
from builders import tiny_decoder
from click.testing import CliRunner

from edgepeft.adapt import peft_files
from edgepeft.adapt.doctor import convert, diagnose
from edgepeft.adapt.foreign import gguf
from edgepeft.artifact import read_json, read_tensors, sha256_file
from edgepeft.cli import cli
from edgepeft.errors import ArtifactError, EdgePeftError
from tests.adapt import layouts as lay


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": lay.HIDDEN, "intermediate_size": lay.INNER, "num_hidden_layers": lay.LAYERS}
    heads = {"num_attention_heads": lay.HEADS, "num_key_value_heads": lay.KV_HEADS}
    return tiny_decoder(tmp_path_factory.mktemp("llama") / "tiny", "llama", **sizes, **heads)


def gguf_file(folder: Path) -> Path:
    path = folder / "lora.gguf"
    path.write_bytes(lay.gguf_bytes(lay.gguf_tensors(lay.pairs())))
    return path


def gguf_by_its_library(folder: Path) -> Path:
    pytest.importorskip("gguf", reason="llama.cpp's own library writes the file")
    return lay.write_gguf(folder / "lora.gguf", lay.gguf_tensors(lay.pairs()))


def multimodal(folder: Path) -> Path:
    tensors = {n.replace(".layers", ".language_model.layers"): t for n, t in lay.peft_tensors(lay.pairs()).items()}
    return lay.write_peft(folder / "peft", tensors)


def without_prefix(folder: Path) -> Path:
    tensors = lay.peft_tensors(lay.pairs())
    return lay.write_peft(folder / "peft", {n.removeprefix(lay.PREFIX): t for n, t in tensors.items()})


def compiled(folder: Path) -> Path:
    tensors = lay.peft_tensors(lay.pairs())
    odd = {n.replace("model.layers", "_orig_mod.model.layers", 1).replace(".weight", ".default.weight"): t
           for n, t in tensors.items()}  # fmt: skip
    return lay.write_peft(folder / "peft", odd)


LAYOUTS = {  # name: what writes it, the tool that is named
    "peft": (lambda f: lay.write_peft(f / "peft"), "Hugging Face PEFT"),
    "mlx": (lambda f: lay.write_mlx(f / "mlx"), "mlx-lm"),
    "gguf": (gguf_file, "llama.cpp"),
    "gguf-library": (gguf_by_its_library, "llama.cpp"),
    "genai": (lambda f: lay.write_onnx_adapter(f / "x.onnx_adapter", lay.genai_tensors(lay.pairs())), "ONNX Runtime"),
    "language-model": (multimodal, "Hugging Face PEFT"),
    "without-prefix": (without_prefix, "Hugging Face PEFT"),
    "compiled": (compiled, "Hugging Face PEFT"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_becomes_the_same_adapter(name: str, llama: Path, tmp_path: Path) -> None:
    write, tool = LAYOUTS[name]
    report = diagnose(write(tmp_path), llama)
    assert report.usable, report.text()
    assert report.adapter.tool.startswith(tool)
    convert(report.adapter, tmp_path / "out")
    found = peft_files.read(tmp_path / "out")
    assert len(found.modules) == lay.LAYERS * len(lay.SHAPES)
    for (i, role), (a_rk, b_nr) in lay.pairs().items():
        module = f"model.layers.{i}.{lay.HF[role]}"
        a, b = (found.tensors[f"{lay.PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        np.testing.assert_array_equal(a, a_rk)
        np.testing.assert_allclose(b * found.scale(module), b_nr * (lay.ALPHA / lay.RANK), rtol=1e-6)
    assert diagnose(tmp_path / "out", llama).adapter.changes == ()


def test_patterns_follow_their_modules_names(llama: Path, tmp_path: Path) -> None:
    odd = {n.replace("model.model.layers", "model.base.layers"): t for n, t in lay.peft_tensors(lay.pairs()).items()}
    settings = {"alpha_pattern": {"base.layers.0.self_attn.k_proj": 64}}
    report = diagnose(lay.write_peft(tmp_path / "peft", odd, **settings), llama)
    assert report.usable, report.text()
    convert(report.adapter, tmp_path / "out")
    found = peft_files.read(tmp_path / "out")
    scales = [found.scale(f"model.layers.{i}.self_attn.k_proj") for i in (0, 1)]
    assert scales == [64 / lay.RANK, lay.ALPHA / lay.RANK]


def test_half_an_adapter_is_never_converted(llama: Path, tmp_path: Path) -> None:
    made = lay.gguf_tensors(lay.pairs())
    known = next(iter(made))
    path = tmp_path / "lora.gguf"
    path.write_bytes(
        lay.gguf_bytes({**made, "token_embd.weight.lora_a": made[known], "token_embd.weight.lora_b": made[known]})
    )
    with pytest.raises(EdgePeftError, match="would be left out"):
        convert(diagnose(path, llama).adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_that_lacks_half_a_pair_is_told(llama: Path, tmp_path: Path) -> None:
    made = lay.gguf_tensors(lay.pairs())
    path = tmp_path / "lora.gguf"
    path.write_bytes(
        lay.gguf_bytes({name: array for name, array in made.items() if name != "blk.0.attn_q.weight.lora_b"})
    )
    report = diagnose(path, llama)
    assert not report.usable
    assert "lacks B" in report.text()


@pytest.mark.parametrize(
    "odd",
    [{"modules_to_save": 5}, {"modules_to_save": "classifier"}, {"target_modules": [5]}, {"peft_type": ["LORA"]}],
    ids=str,
)
def test_settings_of_another_type_are_told(tmp_path: Path, odd: dict) -> None:
    with pytest.raises(EdgePeftError, match=f"{next(iter(odd))}: expected a"):
        diagnose(lay.write_peft(tmp_path / "peft", **odd))


def test_peft_itself_loads_what_was_converted(llama: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def logits(folder: Path) -> torch.Tensor:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(folder)).eval()
        with torch.no_grad():
            return model(torch.arange(5)[None]).logits

    convert(diagnose(gguf_file(tmp_path), llama).adapter, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(lay.write_peft(tmp_path / "peft")))


def test_q8_0_is_read_as_its_library_does(llama: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("gguf", reason="llama.cpp's own library is what it is held to")
    kind = library.GGMLQuantizationType.Q8_0
    tensors = {  # llama.cpp leaves rows that are no whole blocks alone
        name: library.quants.quantize(array, kind) if array.shape[-1] % 32 == 0 else array
        for name, array in lay.gguf_tensors(lay.pairs()).items()
    }
    packed = next(name for name, array in tensors.items() if array.dtype == np.uint8)
    found = gguf.read(lay.write_gguf(tmp_path / "q8.gguf", tensors))
    part = packed.replace("blk.0.attn_q.weight.lora_a", f"{lay.PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight")
    np.testing.assert_array_equal(found.tensors[part], library.quants.dequantize(tensors[packed], kind))


def test_the_report_tells_all_that_was_asked(llama: Path, tmp_path: Path) -> None:
    folder = lay.write_peft(tmp_path / "peft", use_rslora=True)
    found = json.loads(json.dumps(diagnose(folder, llama).as_dict()))
    assert (found["rank"], found["alpha"], found["scale"]) == (lay.RANK, lay.ALPHA, lay.ALPHA / lay.RANK**0.5)
    assert (found["method"], found["trained_on"], found["dtype"]) == ("lora (rslora)", "tiny", ["float32"])
    assert len(found["modules"]) == 8
    assert found["usable"]
    text = diagnose(folder, llama).text()
    assert "model.layers.{i}.self_attn.q_proj x 2" in text
    assert text.splitlines()[-1].split() == ["usable", "yes"]


def a_tensor(side: str = "B") -> str:
    return f"{lay.PREFIX}model.layers.1.mlp.down_proj.lora_{side}.weight"


def changed(**parts: np.ndarray | None) -> dict[str, np.ndarray]:
    tensors = {**lay.peft_tensors(lay.pairs()), **{a_tensor(side): array for side, array in parts.items()}}
    return {name: array for name, array in tensors.items() if array is not None}


FAULTS = {  # name: how the folder is written, what has to be said
    "nan": (lambda f: lay.write_peft(f, changed(B=np.full((64, 4), np.nan, np.float32))), "NaN or infinity: .*down"),
    "integers": (lambda f: lay.write_peft(f, changed(B=np.ones((64, 4), np.int8))), "no floats: .*down_proj"),
    "half": (lambda f: lay.write_peft(f, changed(B=None)), "down_proj lacks B"),
    "ranks": (lambda f: lay.write_peft(f, changed(A=np.ones((3, 128), np.float32))), "different ranks"),
    "config-rank": (lambda f: lay.write_peft(f, r=8), r"expected lora_A \[8, K\]"),
    "idle": (
        lambda f: lay.write_peft(f, {n: t * ("lora_A" in n) for n, t in changed().items()}),
        r"loads fine and does nothing: zero in all 8 modules: model.layers.0.mlp.down_proj \(B\)",
    ),
    "size": (lambda f: lay.write_peft(f, changed(A=np.ones((4, 96), np.float32))), r"\[64, 96\], the base \[64, 128\]"),
    "layers": (
        lambda f: lay.write_peft(f, {n.replace("layers.1.", "layers.7."): t for n, t in changed().items()}),
        "4 of 8 modules are not in the base: model.layers.7",
    ),
    "head": (lambda f: lay.write_peft(f, modules_to_save=["score"]), "modules_to_save names score, which the file"),
    "vocabulary": (
        lambda f: lay.write_peft(f, {**changed(), f"{lay.PREFIX}lm_head.weight": np.ones((300, 64), np.float32)},
                                 modules_to_save=["lm_head"]),
        r"lm_head.weight has 300 tokens, the base \d+",
    ),
    "digest": (lambda f: lay.write_peft(f, metadata={"edgepeft.base": "0" * 64}), "on another base: its digest"),
    "off": (lambda f: lay.write_peft(f, lora_alpha=0), "alpha / r is 0: the adapter is switched off"),
    "mlx-name": (lambda f: lay.write_mlx(f, fine_tune_type="dora", lora_parameters={"scale": 0.0}), "switched off"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named(name: str, llama: Path, tmp_path: Path) -> None:
    write, said = FAULTS[name]
    report = diagnose(write(tmp_path / "adapter"), llama)
    assert not report.usable
    assert any(re.search(said, str(f)) for f in report.findings if f.level == "error"), report.text()


def test_a_base_that_is_the_one_trained_on_is_told_by_its_digest(llama: Path, tmp_path: Path) -> None:
    digest = sha256_file(llama / "model.safetensors")
    proved = diagnose(lay.write_peft(tmp_path / "own", metadata={"edgepeft.base": digest}), llama)
    assert [f.level for f in proved.findings] == ["note"]  # not adapted: o, gate, up
    unproved = diagnose(lay.write_peft(tmp_path / "foreign"), llama)
    assert [f.level for f in unproved.findings] == ["warning", "note"]


def test_a_few_idle_modules_are_a_warning(tmp_path: Path) -> None:
    report = diagnose(lay.write_peft(tmp_path / "peft", changed(B=np.zeros((64, 4), np.float32))))
    assert report.usable
    assert "zero in 1 of 8 modules" in report.findings[0].what


def test_a_pickle_is_described_but_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    folder = lay.write_peft(tmp_path / "peft")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    report = diagnose(folder)
    assert not report.usable
    assert "is a pickle" in report.text()
    assert report.as_dict()["rank"] == lay.RANK
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("second", [2, 3, 4, 5])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(second: int, tmp_path: Path) -> None:
    """The first bytes of safetensors are the length of its header, of which 0x80, 0x02 and so on are some."""
    from safetensors.numpy import save_file

    name = f"{lay.PREFIX}model.layers.0.self_attn.q_proj.lora_{{}}.weight"
    pair = {name.format("A"): np.ones((4, 64), np.float32), name.format("B"): np.ones((64, 4), np.float32)}
    start, padding, path = b"", 0, tmp_path / "adapter_model.safetensors"
    while start != bytes([0x80, second]):
        padding += 8
        save_file(pair, path, {"format": "pt", "note": "x" * padding})
        start = path.read_bytes()[:2]
    (tmp_path / "adapter_config.json").write_text(json.dumps(lay.peft_settings()))
    assert diagnose(tmp_path).adapter.layout == "PEFT safetensors"


def test_rows_in_another_order_need_the_base(tmp_path: Path) -> None:
    report = diagnose(gguf_file(tmp_path))
    assert report.usable
    with pytest.raises(ArtifactError, match="Give the base too"):
        convert(report.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_converted_folder_replaces_nothing(tmp_path: Path) -> None:
    folder = lay.write_peft(tmp_path / "peft")
    with pytest.raises(ArtifactError, match="exists already"):
        convert(diagnose(folder).adapter, folder)


DAMAGED = {"gguf": gguf_file, "genai": LAYOUTS["genai"][0], "mlx": LAYOUTS["mlx"][0], "peft": LAYOUTS["peft"][0]}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_anywhere_is_one_clear_error(name: str, tmp_path: Path) -> None:
    place, chance = DAMAGED[name](tmp_path), random.Random(0)
    path = next(place.glob("*.safetensors")) if place.is_dir() else place
    whole = path.read_bytes()
    cuts = {0, 1, 5, 8, 9, 40, len(whole) // 3, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(30))}
    for cut in cuts:
        path.write_bytes(whole[:cut])
        _one_error(place)
    for start in range(0, 400, 9):  # numbers and names of the header
        path.write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8 :])
        _one_error(place, or_a_report=True)


def _one_error(place: Path, or_a_report: bool = False) -> None:
    """Nothing but an error for the user may leave."""
    with contextlib.suppress(EdgePeftError):
        diagnose(place)
        assert or_a_report


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"general.type": "model", "general.architecture": "llama"}, "expected a LoRA adapter"),
        ({**lay.GGUF_VALUES, "general.architecture": "rwkv"}, "architecture 'rwkv'; known are bert, llama"),
        ({**lay.GGUF_VALUES, "adapter.lora.alpha": 0.0}, None),
    ],
)
def test_what_a_gguf_says_of_itself_counts(values: dict, said: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(lay.gguf_bytes(lay.gguf_tensors(lay.pairs()), values))
    if said is None:
        assert diagnose(path).as_dict()["scale"] == 1
    else:
        with pytest.raises(ArtifactError, match=said):
            diagnose(path)


def test_what_is_no_adapter_is_told_with_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"no adapter in it: expected one of .*found notes.txt"):
        diagnose(tmp_path)
    with pytest.raises(ArtifactError, match="no such file"):
        diagnose(tmp_path / "none")
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(80))
    with pytest.raises(ArtifactError, match="other first bytes"):
        diagnose(tmp_path / "x.gguf")
    (tmp_path / "model").mkdir()
    lay.write_peft(tmp_path / "other").joinpath("adapter_model.safetensors").rename(
        tmp_path / "model/model.safetensors"
    )
    with pytest.raises(
        ArtifactError, match=r"no adapter: expected adapter_config\.json beside the tensors, found model"
    ):
        diagnose(tmp_path / "model")
    with pytest.raises(ArtifactError, match="neither a bundle"):
        diagnose(lay.write_peft(tmp_path / "peft"), tmp_path)


def test_bfloat16_becomes_float32_exactly(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = lay.write_peft(tmp_path / "peft")
    tensors = {n: torch.from_numpy(t).bfloat16() for n, t in lay.peft_tensors(lay.pairs()).items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    convert(diagnose(folder).adapter, tmp_path / "out")
    for name, array in read_tensors(tmp_path / "out/adapter_model.safetensors").items():
        np.testing.assert_array_equal(array, tensors[name].float().numpy())
    assert read_json(tmp_path / "out/adapter_config.json")["lora_alpha"] == lay.ALPHA


def test_the_command_reports_and_its_status_says_whether_it_can_be_used(tmp_path: Path) -> None:
    good, bad = lay.write_mlx(tmp_path / "good"), lay.write_peft(tmp_path / "bad", lora_alpha=0)
    asked = CliRunner().invoke(cli, ["doctor", str(good), "--json", "--convert", str(tmp_path / "out")])
    assert asked.exit_code == 0
    assert json.loads(asked.stdout)["tool"] == "mlx-lm"
    assert diagnose(tmp_path / "out").adapter.tool == "Hugging Face PEFT"
    asked = CliRunner().invoke(cli, ["doctor", str(bad)])
    assert asked.exit_code == 1
    assert asked.stdout.splitlines()[-1].split() == ["usable", "no"]


TABLES = {  # what an adapter does to embedding and head: (settings, level, what is said of it) or nothing
    "lora": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, None),
    "enlarged": ({"target_modules": ["q_proj", "embed_tokens"]}, ("error", "has 300 tokens, the base 262")),
    "whole head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, ("error", "was trained whole")),
    "whole table": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
                    ("warning", "unless it is given --embedding-format float")),
    "whole linear": ({"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}, ("error", "was trained whole")),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_embeddings_and_heads_are_judged_as_a_build_does(name: str, llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings, wanted = TABLES[name]
    model = AutoModelForCausalLM.from_pretrained(llama)
    if name == "enlarged":
        model.resize_token_embeddings(300)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    report = diagnose(tmp_path / "adapter", llama)
    found = [(finding.level, str(finding)) for finding in report.findings if "embed" in str(finding) or "proj.w" in
             str(finding) or "lm_head" in str(finding)]  # fmt: skip
    if wanted is None:
        assert (found, report.usable) == ([], True)
    else:
        level, said = wanted
        assert any(level == own and said in text for own, text in found), report.text()
        assert report.usable is (level == "warning")
