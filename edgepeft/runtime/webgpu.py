"""GPUs: the bundle's graph for them, run by ONNX Runtime's WebGPU execution provider (Vulkan, Direct3D 12, Metal).

    ids ──► counts and biases, on the CPU ──► session on the GPU, every node ──► logits
    adapter ──► A [K, S], B [S, N] float32, packed once per adapter and node ──┘

Needs a bundle that was built for a target with a GPU (it holds model.webgpu.onnx) and the package
onnxruntime-ep-webgpu, the extra `webgpu`. No node may fall back to the CPU: ONNX Runtime is told to refuse that.
Adapters, keys and values stay in the GPU's memory between runs; tokens go in and logits come out. Left out: several
sequences in one run of a language model, rows of adapters of their own in one run.
"""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.errors import ArtifactError, TargetError
from edgepeft.runtime import digits
from edgepeft.runtime.adapters import Slot

FILE = "model.webgpu.onnx"
PACKED = "edgepeft.packed"
DIGITS = "edgepeft.digits"
ROWS = "edgepeft.rows"  # of the graph's own adapter before an encoder's text
ONE_TOKEN, POSITIONS, SEEN_BIAS = "one_token", "positions", "attention_bias."
PROMPT_BATCH, PROMPT_FIRST = "prompt_batch", "prompt_first"
_COUNTED: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()
PROVIDER = "WebGpuExecutionProvider"
HIDDEN = np.float32(-1e4)  # far below any score of attention
CHUNK = 31  # tokens a run: from 32 on the provider's attention is wrong on GPUs with subgroups of fewer than 16
RANKS = 4  # a vector of WebGPU
SEVERITY = 4  # of ONNX Runtime's log: fatal errors alone; a bench takes 0
INSTALL = "pip install 'edgepeft[webgpu]'"


# --- adapters ------------------------------------------------------------------------------------------------------


