"""Adapters stacked, so that the rows of one run can use different ones.

    y = W·x + B·( gate ⊙ (A·x) )         A [R1 + R2 + .., K]   B [R1 + R2 + .., N]   gate [texts, 1, R1 + R2 + ..]

A text's gate is its own adapter's (1 where that has none) in its adapter's part of R, and 0 in the others': what
another adapter makes of a text is multiplied by 0, so a text is what it is alone, and no answer depends on another's
adapter. Heads are stacked along their labels, and a text takes its part of the logits. Texts are the rows of a batch.

A row may have a sum of adapters, each times a weight: its gate is the sum of theirs. That is exact in float32, as only
B·A add: an adapter that changes anything else (scales, biases, branches, whole tensors, prompts) is no part of a sum.
Heads do not add either, so all have to be one.

Stacked tensors are copies, made at the first use of a set of adapters and kept for the `KEPT` sets used last; a set is
at most `TOGETHER` adapters, more take further runs. The gates of a run are small and shared by all linears of one
layout. What does not stack (scales, biases, replaced tensors) has to be the same in all adapters of a run: those that
differ there run apart, as do all in a graph without gates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgepeft.errors import ArtifactError
from edgepeft.runtime.adapters import DOWN, Adapter, Slot

KEPT = 2  # sets of adapters
TOGETHER = 8  # adapters in a set
Read = Callable[[Adapter, str], np.ndarray]


class Mix:
    """Some adapters as one. `read` gives an adapter's tensor for a slot."""

    def __init__(self, adapters: Sequence[Adapter], slots: Mapping[str, Slot], read: Read) -> None:
        from onnxruntime import OrtValue

        self.adapters = list(adapters)
        self._slots = slots
        self._layouts: dict[bytes, tuple[np.ndarray, list[str]]] = {}
        self.tensors: dict[str, Any] = {}
        self.ends = np.zeros(0, np.int64)
        for name, slot in slots.items():
            if slot.gate:
                continue
            parts = [read(adapter, name) for adapter in self.adapters]
            stacked = parts[0] if slot.stacks is None else np.concatenate(parts, slot.stacks)
            self.tensors[name] = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(stacked))
            if slot.head:
                self.ends = np.cumsum([len(part) for part in parts])
            if name.endswith(DOWN):
                self._lay_out(Slot.gate_of(name), [len(part) for part in parts], read)

    def _lay_out(self, gate: str, ranks: Sequence[int], read: Read) -> None:
        """Note which gates [adapters, R1 + R2 + ..] a linear has, one row an adapter."""
        table = np.zeros((len(ranks), sum(ranks)), np.float32)
        for place, (adapter, end) in enumerate(zip(self.adapters, np.cumsum(ranks), strict=True)):
            table[place, end - ranks[place] : end] = read(adapter, gate).ravel()
        self._layouts.setdefault(np.array(ranks).tobytes() + table.tobytes(), (table, []))[1].append(gate)

    def _place(self, adapter: Adapter) -> int:
        return next(place for place, own in enumerate(self.adapters) if own is adapter)

    def holds(self, adapters: Sequence[Adapter]) -> bool:
        """Tell whether all of some adapters are in it."""
        own = {id(adapter) for adapter in self.adapters}
        return all(id(part) in own for adapter in adapters for part, _ in adapter.weights)

    def _weights(self, rows: Sequence[Adapter]) -> np.ndarray:
        """Return how much each row takes of each adapter, [rows, adapters]."""
        found = np.zeros((len(rows), len(self.adapters)), np.float32)
        for row, adapter in enumerate(rows):
            for part, weight in adapter.weights:
                found[row, self._place(part)] += weight
        return found

    def gates(self, rows: Sequence[Adapter]) -> dict[str, Any]:
        """Return the gates of rows of these adapters."""
        from onnxruntime import OrtValue

        weights, feeds = self._weights(rows), {}
        for table, names in self._layouts.values():
            made: dict[int, Any] = {}  # by the number of dimensions
            for name in names:
                dims = len(self._slots[name].shape)
                if dims not in made:
                    own = (weights @ table).reshape(len(rows), *(1,) * (dims - 2), -1)
                    made[dims] = OrtValue.ortvalue_from_numpy(own)
                feeds[name] = made[dims]
        return feeds

    def feeds(self, rows: Sequence[Adapter]) -> dict[str, Any]:
        """Return all that rows of these adapters feed."""
        return {**self.tensors, **self.gates(rows)}

    def labels(self, adapter: Adapter) -> slice:
        """Return which of the logits are an adapter's; all where the head is not part of adapters."""
        if not len(self.ends):
            return slice(None)
        place = self._place(adapter.weights[0][0])
        return slice(int(self.ends[place - 1]) if place else 0, int(self.ends[place]))


