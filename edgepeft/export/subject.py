"""What is verified: one export, its texts, and the PyTorch model it came from, each made at its first use.

`SUBJECTS` has one for each task. A language model is compared on one row at a time: it has no padding to compare.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from edgepeft.adapt import choice, peft_files
from edgepeft.adapt.base import Base
from edgepeft.adapt.device import write_form
from edgepeft.adapt.merge import merged_model
from edgepeft.adapt.terms import TERMS_FILE, aliases
from edgepeft.artifact import Run, read_json, read_tensors, tensor_header
from edgepeft.errors import TargetError
from edgepeft.export import parity
from edgepeft.export.emitter import ADAPTER_FILE
from edgepeft.export.parity import OnnxModel, Trace
from edgepeft.runtime.adapters import for_graph
from edgepeft.train.tasks import TASKS

if TYPE_CHECKING:
    from edgepeft.config import Config
    from edgepeft.train.data import Splits

TRACED, BATCH = 8, 32
SAMPLE_TOKENS = 6
JUDGED = 32


class Skipped(Exception):  # noqa: N818 - not an error
    """A check cannot run here, for the reason given."""


@dataclasses.dataclass
class Subject:
    """One export and the PyTorch models it came from.

    adapters: {name: PyTorch model}, "trained" as PEFT saved it and "exported" as PEFT loads the exported folder; of a
    merged model the same under both names. `model` is the one that `adapter` chose.
    """

    config: Config
    run: Run
    out: Path
    splits: Splits
    tokenizer: Any
    adapters: dict[str, Any]
    library: Path | None
    why_no_library: str
    chosen: str = "exported"
    models: dict[tuple[bool, str | None, bool], OnnxModel] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, config: Config, run: Run, out: Path) -> Self:
        """Load splits, tokenizer and models of a run."""
        from edgepeft.train.data import load_splits
        from edgepeft.train.loop import load_tokenizer
        from edgepeft.train.watch import quiet

        splits, config = load_splits(config), choice.decided(config, run)
        library, why = _library()
        with quiet():
            tokenizer, adapters = load_tokenizer(run.path("quantized")), _torch_models(config, run, splits.labels)
        return cls(config, run, out, splits, tokenizer, adapters, library, why)

    def sample(self, count: int) -> dict[str, np.ndarray]:
        """Return `count` inputs to compare layers on: arrays that graph and PyTorch both take."""
        raise NotImplementedError

    def device_runs(self, count: int) -> list[dict[str, np.ndarray]]:
        """Return what to feed the graph on a device, run by run."""
        return [self.onnx(True, "float").feeds(self.sample(count))]

    @property
    def folder(self) -> Path:
        """The exported folder."""
        return self.run.path("export")

    @property
    def merged(self) -> bool:
        """Whether the adapter went into the weights."""
        return self.config.adapter == "merged"

    @property
    def split(self) -> Any:
        """What to judge by: test, or validation where there is no test split."""
        return self.splits.test if len(self.splits.test) else self.splits.validation

    @property
    def split_name(self) -> str:
        """Which split that is."""
        return "test" if len(self.splits.test) else "validation"

    def onnx(self, library: bool, activation: str | None = None, traced: bool = False) -> OnnxModel:
        """Return a session on the exported files, made once; `library` False is stock ONNX Runtime."""
        if library and self.library is None:
            raise Skipped(self.why_no_library)
        key = (library, activation, traced)
        if key not in self.models:
            path = self.library if library else None
            self.models[key] = OnnxModel(self.folder, path, activation, self.config.threads, traced)
        return self.models[key]

    @property
    def shipped(self) -> OnnxModel:
        """The model as a device runs it, or on stock ONNX Runtime where there is no library."""
        return self.onnx(self.library is not None)

    @property
    def model(self) -> Any:
        """The PyTorch model with the adapter that was chosen."""
        return self.adapters[self.chosen]

    def bare(self) -> Any:
        """Return the packed model in PyTorch as it was before any training: PEFT does not give its biases back."""
        from edgepeft.backbone.load import quantized_model

        return quantized_model(self.run.path("quantized"), self.splits.labels, self.config)

    def adapter(self, name: str) -> None:
        """Put an adapter in place: "trained" or "exported"; nothing to choose in a merged model."""
        self.chosen = name

    @functools.cached_property
    def float_trace(self) -> Trace:
        """PyTorch's layers under the exported adapter, in float."""
        self.adapter("exported")
        return parity.torch_trace(self.model, self.sample(TRACED), self.layers)

    def device_form(self, folder: Path, exact: bool) -> Trace:
        """Write the device form of the trained adapter below `folder`, `exact` in float32; return PyTorch's layers."""
        from edgepeft.train.watch import quiet

        base = Base.open(self.run.path("quantized"))
        write_form(folder, peft_files.read(self.run.path("adapter"), base=base), base, exact)
        with quiet():
            model = adapted_model(self.config, self.run, self.splits.labels, folder)
        return parity.torch_trace(model, self.sample(TRACED), self.layers)

    @functools.cached_property
    def layers(self) -> list[str]:
        """The layers that the graph can show, in the order they are computed."""
        return self.onnx(False, traced=True).layers

    @functools.cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """The exported adapter's tensors as the graph takes them."""
        file = self.folder / ADAPTER_FILE
        terms = file.with_name(TERMS_FILE)
        file = terms if terms.exists() else file
        stored = read_tensors(file)
        same = {name: stored[source] for name, source in aliases(tensor_header(file)[1]).items()}
        return for_graph({**stored, **same})


