"""Exported encoders whose rows have adapters of their own: each is what it is alone, heads of other sizes included."""

import json

import numpy as np
import pytest

from edgepeft.adapt import peft_files
from edgepeft.deploy.compile import host_library
from edgepeft.export.parity import OnnxModel, largest_error
from edgepeft.runtime import adapters as ad
from edgepeft.runtime.mixing import Mixes
from tests.export.tiny_run import HIDDEN, export_run, make_run, random_adapter

TIGHT = 1e-4
HEADS = ("classifier",)


@pytest.fixture(scope="module", params=["i4b32", "i8c"])
def exported(request, tmp_path_factory):
    """(exported folder, {name: folder of a device adapter}), ranks 4, 9 and 1 with 3, 5 and 2 labels."""
    folder = tmp_path_factory.mktemp("mixed")
    config, run = make_run(folder, format=request.param)
    out = export_run(config, run)
    found = {"default": out / "adapters" / "default"}
    for name, rank, labels in (("wide", 9, 5), ("narrow", 1, 2)):
        random_adapter(run, folder / name, rank, labels, HIDDEN, seed=rank)
        peft_files.write_device(folder / "device" / name, folder / name, heads=HEADS)
        found[name] = folder / "device" / name
    return out, found


def batch(rows, length):
    ids = np.random.default_rng(rows).integers(5, 40, (rows, length))
    mask = (np.arange(length) < np.arange(length, length - rows, -1)[:, None]).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@pytest.mark.parametrize("where", ["stock", "library"])
def test_rows_under_their_own_adapters_equal_each_alone(exported, where):
    folder, files = exported
    model = OnnxModel(folder, host_library() if where == "library" else None, "float")
    places = ad.slots(model.session)
    about = json.loads((folder / "export.json").read_text())
    digest = ad.tensor_header(files["default"] / ad.TENSORS)[1]["edgepeft.base"]
    loaded = {n: ad.load_adapter(f, places, digest, about["format"], [], {}) for n, f in files.items()}
    loaded["none"] = ad.base_adapter(places, ())
    mixes = Mixes(places, lambda: loaded["default"])
    names = ["wide", "none", "narrow", "default", "wide"]
    rows, arrays = [loaded[name] for name in names], batch(5, 9)
    assert mixes.groups(rows) == [[0, 1, 2, 3, 4]]
    mix = mixes.of(rows)
    feeds = mix.feeds(rows)
    found = model.logits(arrays, {name: value.numpy() for name, value in feeds.items()})
    for place, adapter in enumerate(rows):
        own = {name: value.numpy() for name, value in adapter.feeds.items()}
        alone = model.logits({name: array[place : place + 1] for name, array in arrays.items()}, own)
        part = found[place : place + 1, mix.labels(adapter)]
        assert part.shape == alone.shape
        assert largest_error(part, alone) < TIGHT
