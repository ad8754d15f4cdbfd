"""A model layer by layer: what reaches each linear on calibration texts, with one layer's weights in memory.

    ids ─ embeddings ─► layer 0 ─► layer 1 ─► ... ─► final norm | first token         two streams side by side:
                                                                                      float, and behind packed weights

The skeleton is the transformers model on the meta device, so masks, positions and windows are its own: run once with
recorders in the place of its layers, it tells what each layer is called with. A layer then gets float weights, is
called on the hidden states [M, S, K] of every batch, and is emptied again. Padding is left out of all that is counted.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from edgepeft.backbone.families import Family
    from edgepeft.backbone.load import ModelSource
    from edgepeft.config import Config

BATCH_ROWS = 8


class _Reached(Exception):  # noqa: N818 - no error: a way out of a forward pass
    """Carries the input of the module that was waited for."""


class _Recorder(torch.nn.Module):
    """Stands where a layer stood; keeps what it is called with and passes the hidden states on."""

    def __init__(self, layer: torch.nn.Module, last: bool) -> None:
        super().__init__()
        self.kept, self.last = [layer], last  # in a list it is no part of this module
        self.calls: list[tuple[torch.Tensor, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.kept[0], name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((hidden, args, kwargs))
        if self.last:
            raise _Reached
        return hidden


class Stream:
    """Batches of calibration rows on their way through a model's layers."""

    def __init__(self, config: Config, source: ModelSource, family: Family, rows: Sequence[Sequence[int]]) -> None:
        from edgepeft.backbone.load import empty_model

        self.family, self.model = family, empty_model(source.path, (), config).eval()
        self.batches, self.masks = _batches(rows)
        name = next(name for name in family.linears.values() if "{i}" in name)
        self.container = f"{family.prefix}.{name.partition('.{i}')[0]}"
        self.layers = self.model.get_submodule(self.container)
        self.calls: list[list[tuple[Any, Any]]] = []

    @torch.no_grad()
    def embed(self, tensors: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        """Return what reaches the first layer, per batch [M, S, K]. tensors: all that lies outside the layers."""
        fill(self.model, tensors)
        recorders = [_Recorder(layer, layer is self.layers[-1]) for layer in self.layers]
        whole = self.layers
        parent, _, last = self.container.rpartition(".")
        setattr(self.model.get_submodule(parent), last, torch.nn.ModuleList(recorders))
        try:
            for ids, mask in zip(self.batches, self.masks, strict=True):
                self._record(ids, mask)
        finally:
            setattr(self.model.get_submodule(parent), last, whole)
        self.calls = [[(args, kwargs) for _, args, kwargs in recorder.calls] for recorder in recorders]
        return [hidden for hidden, _, _ in recorders[0].calls]

    def _record(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        # A decoder sees nothing of what comes after a token, so padding on the right needs no mask.
        masks = {"attention_mask": mask.long()} if self.family.kind == "encoder" else {"use_cache": False}
        try:
            getattr(self.model, self.family.prefix)(input_ids=ids, **masks)
        except _Reached:
            return

    def layer(self, i: int, tensors: Mapping[str, np.ndarray]) -> torch.nn.Module:
        """Return a copy of a layer that holds its tensors, named as in the task model."""
        begin = f"{self.container}.{i}."
        layer = copy.deepcopy(self.layers[i])
        fill(layer, {name.removeprefix(begin): array for name, array in tensors.items()})
        return layer

    @torch.no_grad()
    def run(self, i: int, layer: torch.nn.Module, hidden: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield what a layer makes of each batch."""
        for x, (args, kwargs) in zip(hidden, self.calls[i], strict=False):
            out = layer(x, *args, **kwargs)
            yield out if isinstance(out, torch.Tensor) else out[0]

    def inputs(
        self, i: int, layer: torch.nn.Module, module: str, hidden: Sequence[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Yield each batch's inputs [T, K] of one linear within a layer, padding left out."""
        part = layer.get_submodule(module.removeprefix(f"{self.container}.{i}."))

        def reached(_: Any, args: Any) -> None:
            raise _Reached(args[0])

        handle = part.register_forward_pre_hook(reached)
        try:
            for b in range(len(hidden)):
                args, kwargs = self.calls[i][b]
                try:
                    with torch.no_grad():
                        layer(hidden[b], *args, **kwargs)
                except _Reached as found:
                    yield found.args[0][self.masks[b]]
        finally:
            handle.remove()

    def top(self, hidden: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield what reaches the head of a decoder [T, K], or the pooler of an encoder [M, K]."""
        for x, mask in zip(hidden, self.masks, strict=False):
            if self.family.kind == "encoder":
                yield x[:, 0]
            else:
                norm = self.model.get_submodule(f"{self.family.prefix}.{self.family.norms['final']}")
                with torch.no_grad():
                    found = norm(x)[mask]
                yield found


def fill(module: torch.nn.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Give a module its tensors; those that it has no place for are left out."""
    there = {name for name, _ in module.named_parameters()}
    found = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items() if name in there}
    module.load_state_dict(found, strict=False, assign=True)


def _batches(rows: Sequence[Sequence[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return (ids int64 [M, S], masks bool [M, S]) of rows of like length, padded on the right with token 0.

    Long and short ones are mixed, so that a few batches stand for all.
    """
    rows, batches, masks = sorted(rows, key=len), [], []
    starts = list(range(0, len(rows), BATCH_ROWS))
    random.Random(0).shuffle(starts)
    for start in starts:
        part = rows[start : start + BATCH_ROWS]
        ids = torch.zeros(len(part), len(part[-1]), dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for j, row in enumerate(part):
            ids[j, : len(row)], mask[j, : len(row)] = torch.tensor(row), True
        batches.append(ids)
        masks.append(mask)
    return batches, masks
