"""Adapters as sets of ready feeds: one mapped file, one view per tensor, one OrtValue per view, made once and kept.

An adapter's tensors are overridable inputs of the graph, so swapping is feeding other pointers: no copy, no reload. B
alone is turned at its first use, from [N, R] in its file to the graph's [R, N].

    input of the graph          default adapter      base            another adapter
    …lora_A.weight  [R, K]      (not fed)            [0, K]          its view, or [0, K] where it has none
    …lora_B.weight  [R, N]      (not fed)            [0, N]          its own, or [0, N] where it has none
    …gate           [.., R]     (not fed)            [.., 1]         its view, or one 1 where it has none
    …s_in, s_out    [K], [N]    (not fed)            ones            its view, or ones where it has none
    a router        [E, K]      (not fed)            zeros [1, K]    its view, or of one expert where it has none
    a bottleneck                (not fed)            of width 0      its view, or of width 0 where it has none
    an encoder's prompt [V, N]  (not fed)            [0, N]          its view, or [0, N] where it has none
    a bias, a norm              (not fed)            the base's      its view, or the base's where it has none
    the head                    (not fed)            (not fed)       its view; must be there

The default adapter is what the initializers hold, so nothing is fed for it. The base's own of what it replaces lies in
adapters/base.safetensors. An adapter is read from terms.safetensors where it has one, else from its PEFT file; a tensor
that several inputs share (metadata edgepeft.alias) becomes one OrtValue. What cannot be represented exactly is refused:
an adapter of another base or weight format, a tensor the graph has no place for, a scale that was not folded into B.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.artifact import DTYPES, read_json, tensor_header
from edgepeft.errors import ArtifactError, unknown
from edgepeft.runtime import prompts

DEFAULT = "default"
BASE = "none"
TENSORS = "adapter_model.safetensors"
TERMS = "terms.safetensors"  # as in edgepeft.adapt.terms, which the device has not
OWN = "base.safetensors"
ALIAS = "edgepeft.alias"
NOT_TENSORS = ("logits_to_keep",)  # overridable too, but a setting of the run
DOWN, UP, GATE = "lora_A.weight", "lora_B.weight", "gate"
ROUTER, BOTTLENECKS = "lora_router.weight", (".lora_down.", ".lora_up.", ".lora_beside_down.", ".lora_beside_up.")
STEM = re.compile(r"(.*\.lora_(?:beside_)?)(?:down|up)\.(?:weight|bias)")  # of the four tensors of a bottleneck
BEFORE = (".prompt", ".prefix")
KINDS = ("LORA", "EXPERTS", "BOTTLENECK", "PARALLEL")  # whose file is the graph's tensors
LABELS = "labels"  # the dimension of a head
ORT_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float16)": np.dtype(np.float16), "tensor(float)": np.dtype(np.float32), "tensor(uint8)": np.dtype(np.uint8)
}  # fmt: skip


@functools.cache
def _filled(value: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return one array for all that ask for it: hundreds of slots have the same neutral value."""
    return np.full(shape, value, dtype)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for an adapter tensor in the graph; a dimension is an int, or a name where any size goes.

    A session has hundreds, of which every adapter that it loads asks the same, so the answers are kept.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any]

    @functools.cached_property
    def low_rank(self) -> bool:
        """Tell whether rank 0 is allowed here."""
        return self.name.endswith((DOWN, UP))

    @functools.cached_property
    def gate(self) -> bool:
        """Tell whether this is a gate, which is 1 where an adapter has none; in a file it is [R], here [.., R]."""
        return self.name.endswith(f".{GATE}")

    @functools.cached_property
    def scale(self) -> bool:
        """Tell whether this is a scale of inputs or outputs, which are 1 where an adapter has none."""
        return self.name.endswith((".s_in", ".s_out"))

    @functools.cached_property
    def branch(self) -> bool:
        """Tell whether this is part of what stands beside a linear: a router of experts, a bottleneck, or a prompt."""
        return self.name.endswith((ROUTER, *BEFORE)) or any(part in self.name for part in BOTTLENECKS)

    @functools.cached_property
    def neutral(self) -> bool:
        """Tell whether an adapter may leave this out without the base's own."""
        return self.low_rank or self.gate or self.scale or self.branch

    @functools.cached_property
    def head(self) -> bool:
        """Tell whether this is part of a head: it has a row for every label."""
        return self.shape[:1] == (LABELS,)

    @functools.cached_property
    def stacks(self) -> int | None:
        """Return the axis along which adapters stack, or None where they cannot."""
        return 0 if self.low_rank or self.head else None

    @staticmethod
    def gate_of(name: str) -> str:
        """Return the name of the gate that goes with a low-rank tensor."""
        return name.removesuffix(DOWN).removesuffix(UP) + GATE

    def empty(self) -> np.ndarray:
        """Return the rank-0 tensor of a low-rank slot, and the neutral one of a gate, a scale or a branch."""
        if self.gate:
            return _filled(1, (1,) * len(self.shape), self.dtype)
        if self.scale:
            return _filled(1, tuple(int(size or 1) for size in self.shape), self.dtype)
        if self.branch:  # one expert, or a width of 0
            width = int(self.name.endswith(ROUTER))
            return _filled(0, tuple(size if isinstance(size, int) else width for size in self.shape), self.dtype)
        return _filled(0, (0, *(int(size or 0) for size in self.shape[1:])), self.dtype)

    def fits(self, array: np.ndarray) -> bool:
        """Tell whether an array has this slot's type and fixed dimensions."""
        if self.gate:
            return array.dtype == self.dtype and array.ndim == 1
        if array.dtype != self.dtype or array.ndim != len(self.shape):
            return False
        return all(array.shape[axis] == size for axis, size in self._sizes)

    @functools.cached_property
    def _sizes(self) -> list[tuple[int, int]]:
        """Which dimensions are fixed, and how long they are."""
        return [(axis, size) for axis, size in enumerate(self.shape) if isinstance(size, int)]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What to feed for one adapter, and the labels its head speaks of. `rank` is the largest rank in it.

    prompt: keys and values that a cache begins with, see `edgepeft.runtime.prompts`.  columns: how many tokens of the
    context its prompt takes, of a classifier too.
    parts: of a sum, the adapters and their weights; it feeds nothing of its own (see edgepeft.runtime.mixing).
    """

    name: str
    labels: tuple[str, ...]
    rank: int
    feeds: Mapping[str, Any]
    prompt: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    columns: int = 0
    parts: tuple[tuple[Adapter, float], ...] = ()

    @property
    def weights(self) -> tuple[tuple[Adapter, float], ...]:
        """The adapters it is made of, with their weights: itself, unless it is a sum."""
        return self.parts or ((self, 1.0),)


def slots(session: Any) -> dict[str, Slot]:
    """Return the adapter inputs of a session by name."""
    return {
        item.name: Slot(item.name, tuple(item.shape), ORT_TYPES[item.type])
        for item in session.get_overridable_initializers()
        if item.name not in NOT_TENSORS
    }


def adapter_folders(bundle: Path) -> dict[str, Path]:
    """Return {name: folder} of the adapters that lie in a bundle, the default one first."""
    found = sorted((bundle / "adapters").glob(f"*/{TENSORS}"), key=lambda p: (p.parent.name != DEFAULT, p.parent.name))
    return {path.parent.name: path.parent for path in found}


def check_base(path: Path, metadata: Mapping[str, str], base_digest: str, weight_format: str) -> None:
    """Raise ArtifactError unless an adapter file names this base, packed in this format: the bits it was trained on."""
    for what, key, wanted in (("base", "edgepeft.base", base_digest), ("--format", "edgepeft.format", weight_format)):
        if (found := metadata.get(key)) != wanted:
            raise ArtifactError(
                f"{path}: made for another {what}: it names {found or 'none'}, this bundle's is {wanted}. Its answers "
                f"would be wrong; train it on this {what}, or put it into the bundle it was made for."
            )


def _map(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Map a file once; return a view per tensor, one for all names of a stored tensor, and the metadata."""
    header, metadata, base = tensor_header(path)
    raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # views of a plain array are a third as large
    views = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        kind = DTYPES.get(entry["dtype"], "|u1")
        views[name] = raw[base + start : base + end].view(kind).reshape(entry["shape"])
    return {**views, **{name: views[stored] for name, stored in _aliases(path, metadata, views).items()}}, metadata