def pack(
    groups: Sequence[Mapping[str, Any]], values: Mapping[str, np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 A [K, S] and B [S, N] of a node's groups; gates go into A.

    S is the sum of ranks, filled with zeros to a multiple of RANKS and never 0, at which the provider crashes.

    groups: {"a": name, "b": name, "gate": name or None, "n": rows}; values: a [R, K], b [R, N], gate [.., R or 1].
    """
    total, start = sum(group["n"] for group in groups), 0
    downs, ups = [np.zeros((k, 0), np.float32)], [np.zeros((0, total), np.float32)]
    for group in groups:
        a, b = (values[group[part]].astype(np.float32) for part in "ab")
        gate = values[group["gate"]].astype(np.float32).reshape(-1, 1) if group["gate"] in values else 1
        downs.append((a * gate).T)
        up = np.zeros((len(a), total), np.float32)
        up[:, start : start + group["n"]] = b
        ups.append(up)
        start += group["n"]
    width = sum(len(up) for up in ups)
    fill = max(-(-width // RANKS), 1) * RANKS - width
    downs.append(np.zeros((k, fill), np.float32))
    ups.append(np.zeros((fill, total), np.float32))
    return np.ascontiguousarray(np.concatenate(downs, 1)), np.concatenate(ups)


def pack_routers(groups: Sequence[Mapping[str, Any]], values: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Return {group: float32 [E, S]} of those with a router: which of the packed ranks are an expert's.

    values hold "router" [E, K]. Shares add up to 1, so ranks of groups without one belong to all experts of another's.
    """
    ranks = [len(values[group["a"]]) for group in groups]
    width, start = max(-(-sum(ranks) // RANKS), 1) * RANKS, 0
    routers = {g: values[group["router"]] for g, group in enumerate(groups) if "router" in group}
    out = {g: np.zeros((len(router), width), np.float32) for g, router in routers.items()}
    for g, rank in enumerate(ranks):
        if g in out:
            experts = len(out[g])
            out[g][np.arange(rank) * experts // max(rank, 1), np.arange(start, start + rank)] = 1
        else:
            next(iter(out.values()))[:, start : start + rank] = 1
        start += rank
    return out


def pack_digits(name: str, about: Mapping[str, Any], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return {input: array} of a node's adapter in 4-bit digits, A's codes and scales before those of each B.

    about: {"groups": as for `pack`, "k": K, "ranks": R, "apart": a B for each group}; values: as for `pack`.
    Raises TargetError for an adapter of more ranks than R.
    """
    groups, ranks = about["groups"], int(about["ranks"])
    found = sum(len(values[group["a"]]) for group in groups)
    if found > ranks:
        raise TargetError(
            f"{name}: the adapter has {found} ranks, this graph for GPUs takes {ranks}. device='cpu' works."
        )
    a_ks, b_sn = pack(groups, values, about["k"])
    wide = [np.zeros((ranks, part.shape[1]), np.float32) for part in (a_ks.T, b_sn)]
    for whole, part in zip(wide, (a_ks.T, b_sn), strict=True):
        whole[:found] = part[:found]
    out = dict(zip((f"{name}.lora_A", f"{name}.lora_A.scales"), digits.down(wide[0]), strict=True))
    ends = np.cumsum([group["n"] for group in groups])[:-1]
    for g, part in enumerate(np.split(wide[1], ends, axis=1) if about["apart"] else [wide[1]]):
        out |= dict(zip((f"{name}.lora_B.{g}", f"{name}.lora_B.{g}.scales"), digits.up(part.T), strict=True))
    return out


def slots(session: Any, own: Mapping[str, Slot]) -> dict[str, Slot]:
    """Return the places of an adapter's tensors: the graph's own inputs, and in place of packed ones what they hold."""
    half, packed_names = np.dtype(np.float16), tuple(f"{name}.lora_" for name in _groups(session))
    found = {
        name: Slot(name, slot.shape, half) if slot.low_rank else slot
        for name, slot in own.items() if not name.startswith(packed_names)
    }  # fmt: skip
    sizes = {name: own[f"{name}.lora_A"].shape[0] for name in packed(session)}
    sizes |= {name: about["k"] for name, about in in_digits(session).items()}
    for name, groups in _groups(session).items():
        for group in groups:
            rank = f"{group['a']}.rank"
            found[group["a"]] = Slot(group["a"], (rank, sizes[name]), half)
            found[group["b"]] = Slot(group["b"], (rank, group["n"]), half)
            if group["gate"]:
                found[group["gate"]] = Slot(group["gate"], ("gates",), np.dtype(np.float32))
    return found


def is_gpu(session: Any) -> bool:
    """Tell whether a session is of a bundle's graph for GPUs."""
    about = getattr(session, "get_modelmeta", None)
    return about is not None and PACKED in about().custom_metadata_map


def packed(session: Any) -> dict[str, list[dict[str, Any]]]:
    """Return {node: its groups} of what the graph takes packed in float32."""
    return json.loads(session.get_modelmeta().custom_metadata_map.get(PACKED, "{}"))


def in_digits(session: Any) -> dict[str, dict[str, Any]]:
    """Return {node: what `pack_digits` asks for} of what the graph takes in 4-bit digits."""
    return json.loads(session.get_modelmeta().custom_metadata_map.get(DIGITS, "{}"))


def _groups(session: Any) -> dict[str, list[dict[str, Any]]]:
    return {**packed(session), **{name: about["groups"] for name, about in in_digits(session).items()}}


def feeds(session: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to feed the graph for an adapter's own feeds, packed where the graph takes that."""
    values = {name: value.numpy() for name, value in given.items()}
    about, inside = in_digits(session), set()
    out: dict[str, np.ndarray] = {}
    for name, groups in _groups(session).items():
        names = {group[part] for group in groups for part in ("a", "b", "gate") if group[part]}
        inside |= names
        if not names & set(values):
            continue
        if name in about:
            out |= pack_digits(name, about[name], values)
            continue
        pair = pack(groups, values, values[groups[0]["a"]].shape[1])
        out |= {f"{name}.lora_{ending}": array for ending, array in zip("AB", pair, strict=True)}
        if any("router" in group for group in groups):
            out |= {f"{name}.lora_R{g}": array for g, array in pack_routers(groups, values).items()}
    rest = {name: widened(array) for name, array in values.items() if name not in inside}
    return {name: on_device(array) for name, array in {**rest, **out}.items()}


def widened(array: np.ndarray) -> np.ndarray:
    """Return an adapter's tensor as a graph for GPUs takes it by itself: float32, empty axes filled with zeros."""
    fill = [(0, 0 if size else RANKS) for size in array.shape]
    return np.pad(array.astype(np.float32), fill)


def on_device(array: np.ndarray) -> Any:
    """Return an OrtValue that holds a copy of an array in the GPU's memory; an empty one stays where it is."""
    import onnxruntime

    if not array.size:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    memory = _device().memory_info(onnxruntime.OrtDeviceMemoryType.DEFAULT)
    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, memory_info=memory)
    value.update_inplace(array)
    return value


# --- the session ---------------------------------------------------------------------------------------------------


def missing() -> str:
    """Say why no GPU can be used here, or return ""."""
    try:
        import onnxruntime_ep_webgpu  # noqa: F401 - is it there?
    except ImportError:
        return f"the package onnxruntime-ep-webgpu is not installed: {INSTALL}"
    try:
        return "" if _device() else "no GPU was found: it takes a driver for Vulkan, Direct3D 12 or Metal"
    except Exception as error:  # ORT's own exceptions share no base
        return f"ONNX Runtime cannot load its WebGPU provider: {error}"


@functools.cache
def _register() -> None:
    import onnxruntime
    import onnxruntime_ep_webgpu

    onnxruntime.register_execution_provider_library("webgpu", onnxruntime_ep_webgpu.get_library_path())


def _device() -> Any:
    import onnxruntime

    _register()
    return next((device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER), None)


def check(folder: Path) -> None:
    """Raise ArtifactError for a bundle without a graph for GPUs, TargetError where no GPU can be used."""
    if not (folder / FILE).is_file():
        raise ArtifactError(f"{folder}: holds no graph for GPUs. Build it with --target web or --target android-gpu.")
    if reason := missing():
        raise TargetError(f"device 'webgpu': {reason}. device='cpu' works everywhere.")


def open_session(folder: Path, **settings: str) -> Any:
    """Make the session of a bundle's graph for GPUs, with every node on the GPU."""
    import onnxruntime

    check(folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = SEVERITY
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices([_device()], dict(settings))
    try:
        return onnxruntime.InferenceSession(str(folder / FILE), options)
    except Exception as error:  # ORT's own exceptions share no base
        raise TargetError(f"{folder / FILE}: this GPU does not run it: {error}") from None


# --- what the graph takes in place of masks ------------------------------------------------------------------------


def classifier_inputs(session: Any, arrays: Mapping[str, np.ndarray], rows: int | None = None) -> dict[str, np.ndarray]:
    """Return a classifier's inputs of ids, mask and types, int64 [batch, sequence].

    rows: before each text, of its adapter; None: as many as the graph's own has.
    """
    names, mask = _counted(session), arrays["attention_mask"]
    if PROMPT_BATCH not in names:
        rows = shown = 0
    else:
        rows = int(session.get_modelmeta().custom_metadata_map[ROWS]) if rows is None else rows
        shown = rows or RANKS  # those of an adapter without any are hidden
    mask = np.pad(mask, ((0, 0), (shown, 0)), constant_values=bool(rows))
    first = np.where(mask == 0, HIDDEN, np.float32(0))[:, None, None, :]
    batch, width = mask.shape
    places, more = np.arange(rows, rows + width - shown), {}
    if PROMPT_BATCH in names:
        more[PROMPT_BATCH] = np.array([batch, 1, 1])
    if PROMPT_FIRST in names:  # rows are read as tokens are
        places = np.concatenate([np.arange(shown), places])
        types = np.pad(arrays["token_type_ids"], ((0, 0), (shown, 0)))
        more |= {PROMPT_FIRST: np.array([0 if rows else shown]), "token_type_ids": types}
    bias = np.ascontiguousarray(np.broadcast_to(first, (batch, 1, len(places), width)))
    counted = {"position_ids": places, "attention_bias": bias, "attention_bias_first": first}
    return {**{name: array for name, array in arrays.items() if name != "attention_mask"}, **counted, **more}


def inputs(session: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what this graph takes for what the CPU's takes, in either task."""
    if "token_type_ids" in feeds:
        return classifier_inputs(session, feeds)
    keep = int(feeds.get("logits_to_keep", np.ones(1, np.int64))[0])
    rest = {name: array for name, array in feeds.items() if name not in ("attention_mask", "logits_to_keep")}
    return {**rest, **decoder_inputs(session, feeds["attention_mask"], feeds["input_ids"].shape[1], keep)}


def seen_bias(window: int) -> str:
    """Return the name of the bias that hides what comes later than a token, and what lies before its window if any."""
    return f"{SEEN_BIAS}{max(window, 0)}"


def _hidden(positions: np.ndarray, window: int, capacity: int) -> np.ndarray:
    """Return a bias of [batch, 1, sequence, capacity] for tokens at positions [batch, sequence]."""
    back = positions[:, None, :, None] - np.arange(capacity)
    seen = (back >= 0) & (back < window) if window else back >= 0
    return np.where(seen, np.float32(0), HIDDEN)


def _counted(session: Any) -> tuple[str, ...]:
    """Return which inputs a graph has for its tokens' places, as some lack; asked once, as every token needs them."""
    if session not in _COUNTED:
        names, some = (item.name for item in session.get_inputs()), (ONE_TOKEN, POSITIONS, PROMPT_BATCH, PROMPT_FIRST)
        _COUNTED[session] = tuple(n for n in names if n in some or n.startswith(SEEN_BIAS))
    return _COUNTED[session]


def decoder_inputs(session: Any, mask: np.ndarray, columns: int, keep: int, capacity: int = 0) -> dict[str, np.ndarray]:
    """Return what attention counts for `columns` new tokens, the last `keep` kept; mask is int64 [batch, total].

    capacity: columns of the memory of keys and values, where it is more than the mask has.
    """
    count = columns if keep == 0 else min(keep, columns)
    lengths = mask.sum(axis=1)
    place = np.arange(columns - count, columns, dtype=np.int64)
    positions = lengths[:, None] - columns + np.arange(columns)
    more: dict[str, np.ndarray] = {}
    for name in _counted(session):
        if name == ONE_TOKEN:
            more[name] = np.array(columns == 1)
        elif name == POSITIONS:
            more[name] = positions
        else:
            window = int(name.removeprefix(SEEN_BIAS))
            more[name] = _hidden(positions, window, max(capacity, mask.shape[1]))
    return {
        **more,
        "seqlens_k": (lengths - 1).astype(np.int32),
        "total_sequence_length": np.array(mask.shape[1], np.int32),
        "logits_index": np.ascontiguousarray(np.broadcast_to(place[None, :, None], (len(mask), count, 1))),
    }
