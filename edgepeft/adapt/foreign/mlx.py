"""Adapters of mlx-lm: adapters.safetensors and adapter_config.json.

    <module>.lora_a [K, R]   lora_b [R, N]   m [N] (DoRA)        y = W x + scale · (x a) b

The scale is a number of its own in lora_parameters, not alpha / R. Left out: fully fine-tuned layers ("full").
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgepeft.adapt.foreign import PREFIX, Foreign, lora_settings, ranks
from edgepeft.artifact import read_json, read_tensors
from edgepeft.errors import ArtifactError

SETTINGS, TENSORS = "adapter_config.json", "adapters.safetensors"
SIDES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
MAGNITUDE = "lora_magnitude_vector"
TENSOR = re.compile(r"(?P<module>.+)\.(?P<side>lora_a|lora_b|m)$")
KINDS = ("lora", "dora")


def read(path: Path) -> Foreign:
    """Read an adapters.safetensors with the adapter_config.json beside it. Raises ArtifactError for a damaged one."""
    stored, settings = read_tensors(path), _settings(path.with_name(SETTINGS))
    tensors, strange, dora = {}, [], False
    for name, array in stored.items():
        if not (match := TENSOR.match(name)):
            strange.append(name)
        elif match["side"] == "m":
            tensors[f"{PREFIX}{match['module']}.{MAGNITUDE}"], dora = array, True
        else:
            tensors[f"{PREFIX}{match['module']}.{SIDES[match['side']]}"] = array.T
    found = ranks(tensors)
    scale = float(settings["lora_parameters"]["scale"])
    rank = next(iter(found.values()), 1)
    more: dict[str, Any] = {"use_dora": True} if dora else {}
    if len(set(found.values())) > 1:  # one scale, whatever the rank
        more["alpha_pattern"] = {module: scale * r for module, r in found.items() if r != rank}
    base = settings.get("model")
    own = lora_settings(found, scale * rank, base if isinstance(base, str) else None, **more)
    changes = ("names of mlx-lm", "a and b transposed")
    return Foreign("mlx-lm", "MLX", path, own, tensors, {}, changes, strange=tuple(strange))


def _settings(path: Path) -> dict[str, Any]:
    """Read adapter_config.json: a scale, and a kind of adapter that is known."""
    settings = read_json(path)
    parameters = settings.get("lora_parameters") if isinstance(settings, dict) else None
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ArtifactError(f"{path}: expected mlx-lm's lora_parameters with a scale, found {scale!r}. Copy it again.")
    if (kind := settings.get("fine_tune_type", "lora")) not in KINDS:
        raise ArtifactError(f"{path}: fine_tune_type {kind!r} is no adapter; known are {', '.join(KINDS)}.")
    return settings
