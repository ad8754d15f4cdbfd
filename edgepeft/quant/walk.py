"""Quantizing along the model: each linear is solved on the inputs that its quantized predecessors give it.

    embeddings ─► for each layer:  [scale columns (awq)] ─► q k v ─► o ─► gate up ─► down ─► next layer ─► head | pooler

Two streams run side by side, one behind float weights and one behind what was packed, both of one bounded sample of
texts; of a linear's inputs only two K x K matrices stay (`statistics`). One layer is in memory at a time, twice.

A head that is the word embedding too is packed first, since all layers read it. What its inputs as a head say is taken
from a pass of the float model; as an embedding each of its columns weighs alike, so a share of the identity is added.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepeft.backbone.checkpoint import backbone_names, iter_tensors
from edgepeft.console import progress, say
from edgepeft.quant import awq
from edgepeft.quant.calibration import rows
from edgepeft.quant.solvers import SOLVERS
from edgepeft.quant.statistics import Statistics, collect
from edgepeft.quant.stream import Stream

if TYPE_CHECKING:
    from edgepeft.backbone.load import ModelSource
    from edgepeft.quant.formats import WeightFormat
    from edgepeft.quant.stage import Work

# Roles of a layer's linears in the order in which they compute; those of one entry share their input.
INPUTS = (("q", "k", "v", "qkv"), ("o",), ("gate", "up", "gate_up"), ("down",))
EMBEDDING_SHARE = 0.3


def calibrate(source: ModelSource, work: Work, kinds: Mapping[str, str]) -> None:
    """Pack a model along its layers, on a sample of calibration texts.

    Raises ModelError as `Work.add` does, DataError for texts that cannot be read, ConfigError for a size too small.
    """
    from edgepeft.quant.stage import drawn

    names = backbone_names(source, work.family)
    tensors = Tensors(source, names, dict(drawn(source, names, kinds)))
    sample = rows(work.config, source.path)
    say(f"calibrating on {len(sample)} rows, {sum(map(len, sample))} tokens")
    walk = Walk(source, work, tensors, kinds, sample)
    if work.config.size:
        from edgepeft.quant.sensitivity import choose

        work.chosen.update(choose(walk))
    walk.quantize()


class Tensors:
    """A checkpoint's backbone under the names of the task model, read when asked for."""

    def __init__(self, source: ModelSource, names: Mapping[str, str], drawn: Mapping[str, np.ndarray]) -> None:
        self.source, self.old, self.drawn = source, {new: old for old, new in names.items()}, drawn

    def read(self, wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the tensors of these names, float32."""
        by_old = {self.old[name]: name for name in wanted if name in self.old}
        found = {by_old[old]: array.astype(np.float32) for old, array in iter_tensors(self.source, by_old)}
        return {**found, **{name: self.drawn[name] for name in wanted if name in self.drawn}}


class Walk:
    """One model, one sample of texts as rows of ids, and the work that is done on them."""

    def __init__(
        self,
        source: ModelSource,
        work: Work,
        tensors: Tensors,
        kinds: Mapping[str, str],
        sample: Sequence[Sequence[int]],
    ) -> None:
        self.work, self.family, self.tensors, self.kinds = work, work.family, tensors, kinds
        self.settings = source.settings
        self.stream = Stream(work.config, source, work.family, sample)
        self.count = int(self.settings[work.family.layers_setting])
        self.word = f"{work.family.prefix}.{work.family.embeddings['word']}.weight"

    # --- names ---

    def names(self, i: int) -> list[str]:
        """Return the tensors of a layer."""
        return [name for name in self.kinds if name.startswith(f"{self.stream.container}.{i}.")]

    def outside(self) -> list[str]:
        """Return the tensors that lie in no layer."""
        return [name for name in self.kinds if not name.startswith(f"{self.stream.container}.")]

    def module(self, role: str, i: int) -> str:
        """Return the module of a layer that plays a role."""
        family = self.family
        return f"{family.prefix}." + {**family.linears, **family.norms}[role].format(i=i)

    def groups(self, i: int) -> list[list[str]]:
        """Return the linears of a layer, those that share their input together."""
        here = [[self.module(role, i) for role in roles if role in self.family.linears] for roles in INPUTS]
        return [group for group in here if group]

    # --- quantizing ---

    def quantize(self) -> None:
        """Pack all tensors."""
        outside = self.tensors.read(self.outside())
        embeddings = [name for name in outside if self.kinds[name] == "embedding"]
        plain = self.stream.embed(outside)
        head = self._as_head(plain) if self.work.tied and SOLVERS[self.work.config.solver].solver else None
        decoded = {name: self.add(name, outside[name], head if name == self.word else None) for name in embeddings}
        quantized = self.stream.embed({**outside, **decoded})
        for i in progress(range(self.count), "calibrate", self.count):
            tensors = self.tensors.read(self.names(i))
            if SOLVERS[self.work.config.solver].scales:
                self._scale(i, tensors, plain, quantized)
            plain, quantized = self._layer(i, tensors, plain, quantized)
        top = collect(self.stream.top(quantized), self.stream.top(plain))
        for name in outside.keys() - set(embeddings):
            self.add(name, outside[name], top if self.kinds[name] in ("head", "linear") else None)

    def add(self, name: str, array: np.ndarray, seen: Statistics | None = None) -> np.ndarray:
        """Pack a tensor and return it as it will multiply."""
        packed = self.work.add(name, self.kinds[name], array, seen)
        fmt = self.work.format(name.removesuffix(".weight"), self.kinds[name], array.shape)[0] if packed else None
        return array if packed is None or fmt is None else fmt.dequantize(packed)

    def _layer(
        self, i: int, tensors: dict[str, np.ndarray], plain: list[torch.Tensor], quantized: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Pack one layer and return the hidden states behind it, float and quantized."""
        first, second = self.stream.layer(i, tensors), self.stream.layer(i, tensors)
        for group in self.groups(i):
            seen = self.inputs(i, group[0], (second, first), (quantized, plain))
            for module in group:
                self.put(second, i, module, self.add(f"{module}.weight", tensors[f"{module}.weight"], seen))
        for name, array in tensors.items():
            if self.kinds[name] != "linear":
                self.add(name, array)
        return list(self.stream.run(i, first, plain)), list(self.stream.run(i, second, quantized))

    def put(self, layer: torch.nn.Module, i: int, module: str, w_nk: np.ndarray) -> None:
        """Give a linear of a layer another weight."""
        part = layer.get_submodule(module.removeprefix(f"{self.stream.container}.{i}."))
        part.weight = torch.nn.Parameter(torch.from_numpy(w_nk), requires_grad=False)

    def inputs(
        self, i: int, module: str, layers: tuple[Any, Any], hidden: tuple[list[torch.Tensor], list[torch.Tensor]]
    ) -> Statistics:
        """Return what a linear's inputs say in the quantized stream (first of each pair) and the float one."""
        return collect(*(self.stream.inputs(i, layer, module, x) for layer, x in zip(layers, hidden, strict=True)))

    def _scale(
        self, i: int, tensors: dict[str, np.ndarray], plain: list[torch.Tensor], quantized: list[torch.Tensor]
    ) -> None:
        """Scale the columns of a layer's tensors, in place."""
        layer = self.stream.layer(i, tensors)
        seen = {group[0]: self.inputs(i, group[0], (layer, layer), (quantized, plain)) for group in self.groups(i)}

        def fmt(module: str) -> WeightFormat | None:
            return self.work.format(module, "linear", tensors[f"{module}.weight"].shape)[0]

        place = functools.partial(self.module, i=i)
        self.work.scaled |= awq.fold_layer(self.family, self.settings, tensors, place, seen.__getitem__, fmt)

    def _as_head(self, plain: list[torch.Tensor]) -> Statistics:
        """Return what the inputs of a head that is the embedding too say, in the float model."""
        for i in progress(range(self.count), "float pass", self.count):
            layer = self.stream.layer(i, self.tensors.read(self.names(i)))
            plain = list(self.stream.run(i, layer, plain))
        return collect(self.stream.top(plain), self.stream.top(plain)).level(EMBEDDING_SHARE)
