"""Adapters of a bundle added up, each times a weight, as one more adapter of it: `edgepeft adapters mix`.

    y = W·x + Σ w_i·B_i·(A_i·x)          a [R1 + R2 + .., K]    b [N, R1 + R2 + ..], w_i in b

Stacked along the rank, as PEFT's `add_weighted_adapter(combination_type="cat")` does, the sum is exact but for float16,
to which w_i·b_i is rounded once. What cannot be added is refused with the reason: scales multiply, routers and
bottlenecks are no sums, a whole tensor or a head has no weight 0.7. Heads have to be one and the same.

Left out: sums of lower rank ("linear" multiplies each A by every B, "svd" cuts off), embeddings. A sum for one call
needs none of this: see the runtime's `adapter={"a": 0.7, "b": 0.3}`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.adapt import peft_files
from edgepeft.adapt.device import peft_form
from edgepeft.adapt.terms import ENDINGS, PREFIX, Effect, Terms, aliases
from edgepeft.artifact import read_json, read_tensors, tensor_header, write_json
from edgepeft.deploy import adapters
from edgepeft.deploy.adapter_source import ABOUT, LABELS, folders, tensor_file
from edgepeft.errors import ArtifactError, ConfigError, unknown
from edgepeft.runtime import manifest as mf

DOWN, UP = (f".{ENDINGS[term]}" for term in ("a_rk", "b_nr"))


def mix(bundle: Path, weights: Mapping[str, float], name: str, replace: bool = False) -> dict[str, Any]:
    """Put the weighted sum of a bundle's adapters into it and return what is known of it there.

    Raises ArtifactError, naming each, for adapters that cannot be added, and what `adapters.add` raises.
    """
    manifest = mf.check_bundle(bundle)
    there = folders(manifest)
    if strange := [part for part in weights if part not in there]:
        raise ArtifactError(f"{bundle}: {unknown('adapter', strange[0], there)}")
    parts = {part: _tensors(there[part]) for part in weights}
    if problems := _problems(parts):
        raise ArtifactError("\n".join(f"{bundle}: {problem}" for problem in problems))
    first = there[next(iter(weights))]
    settings, tensors = peft_form(_sum(parts, weights).rounded(), read_json(first / peft_files.SETTINGS), None)
    tensors = {n: value.astype(np.float16 if ".lora_" in n else np.float32) for n, value in tensors.items()}
    with tempfile.TemporaryDirectory(prefix="edgepeft-") as place:
        folder = Path(place) / name
        peft_files.write(folder, settings, tensors, manifest["base_digest"], manifest["format"])
        write_json(folder / ABOUT, {"method": "mix", "parts": dict(weights)})
        if (first / LABELS).exists():
            write_json(folder / LABELS, read_json(first / LABELS))
        return adapters.add(bundle, folder, name, replace)


def parsed(parts: tuple[str, ...]) -> dict[str, float]:
    """Return {name: weight} of NAME=WEIGHT each. Raises ConfigError for what is none, or a name given twice."""
    found: dict[str, float] = {}
    for part in parts:
        name, _, weight = part.partition("=")
        try:
            number = float(weight)
        except ValueError:
            number = float("nan")
        if not name or not np.isfinite(number) or name in found:
            raise ConfigError(f"{part!r}: expected NAME=WEIGHT with a number, each name once, as support=0.7.")
        found[name] = number
    return found


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return {input of the graph: array} of an adapter's folder."""
    file = tensor_file(folder)
    stored = read_tensors(file)
    return {**stored, **{name: stored[source] for name, source in aliases(tensor_header(file)[1]).items()}}


def _problems(parts: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Return why some adapters cannot be added, in words."""
    problems, (first, *others) = [], parts
    whole = {part: {n: v for n, v in own.items() if not n.endswith((DOWN, UP))} for part, own in parts.items()}
    for part, own in whole.items():
        if strange := [name.removeprefix(PREFIX) for name in own if not name.startswith(f"{PREFIX}classifier.")]:
            problems.append(f"{part!r} changes {strange[0]}, and only what B·A add can be summed.")
        if any("embed" in name for name in parts[part]):
            problems.append(f"{part!r} adapts an embedding, whose sum is left out.")
    for part in others:
        if whole[part].keys() != whole[first].keys() or any(
            not np.array_equal(value, whole[first][name]) for name, value in whole[part].items()
        ):
            problems.append(f"{part!r} has another head than {first!r}, and heads do not add. Ask each by its name.")
    return problems


def _sum(parts: Mapping[str, Mapping[str, np.ndarray]], weights: Mapping[str, float]) -> Effect:
    """Return the sum, float32."""
    a: dict[str, list[np.ndarray]] = {}
    b: dict[str, list[np.ndarray]] = {}
    replaced: dict[str, np.ndarray] = {}
    for part, own in parts.items():
        for name, value in own.items():
            inner = name.removeprefix(PREFIX)
            if name.endswith(DOWN):
                a.setdefault(inner.removesuffix(DOWN), []).append(value.astype(np.float32))
            elif name.endswith(UP):
                b.setdefault(inner.removesuffix(UP), []).append(value.astype(np.float32) * np.float32(weights[part]))
            else:
                replaced[inner] = value
    stacked = {module: Terms(a_rk=np.concatenate(a[module]), b_nr=np.concatenate(b[module], axis=1)) for module in a}
    return Effect(dict(sorted(stacked.items())), replaced)
