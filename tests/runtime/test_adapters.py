"""What does not go together in an adapter's file is told when it is loaded, not by ONNX Runtime when it runs."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builders import LABELS, tiny_bert

from edgepeft.adapt import peft_files
from edgepeft.adapt.base import Base
from edgepeft.artifact import read_tensors, tensor_header, write_json, write_tensors
from edgepeft.deploy.bundle import bundle
from edgepeft.errors import ArtifactError
from edgepeft.export.emitter import ADAPTER_FILE
from edgepeft.export.parity import OnnxModel
from edgepeft.runtime import adapters as ad
from tests.adapt.conformance import Subject
from tests.export.tiny_run import export_run, make_run, random_adapter

DENSE = "base_model.model.bert.encoder.layer.0.output.dense"
Change = Callable[[dict[str, np.ndarray]], None]


def without(*endings: str) -> Change:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for ending in endings:
            del tensors[f"{DENSE}.{ending}"]

    return change


def cut(ending: str, axis: int = 0) -> Change:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{DENSE}.{ending}"] = tensors[f"{DENSE}.{ending}"].take(range(3), axis)

    return change


FAULTS: dict[str, tuple[str, Change, str]] = {
    "no down": ("houlsby", without("lora_down.weight"), "lora_down.weight is missing, and others of its bottleneck"),
    "no bias": ("houlsby", without("lora_up.bias"), "lora_up.bias is missing, and others of its bottleneck"),
    "none beside": ("parallel", without("lora_beside_up.weight"), "lora_beside_up.weight is missing"),
    "narrow bias": ("pfeiffer", cut("lora_down.bias"), "expected one width, found 4, 3 and 4"),
    "narrow up": ("pfeiffer", cut("lora_up.weight", 1), "expected one width, found 4, 4 and 3"),
    "three experts": ("experts", cut("lora_router.weight"), "has 3 experts for a rank of 16"),
    "no experts": ("experts", without("lora_A.weight", "lora_B.weight"), "for a rank of 0"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Subject, Path, dict[str, ad.Slot]]]:
    """A function that gives (packed model, adapter's folder, places of the graph) of a method, made once."""
    subject, made = Subject(tmp_path_factory.mktemp("subject"), "bert"), {}

    def get(method: str) -> tuple[Subject, Path, dict[str, ad.Slot]]:
        if method not in made:
            out = subject.export(subject.made(method))
            made[method] = subject, (out / ADAPTER_FILE).parent, ad.slots(OnnxModel(out, None).session)
        return made[method]

    return get


def loaded(subject: Subject, folder: Path, places: dict[str, ad.Slot]) -> ad.Adapter:
    return ad.load_adapter(folder, places, subject.base.digest, "i4b32", list(subject.labels), {})


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_do_not_go_together_are_named(exported: Callable, tmp_path: Path, fault: str) -> None:
    method, change, words = FAULTS[fault]
    subject, folder, places = exported(method)
    assert loaded(subject, folder, places).feeds
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = next(path for name in (ad.TERMS, ad.TENSORS) if (path := tmp_path / name).exists())
    tensors, metadata = {n: np.array(t) for n, t in read_tensors(file).items()}, tensor_header(file)[1]
    change(tensors)
    write_tensors(file, tensors, metadata)
    with pytest.raises(ArtifactError, match=words):
        loaded(subject, tmp_path, places)


COST = """
import sys
from pathlib import Path
from edgepeft.runtime import load


def held() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


model, text = load(sys.argv[1], threads=1, library="none"), ["turn off the lamp"]
for name in ("default", "none", "warm"):
    model.logits(text, name)
before = held()
for i in range(50):
    model.logits(text, f"a{i}")
print(held() - before)
"""


def test_fifty_adapters_cost_what_their_files_hold(tmp_path: Path) -> None:
    """Of rank 16, all in use, mapped files included: at most 1.1 times their bytes."""
    config, run = make_run(tmp_path, model=tiny_bert(tmp_path / "model", hidden=256), hidden=256)
    training = {"labels": list(LABELS), "config": dataclasses.asdict(config)}
    write_json(run.path("adapter") / "training.json", training)
    export_run(config, run)
    run.path("verify").mkdir()
    write_json(run.path("verify") / "report.json", {"checks": {}})
    run.make("bundle", "", lambda out: bundle(config, run, out))
    place = run.path("bundle") / "adapters"
    random_adapter(run, tmp_path / "peft", rank=16, hidden=256)
    base = Base.open(run.path("quantized"))
    peft_files.write_device(place / "warm", tmp_path / "peft", base=base, heads=("classifier",))
    for i in range(50):
        shutil.copytree(place / "warm", place / f"a{i}")
    held = subprocess.run(
        [sys.executable, "-c", COST, str(run.path("bundle"))], capture_output=True, text=True, check=True
    )
    files = 50 * (place / "warm" / ad.TENSORS).stat().st_size
    assert 0.5 * files <= int(held.stdout) <= 1.1 * files