def _distinct(adapters: Sequence[Adapter]) -> list[Adapter]:
    return list({id(adapter): adapter for adapter in adapters}.values())


class Mixes:
    """The mixes of a loaded bundle, made as they are needed. `default` is the adapter that the graph holds."""

    def __init__(self, slots: Mapping[str, Slot], default: Callable[[], Adapter]) -> None:
        self._slots, self._default = slots, default
        self._fixed = [name for name, slot in slots.items() if slot.stacks is None and not slot.gate]
        self._gated = all(Slot.gate_of(name) in slots for name in slots if name.endswith(DOWN))
        self._kept: list[Mix] = []
        self._lock = threading.Lock()

    def _read(self, adapter: Adapter, name: str) -> np.ndarray:
        """Return what an adapter has in a slot: the default's where it leaves the graph's own."""
        found = adapter.feeds.get(name)
        return (self._default().feeds[name] if found is None else found).numpy()

    def _same(self, name: str, first: Adapter, second: Adapter) -> bool:
        return np.array_equal(self._read(first, name), self._read(second, name))

    def _agree(self, first: Adapter, second: Adapter) -> bool:
        return all(self._same(name, first, second) for name in self._fixed)

    def sum(self, name: str, parts: Sequence[tuple[Adapter, float]], base: Adapter) -> Adapter:
        """Return adapters as one, each times its weight. Raises ArtifactError for one that does more than add B·A."""
        first = parts[0][0]
        for adapter, _ in parts:
            changed = [slot for slot in self._fixed if not self._same(slot, adapter, base)]
            heads = [slot for slot, about in self._slots.items() if about.head]
            other = [slot for slot in heads if not self._same(slot, adapter, first)]
            if not self._gated or changed or adapter.prompt:
                what = f"changes {changed[0]}" if changed else "is one of a graph without gates"
                what = "begins with a prompt of its own" if adapter.prompt else what
                raise ArtifactError(f"{name}: {adapter.name!r} {what}; only what B·A add can be summed. Take it alone.")
            if other or adapter.labels != first.labels:
                raise ArtifactError(
                    f"{name}: {adapter.name!r} has another head than {first.name!r}, and heads do not add. Take one."
                )
        return Adapter(name, first.labels, max(adapter.rank for adapter, _ in parts), {}, parts=tuple(parts))

    def groups(self, rows: Sequence[Adapter]) -> list[list[int]]:
        """Return the places of rows that can share a run, run by run."""
        groups: list[tuple[list[Adapter], list[int]]] = []
        known: dict[int, list[int]] = {}  # id of an adapter: the places of its group
        for place, adapter in enumerate(rows):
            if id(adapter) not in known:
                own = [part for part, _ in adapter.weights]
                fitting = (group for group in groups if self._gated and len(_distinct(group[0] + own)) <= TOGETHER)
                found = next((group for group in fitting if self._agree(group[0][0], own[0])), None)
                if found is None:
                    groups.append(found := ([], []))
                found[0].extend(own)
                known[id(adapter)] = found[1]
            known[id(adapter)].append(place)
        return [places for _, places in groups]

    def of(self, rows: Sequence[Adapter]) -> Mix:
        """Return a mix that holds the adapters of some rows."""
        with self._lock:
            found = next((mix for mix in self._kept if mix.holds(rows)), None)
            if found is None:
                distinct = _distinct([part for adapter in rows for part, _ in adapter.weights])
                found = Mix(sorted(distinct, key=lambda one: one.name), self._slots, self._read)
            self._kept = [found, *(mix for mix in self._kept if mix is not found)][:KEPT]
            return found