class Labelled(Subject):
    """A classifier and its labelled texts."""

    @functools.cached_property
    def examples(self) -> list[dict[str, Any]]:
        """The split as token ids."""
        from edgepeft.train.loop import token_limit

        return self.split.encode(self.tokenizer, token_limit(self.model, self.config))

    def batch(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Return padded int64 arrays [M, S] for the graph and for PyTorch."""
        padded = TASKS[self.config.task].collate(examples, self.tokenizer.pad_token_id or 0)
        arrays = {name: tensor.numpy() for name, tensor in padded.items() if name != "labels"}
        return {"token_type_ids": np.zeros_like(arrays["input_ids"]), **arrays}

    def sample(self, count: int) -> dict[str, np.ndarray]:
        """Return a few examples from the shortest to the longest of the split, padded together."""
        order = sorted(self.examples, key=lambda row: len(row["input_ids"]))
        places = np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))
        return self.batch([order[i] for i in places])

    def predict(self, logits: Callable[[dict[str, np.ndarray]], np.ndarray], count: int | None = None) -> np.ndarray:
        """Return the logits of the split's first `count` examples, in their order."""
        rows = self.examples[:count]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        parts = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        found = np.concatenate([logits(self.batch([rows[i] for i in part])) for part in parts])
        return found[np.argsort(order)]


@dataclasses.dataclass
class Written(Subject):
    """A language model and the texts it learned to write.

    judgements, amplitudes: what checks share, see `token_checks`; amplitudes are those of keys and values.
    """

    judgements: Any = None
    amplitudes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def examples(self) -> list[dict[str, Any]]:
        """The split as token ids and targets; no more of it than is judged."""
        from edgepeft.train.loop import token_limit

        limit = min(token_limit(self.model, self.config), read_json(self.folder / "export.json")["context"])
        return self.judged.encode(self.tokenizer, limit)

    @functools.cached_property
    def judged(self) -> Any:
        """The first `JUDGED` of the split."""
        return dataclasses.replace(self.split, rows=self.split.rows[:JUDGED])

    def sample(self, count: int) -> dict[str, np.ndarray]:
        """Return the beginning of the longest text, `SAMPLE_TOKENS` for every one of `count`, as one row."""
        longest = max(self.examples, key=lambda row: len(row["input_ids"]))["input_ids"]
        ids = np.array([longest[: SAMPLE_TOKENS * count]], np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def device_runs(self, count: int) -> list[dict[str, np.ndarray]]:
        """Return a run of several tokens, and one of a single token on top of them."""
        batch, model = self.sample(count), self.onnx(True, "float")
        ids = batch["input_ids"]
        step = {**model.feeds({**batch, "input_ids": ids[:, -1:]}), **model.past(ids[:, :-1])}
        return [model.feeds(batch), step]


SUBJECTS: dict[str, type[Subject]] = {"text-classification": Labelled, "text-generation": Written}


def _library() -> tuple[Path | None, str]:
    from edgepeft.deploy.compile import host_library

    try:
        return host_library(), ""
    except TargetError as error:
        return None, f"no op library for this machine: {error}"


def _torch_models(config: Config, run: Run, labels: Sequence[str]) -> dict[str, Any]:
    """Return the packed model in PyTorch with the trained and the exported adapter, or merged with its head."""
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    if config.adapter == "merged":
        return dict.fromkeys(
            ("trained", "exported"), merged_model(run.path("merged"), run.path("adapter"), labels, config).eval()
        )
    folders = {"trained": run.path("adapter"), "exported": (run.path("export") / ADAPTER_FILE).parent}
    return {name: adapted_model(config, run, labels, folder) for name, folder in folders.items()}


def adapted_model(config: Config, run: Run, labels: Sequence[str], folder: Path) -> Any:
    """Return the packed model in PyTorch with an adapter as PEFT loads it."""
    from edgepeft.adapt import layers
    from edgepeft.backbone.load import quantized_model

    model = quantized_model(run.path("quantized"), labels, config)
    return layers.load(model, folder).eval()
