"""`.onnx_adapter` files of ONNX Runtime: a flatbuffer ("TORT") of tensors named after a graph's inputs.

It says neither rank nor alpha nor base: ranks are read off the shapes, and the scale lies in B. Names and orientation
are those of the graph it was made for: ours are PEFT's with B turned round; GenAI's builder and Olive turn both.

    base_model.model.<module>.lora_A.weight [R, K]       model.layers.0.attn.q_proj.lora_A.MatMul.weight [K, R]
    base_model.model.<module>.lora_B.weight [R, N]       model.layers.0.attn.q_proj.lora_B.MatMul.weight [R, N]

A graph calls an embedding's A and B as it does a linear's; PEFT has names of their own for them.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgepeft.adapt.foreign import PREFIX, Foreign, lora_settings, ranks
from edgepeft.errors import ArtifactError
from edgepeft.runtime.adapters import UP

MAGIC = b"TORT"  # after the flatbuffer's first offset
TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.MatMul\.weight$")


def read(path: Path) -> Foreign:
    """Read an .onnx_adapter file. Raises ArtifactError when ONNX Runtime refuses it."""
    import onnxruntime

    try:
        stored = onnxruntime.AdapterFormat.read_adapter(str(path))  # owns what its values point to
        arrays = {name: value.numpy().copy() for name, value in stored.get_parameters().items()}
    except Exception as error:  # ONNX Runtime's own exceptions share no base
        raise ArtifactError(
            f"{path}: truncated or not an .onnx_adapter file: {error}. Copy or make it again."
        ) from None
    tensors, strange, turned = {}, [], False
    for name, array in arrays.items():
        if not array.size or (name.endswith(".gate") and (array == 1).all()):
            continue  # there to switch off what a graph's own default would leave in
        if name.startswith(PREFIX):
            tensors[name] = array.T if name.endswith(UP) else array
        elif match := TENSOR.match(name):
            module = match["module"].replace(".attn.", ".self_attn.")
            tensors[f"{PREFIX}{module}.lora_{match['side']}.weight"], turned = array.T, True
        else:
            strange.append(name)
    tool, changes = ("ONNX Runtime GenAI", ("names of its graph", "A and B transposed")) if turned else ("edgepeft", ())
    settings = lora_settings(ranks(tensors), None, None)
    changes = (*changes, "its own file format")
    tables = _tables()
    tensors = {_of_table(name, tables): array for name, array in tensors.items()}
    return Foreign(tool, ".onnx_adapter", path, settings, tensors, {}, changes, strange=tuple(strange))


def _tables() -> set[str]:
    """Return the embeddings of all families."""
    from edgepeft.backbone.families import FAMILIES

    return {f"{row.prefix}.{module}" for row in FAMILIES.values() for module in row.embeddings.values()}


def _of_table(name: str, tables: set[str]) -> str:
    """Return PEFT's name of a tensor, which is another where it belongs to an embedding."""
    module, _, side = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
    return f"{PREFIX}{module}.lora_embedding_{side}" if module in tables and side in ("A", "B") else name
