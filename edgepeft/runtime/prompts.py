"""Adapters that stand before the text: the keys and values with which a language model's cache begins.

    past_key_values.<layer>.key, .value     float32 [1, kv_heads, V, head_dim]        of terms.safetensors

The graph knows nothing of them: they are put before a row's first token, at no cost for the tokens but that of V more
tokens of context, which they take from it. A cache of int8 holds their codes, by its own scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.errors import ArtifactError

PAST = "past_key_values."
CODES = 127


def pasts(session: Any) -> dict[str, tuple[Any, ...]]:
    """Return {input: shape} of a graph's keys and values, in their order; none for a classifier."""
    return {item.name: tuple(item.shape) for item in session.get_inputs() if item.name.startswith(PAST)}


def taken(arrays: dict[str, np.ndarray], places: Mapping[str, tuple[Any, ...]], folder: Path) -> dict[str, np.ndarray]:
    """Take the keys and values out of an adapter's tensors. Raises ArtifactError for those that do not fit `places`."""
    found = {name: arrays.pop(name) for name in list(arrays) if name in places}
    if not found:
        return {}
    width = next(iter(found.values())).shape[2:3]
    for name, (_, heads, _, size) in places.items():
        wanted, array = (1, heads, *width, size), found.get(name)
        if array is None or array.shape != wanted or array.dtype != np.float32 or not np.isfinite(array).all():
            what = "none" if array is None else f"{array.dtype}{list(array.shape)}"
            raise ArtifactError(
                f"{folder}: {name}: expected finite float32{list(wanted)}, found {what}. Copy it again."
            )
    return {name: found[name] for name in places}


def codes(prompt: Mapping[str, np.ndarray], scales: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return keys and values as an int8 cache holds them; scales [kv_heads, 1, head_dim]."""
    rounded = {name: np.rint(array / scales[name]) for name, array in prompt.items()}
    return {name: np.clip(array, -CODES, CODES).astype(np.int8) for name, array in rounded.items()}