def _aliases(path: Path, metadata: Mapping[str, str], stored: Mapping[str, Any]) -> dict[str, str]:
    """Return {name: name of the tensor that it is} of a file's metadata."""
    try:
        found = json.loads(metadata.get(ALIAS, "{}"))
        missing = [name for name in found.values() if name not in stored]
    except (ValueError, AttributeError, TypeError):
        found, missing = {}, [ALIAS]
    if missing:
        raise ArtifactError(f"{path}: {missing[0]} is not in it. The file is damaged: copy the adapter again.")
    return found


def _check_config(folder: Path) -> None:
    """Raise ArtifactError unless the PEFT configuration means y + B·(A·x) with no factor."""
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        found = type(config).__name__
        raise ArtifactError(
            f"{folder / 'adapter_config.json'}: expected a JSON object, found {found}. Copy the adapter again."
        )
    same_scale = config.get("lora_alpha") == config.get("r") and config.get("alpha_pattern", {}) == config.get(
        "rank_pattern", {}
    )
    odd = [key for key in ("use_dora", "use_rslora", "use_qalora", "fan_in_fan_out") if config.get(key)]
    if config.get("peft_type") not in KINDS or not same_scale or odd:
        what = f"peft_type {config.get('peft_type')}, r {config.get('r')}, lora_alpha {config.get('lora_alpha')}"
        raise ArtifactError(
            f"{folder}: not an exported adapter ({', '.join([what, *odd])}): the scale must be folded into B, so that "
            "lora_alpha = r. Take the adapter that `edgepeft export` wrote, OUTPUT/export/adapters/default."
        )


