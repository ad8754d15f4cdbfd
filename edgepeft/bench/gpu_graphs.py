"""Graphs for GPUs to compare ours with: a product for each linear, without an adapter or with one as anyone adds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from edgepeft.export.ops import GROUP_INPUTS, NAME, SHARED_INPUTS
from edgepeft.export.webgpu import MICROSOFT, Pass
from edgepeft.export.webgpu_weights import block_of
from edgepeft.quant.formats import FORMATS
from edgepeft.runtime.webgpu import FILE


def naive(folder: Path, out: Path, adapter: bool) -> Path:
    """Write the graph for GPUs of a folder's model.onnx into `out`, a product for each linear; return its file."""
    made = Naive(folder, onnx.load(str(folder / "model.onnx"), load_external_data=False))
    made.adapted = adapter
    path = out / FILE
    onnx.save(made.run(), str(path), save_as_external_data=False)
    return path


class Naive(Pass):
    """A model on its way. adapted: with (x A) B and a sum for each linear."""

    adapted = True

    def linear(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> None:
        """Add the linears of a fused node one by one."""
        tag = node.op_type.removeprefix(f"{NAME}_").rsplit("_g", 1)[0]
        assert not tag.startswith("nf4"), tag
        x, *weight, _ = node.input[: len(SHARED_INPUTS)]
        k, start = int(attrs["K"]), 0
        rows = self.unpacked(tag, weight, k, int(attrs["N"]))
        for g, out in enumerate(node.output):
            n = int(attrs[f"n{g}"])
            ends = [self.constant(f"naive_{place}", np.array([place], np.int64)) for place in (start, start + n, 0)]
            own = [f"{value}:{start}" for value in rows]
            self.layout += [helper.make_node("Slice", [v, *ends], [o], name=o) for v, o in zip(rows, own, strict=True)]
            first = len(SHARED_INPUTS) + len(GROUP_INPUTS) * g
            self.names[out] = self.one(tag, out, x, own, list(node.input[first:][: len(GROUP_INPUTS)]), k, n)
            start += n

    def one(self, tag: str, name: str, x: str, rows: list[str], part: list[str], k: int, n: int) -> str:
        """Add one linear."""
        a, b, _, _, bias = part
        sizes = {"K": k, "N": n, "bits": FORMATS[tag].bits, "block_size": block_of(tag)}
        y = self.add("MatMulNBits", [x, *rows], [f"{name}:naive"], MICROSOFT, **sizes)
        if self.adapted and self.value(a).size:
            a_kr, b_rn = (
                self.constant(f"{name}.{what}", np.ascontiguousarray(value.astype(np.float32)))
                for what, value in (("a", self.value(a).T), ("b", self.value(b)))
            )
            low = self.add("MatMul", [x, a_kr], [f"{name}:naive_low"])
            y = self.add("Add", [y, self.add("MatMul", [low, b_rn], [f"{name}:naive_up"])], [f"{name}:naive_sum"])
        return y if bias == "zero" else self.add("Add", [y, bias], [f"{name}:naive_biased"])
