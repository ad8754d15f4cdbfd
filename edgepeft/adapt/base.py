"""The packed backbone as an adapter sees it: which modules there are, their sizes, weights and biases.

Weights are read from the folder's mapped file and dequantized one at a time, when a term needs them (DoRA's norms) or
a merge changes them. Left out: everything that is not in the folder, such as the heads.

A model that is still to be packed is seen in the same way, so that an adapter can be judged before any work is done:
what will be packed by its name and shape, its weight in float where it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from edgepeft.artifact import read_json, read_tensors
from edgepeft.backbone.families import FAMILIES, Family
from edgepeft.quant import native
from edgepeft.quant.formats import EMBEDDING_FORMATS, Packed

if TYPE_CHECKING:
    from edgepeft.backbone.load import ModelSource
    from edgepeft.config import Config

LINEAR_KINDS = ("linear", "head")


@dataclasses.dataclass(frozen=True)
class Base:
    """A folder of packed weights. tensors: as stored.  about: quantized.json.  folder: None for tensors in memory.

    unpacked: of a model that is still to be packed, what reads a module's weight, float32 [N, K]. Its `tensors` are
    those that will stay in float, matrices among them by their shape alone.
    """

    tensors: Mapping[str, np.ndarray]
    about: Mapping[str, Any]
    folder: Path | None = None
    unpacked: Callable[[str], np.ndarray] | None = None

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map a folder that `quantize` or `merge` wrote."""
        return cls(read_tensors(folder / "weights.safetensors"), read_json(folder / "quantized.json"), folder)

    @classmethod
    def planned(cls, source: ModelSource, family: Family, config: Config) -> Self:
        """Return what a model folder will be once it is packed. Its digest is "" where calibration may change it."""
        from edgepeft.backbone.checkpoint import backbone_names, backbone_shapes, iter_tensors
        from edgepeft.quant.calibration import calibrated
        from edgepeft.quant.stage import format_for

        kinds, tied = family.tensors(source.settings), family.tied(source.settings)
        names = {new: old for old, new in backbone_names(source, family).items()}
        shapes = {**family.shapes(source.settings), **backbone_shapes(source, family)}
        parts, tensors = [], {}
        for name, kind in kinds.items():
            module, format_ = name.removesuffix(".weight"), format_for(config, kind, shapes[name], tied)[0]
            if format_ is None:
                tensors[name] = np.broadcast_to(np.float32(0), shapes[name])
            if kind in (*LINEAR_KINDS, "embedding"):
                parts.append({"name": module, "kind": kind, "shape": list(shapes[name])})
            if tied and kind == "embedding":
                parts.append({**parts[-1], "name": family.head, "kind": "head", "tied_to": module})
        vectors = {old: new for new, old in names.items() if kinds.get(new) in ("bias", "norm")}
        tensors |= {vectors[old]: array for old, array in iter_tensors(source, vectors)}

        def weight(module: str) -> np.ndarray:
            name = f"{module}.weight"
            if name not in names:  # it will be drawn
                return np.zeros(shapes[name], np.float32)
            return next(array for _, array in iter_tensors(source, {names[name]}))

        digest = "" if calibrated(config) else source.digest
        about = {"base_digest": digest, "family": family.tag, "format": config.format, "layers": parts, "kept": []}
        return cls(tensors, about, source.path, weight)

    @property
    def digest(self) -> str:
        """The digest of the model that was packed."""
        return self.about["base_digest"]

    @property
    def settings(self) -> dict[str, Any] | None:
        """Return config.json, where it is known."""
        return None if self.folder is None else read_json(self.folder / "config.json")

    @property
    def family(self) -> Family:
        """The row of its family."""
        return FAMILIES[self.about["family"]]

    @property
    def heads(self) -> tuple[str, ...]:
        """The modules that are trained in full with an adapter."""
        return self.family.heads

    def _parts(self) -> dict[str, Mapping[str, Any]]:
        return {part["name"]: part for part in (*self.about["layers"], *self.about["kept"])}

    def _of_kind(self, kinds: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        return {name: tuple(part["shape"]) for name, part in self._parts().items() if part["kind"] in kinds}

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """{module: (N, K)} of all linears, packed or float, the frozen head included."""
        return self._of_kind(LINEAR_KINDS)

    @property
    def embeddings(self) -> dict[str, tuple[int, int]]:
        """{module: (V, K)} of all embeddings."""
        return self._of_kind(("embedding",))

    def stored(self, module: str) -> str:
        """Return the module under whose name a weight is stored."""
        return self._parts()[module].get("tied_to", module)

    def packed(self, module: str) -> Packed | None:
        """Return a module's packed weight, or None where it was kept in float."""
        name, part = self.stored(module), self._parts()[module]
        if "format" not in part:
            return None
        n, k = part["shape"]
        return Packed(part["format"], n, k, self.tensors[f"{name}.qweight"], self.tensors[f"{name}.qscale"])

    def weight(self, module: str) -> np.ndarray:
        """Return a linear's weight as it multiplies, float32 [N, K]."""
        if self.unpacked is not None:
            return self.unpacked(self.stored(module))
        packed = self.packed(module)
        if packed is None:
            return np.asarray(self.tensors[f"{self.stored(module)}.weight"], np.float32)
        rows = self._parts()[module].get("layout") == "rows"
        w_nk = EMBEDDING_FORMATS[packed.format].dequantize(packed) if rows else native.dequantize(packed)
        offset = self.tensors.get(f"{self.stored(module)}.qoffset")
        return w_nk if offset is None else w_nk + np.repeat(offset[: packed.n], packed.k // offset.shape[1], axis=1)

    def relative_error(self, module: str) -> float:
        """Return ‖W - Ŵ‖ / ‖W‖ as measured when a module was packed; 0 where it was kept in float."""
        return float(self._parts()[module].get("relative_error", 0.0))

    def bias(self, module: str) -> np.ndarray | None:
        """Return a linear's bias, float32 [N], or None."""
        bias = self.tensors.get(f"{module}.bias")
        return None if bias is None else np.asarray(bias, np.float32)[: self._parts()[module]["shape"][0]]

    def floats(self) -> dict[str, tuple[int, ...]]:
        """Return {tensor name: shape} of what is kept in float, biases of linears left out."""
        biases = {f"{name}.bias" for name in self.linears}
        packed = ("qweight", "qscale", "qoffset", "absmax_")
        floats = {name: t for name, t in self.tensors.items() if not name.rpartition(".")[2].startswith(packed)}
        return {name: t.shape for name, t in floats.items() if name not in biases}
