"""A checkpoint's tensors: their names, shapes and values, one in memory at a time.

Headers are read first and alone, so that a model can be told to fit, or not, before any weight is touched. Names are
those of the checkpoint; `backbone_names` brings them to the task model.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepeft.artifact import read_tensor, tensor_header
from edgepeft.errors import ArtifactError, ModelError

if TYPE_CHECKING:
    import numpy as np

    from edgepeft.backbone.families import Family
    from edgepeft.backbone.load import ModelSource

AGAIN = "It came with the model: download or save the model again."
CHUNK_BYTES = 1 << 24


def header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return (tensor entries, offset of the data in bytes) of a weight file. Raises ModelError for a damaged one."""
    try:
        entries, _, base = tensor_header(file)
    except ArtifactError as error:
        raise ModelError(str(error)) from None
    return entries, base


def tensor_shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of a model's tensors, read from the headers alone."""
    return {name: tuple(entry["shape"]) for file in source.weight_files for name, entry in header(file)[0].items()}


def backbone_names(source: ModelSource, family: Family) -> dict[str, str]:
    """Return {name in the checkpoint: name in the task model} of all that belongs to the backbone.

    Of a tied pair there is the word embedding alone, under whichever name, or both, the checkpoint has it.
    """
    names = {old: new for old in tensor_shapes(source) if (new := family.rename(old))}
    head = f"{family.head}.weight"
    if head in names and family.tied(source.settings):
        word = f"{family.prefix}.{family.embeddings['word']}.weight"
        del names[head]
        return names if word in names.values() else {**names, head: word}
    return names


def backbone_shapes(source: ModelSource, family: Family) -> dict[str, tuple[int, ...]]:
    """Return {name in the task model: shape} of all that belongs to the backbone."""
    shapes = tensor_shapes(source)
    return {new: shapes[old] for old, new in backbone_names(source, family).items()}


def same_tensor(source: ModelSource, one: str, other: str) -> bool:
    """Tell whether two tensors of a model are the same, bit for bit."""
    import numpy as np

    (a, first), (b, second) = (_raw(source, name) for name in (one, other))
    pieces = range(0, len(first), CHUNK_BYTES)
    return a == b and all(np.array_equal(first[i : i + CHUNK_BYTES], second[i : i + CHUNK_BYTES]) for i in pieces)


def _raw(source: ModelSource, name: str) -> tuple[tuple[Any, ...], np.ndarray]:
    """Return (dtype and shape, mapped bytes) of a tensor."""
    file, entry, base = next((f, h[name], base) for f in source.weight_files for h, base in [header(f)] if name in h)
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    return (entry["dtype"], *shape), read_tensor(file, {**entry, "dtype": "U8", "shape": [end - start]}, base)


def iter_tensors(source: ModelSource, wanted: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) one at a time, of all or of those wanted: floats of any width as float32, others as they are.

    Raises ModelError for a damaged file, and for NaN or infinite values with the name of the tensor.
    """
    for file in source.weight_files:
        entries, base = header(file)
        for name, entry in entries.items():
            if wanted is None or name in wanted:
                yield name, _tensor(file, name, entry, base)


def _tensor(file: Path, name: str, entry: Mapping[str, Any], base_bytes: int) -> np.ndarray:
    import numpy as np

    try:
        array = read_tensor(file, entry, base_bytes)
    except (ArtifactError, ValueError, TypeError) as error:
        raise ModelError(f"{file}: tensor {name}: {error}") from None
    if array.dtype.kind != "f":
        return array
    array = array.astype(np.float32, copy=False)
    if bad := int(array.size - np.isfinite(array).sum()):
        raise ModelError(
            f"{file}: tensor {name} holds {bad} NaN or infinite values of {array.size}. The model is "
            "damaged: get it again."
        )
    return array