def _not_finite(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names of tensors that hold infinite values or NaN."""
    return [name for name, array in arrays.items() if not _finite(array)]


def _finite(array: np.ndarray) -> bool:
    """Tell whether all values are finite; float16 by the largest codes of each sign, 30 times as fast as by numpy."""
    if array.dtype != np.float16:
        return bool(np.isfinite(array).all())
    bits = array.view(np.uint16)
    return int(bits.max(initial=0)) < 0xFC00 and int(bits.view(np.int16).max(initial=0)) < 0x7C00


def _check_tensors(
    folder: Path, arrays: Mapping[str, np.ndarray], places: Mapping[str, Slot], own: Mapping[str, np.ndarray]
) -> None:
    """Raise ArtifactError, naming the tensors, unless each has a place and each place that must be filled is."""
    problems = [unknown("tensor", n, places) for n in arrays if n not in places][:1]
    infinite = _not_finite(arrays)
    for name, slot in places.items():
        array = arrays.get(name)
        if array is None:
            if not (slot.neutral or name in own):
                problems.append(f"{name} is missing")
        elif not slot.fits(array):
            problems.append(f"{name} is {array.dtype}{list(array.shape)}, expected {slot.dtype}{list(slot.shape)}")
        elif name in infinite:
            problems.append(f"{name} holds values that are not finite")
        if name.endswith(DOWN):
            other = arrays.get(name.removesuffix(DOWN) + UP)
            rank = array.shape[0] if array is not None and array.ndim else 0
            if rank != (other.shape[0] if other is not None and other.ndim else 0):
                problems.append(f"{name} has rank {rank}, its B another")
    problems = problems or [*_gate_problems(arrays, places), *_bottleneck_problems(arrays)]
    if problems:
        raise ArtifactError(f"{folder}: " + "; ".join(problems[:5]) + ".")


def _gate_problems(arrays: Mapping[str, np.ndarray], places: Mapping[str, Slot]) -> list[str]:
    """Return the gates and routers that do not go with the rank of their linear, in words."""
    problems = []
    for name, array in arrays.items():
        module = name.removesuffix(GATE).removesuffix(ROUTER)
        rank = len(arrays.get(module + DOWN, ()))
        if places[name].gate and len(array) not in (1, rank):
            problems.append(f"{name} has {len(array)} gates for a rank of {rank}")
        if name.endswith(ROUTER) and (not len(array) or not rank or rank % len(array)):
            problems.append(f"{name} has {len(array)} experts for a rank of {rank}")
    return problems


def _bottleneck_problems(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Return the bottlenecks of which some parts lack, or are not of one width, in words."""
    problems = []
    for stem in sorted({found[1] for name in arrays if (found := STEM.fullmatch(name))}):
        names = [f"{stem}{part}" for part in ("down.weight", "down.bias", "up.weight", "up.bias")]
        if lacking := [name for name in names if name not in arrays]:
            problems.append(f"{lacking[0]} is missing, and others of its bottleneck are there")
            continue
        down, bias, up, _ = (arrays[name].shape for name in names)
        if not down[0] == bias[0] == up[1]:
            problems.append(f"{stem}*: expected one width, found {down[0]}, {bias[0]} and {up[1]}")
    return problems


def for_graph(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of a file with each B as the graph takes it, one array for all names of a stored tensor."""
    ups = {id(array): np.ascontiguousarray(array.T) for name, array in arrays.items() if name.endswith(UP)}
    return {name: ups[id(array)] if name.endswith(UP) else array for name, array in arrays.items()}


class Later(Mapping[str, Any]):
    """A mapping that is made when something first looks into it, and then lets go of what it is made of."""

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = make

    @functools.cached_property
    def _made(self) -> Mapping[str, Any]:
        made = self._make()
        self._make = lambda: made
        return made

    def __getitem__(self, name: str) -> Any:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def _feeds(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return one OrtValue for every array, whatever number of names it has.

    Parts of a mapped file are copied: as long as one of them is in use, memory holds the rest of it too, each B a
    second time.
    """
    from onnxruntime import OrtValue

    own = {id(array): array if array.base is None else array.copy() for array in arrays.values()}
    made = {key: OrtValue.ortvalue_from_numpy(array) for key, array in own.items()}
    return {name: made[id(array)] for name, array in arrays.items()}


def read_labels(folder: Path, default: list[str]) -> tuple[str, ...]:
    """Return the labels of an adapter's own head; those of the bundle where it has none of its own."""
    path = folder / "labels.json"
    labels = read_json(path) if path.exists() else default
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ArtifactError(f"{path}: expected a list of texts, found {labels!r:.60}. Copy the adapter again.")
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise ArtifactError(f"{path}: expected every label once, found {twice[0]!r} twice. Copy the adapter again.")
    return tuple(labels)


def load_adapter(
    folder: Path, places: Mapping[str, Slot], base_digest: str, weight_format: str, labels: list[str],
    pasts: Mapping[str, tuple[Any, ...]],
) -> Adapter:  # fmt: skip
    """Map an adapter and check it; `pasts` are the graph's keys and values.

    Its feeds are made at their first use, which the default adapter's may never see. Raises ArtifactError when it does
    not belong to this model.
    """
    file = folder / (TERMS if (folder / TERMS).is_file() else TENSORS)
    arrays, metadata = _map(file)
    check_base(file, metadata, base_digest, weight_format)
    if file.name == TENSORS:
        _check_config(folder)
    own = _own(folder.parent, places)
    prompt = prompts.taken(arrays, pasts, folder)
    _check_tensors(folder, {n: a.T if n.endswith(UP) else a for n, a in arrays.items()}, places, own)
    rank = max((a.shape[0] for n, a in arrays.items() if n.endswith(DOWN)), default=0)
    feeds = Later(lambda: _feeds(_fed(arrays, places, own)))
    widths = [*(a.shape[2] for a in prompt.values()), *(len(a) for n, a in arrays.items() if n.endswith(BEFORE))]
    return Adapter(folder.name, read_labels(folder, labels), rank, feeds, prompt, max(widths, default=0))


def _fed(
    arrays: Mapping[str, np.ndarray], places: Mapping[str, Slot], own: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return what an adapter of these tensors feeds, by name."""
    fed = {
        n: a.reshape((1,) * (len(places[n].shape) - 1) + a.shape) if places[n].gate else a
        for n, a in for_graph(arrays).items()
    }
    return {**_neutral(places, own, fed), **fed}


def _own(folder: Path, places: Mapping[str, Slot]) -> dict[str, np.ndarray]:
    """Return the base's own of what the default adapter replaces; `folder` holds the adapters."""
    path = folder / OWN
    own = _map(path)[0] if path.is_file() else {}
    if wrong := [name for name, array in own.items() if name not in places or not places[name].fits(array)]:
        raise ArtifactError(f"{path}: {wrong[0]} does not fit the model. Copy the bundle again.")
    return own


def _neutral(
    places: Mapping[str, Slot], own: Mapping[str, np.ndarray], fed: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Return what leaves the base as it is, by name, where nothing else is fed; nothing for heads."""
    found = {name: slot.empty() for name, slot in places.items() if name not in fed and slot.neutral}
    return {**found, **own}


def base_adapter(places: Mapping[str, Slot], labels: tuple[str, ...], adapters: Path | None = None) -> Adapter:
    """Return the base: rank 0 everywhere, with the default adapter's head; `adapters` is the folder of adapters."""
    return Adapter(BASE, labels, 0, _feeds(_neutral(places, {} if adapters is None else _own(adapters, places))))
