"""Keys and values of the tokens a model has seen, so that each is computed once.

    per layer   key, value   [rows, kv_heads, capacity, head_dim]     numpy, mapped into the session as it is
                             float32, float16 (Vulkan), or int8: value = code * scale [kv_heads, 1, head_dim]

The same memory is bound to the graph's past and present, so a run writes its new columns in place and copies nothing.
Rows of a buffer are contiguous: a row alone, or the first few together, are views that bind without a copy too. Only
columns of `tokens` are ever read; going back is forgetting the last of them. Capacity grows in steps, as attention's
own scratch memory grows with it.

int8 takes a quarter of the memory. The scales are constants of the graph, by `edgepeft verify` from the largest values
that the texts of the data have under the exported adapter, and a quarter more; beyond that a value is cut off, which
another adapter may have to bear. A token's keys and values are rounded before anything sees them, so whether they came
in one run or many makes no difference. It is ONNX Runtime's own attention: 1.32 has it, 1.20 has not. Steps
behind a long text are faster with it, but a long prompt is read more slowly.

On a GPU the memory is the GPU's (GpuCache): keys and values leave it only where it grows or is copied to another cache,
which goes through the CPU. A token copies its number and its logits however long the text is.

An adapter's prompt (`edgepeft.runtime.prompts`) is a row's first columns, which no token of `tokens` is of.

What a row holds is true for its adapter alone, since keys and values went through it. Idle caches wait in a Pool. A
prompt of the same adapter that begins as one of them does goes on in it, or, where that would throw away more than half
of it, in a new one that the beginning is copied to: so conversations that share no more than how they open do not take
each other's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgepeft.runtime import webgpu
from edgepeft.runtime.adapters import Adapter

STEP = 256  # columns


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


class Cache:
    """Keys and values of sequences; tokens[row] is what a row is of, adapters[row] what it went through.

    shape: (layers, kv_heads, head_dim); context: the most columns there can be; dtype: of keys and values; zeros: what
    makes their memory, numpy's or one that a GPU sees too.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        shape: tuple[int, int, int],
        context: int,
        dtype: Any = np.float32,
        zeros: Callable[[tuple[int, ...], Any], np.ndarray] = np.zeros,
    ) -> None:
        layers, self._heads, self._width = shape
        self.adapters, rows = list(adapters), len(adapters)
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.context = context
        self.bindings: dict[tuple[int, ...], Any] = {}
        self.capacity = 0  # columns that there is memory for
        self._dtype, self._zeros = dtype, zeros
        self._buffers: list[Any] = [np.zeros((rows, self._heads, 0, self._width), dtype) for _ in range(2 * layers)]

    def columns(self, row: int) -> int:
        """Return how many columns a row has: those of its adapter's prompt, and its tokens'."""
        return self.adapters[row].columns + len(self.tokens[row])

    def reserve(self, length: int) -> None:
        """Make memory for `length` columns and some more. Bindings made before are void."""
        used = max(map(self.columns, range(len(self.tokens))))
        if max(length, used) <= self.capacity:
            return
        columns = min(self.context, max(-(-max(length, used) // STEP) * STEP, 2 * self.capacity))
        self.bindings.clear()
        for place, old in enumerate(self._buffers):
            new = self._zeros((len(self.tokens), self._heads, columns, self._width), self._dtype)
            if self.capacity:
                new[:, :, :used] = self._array(old)[:, :, :used]
            else:
                self._begin(place, new)
            self._put(place, new)
        self.capacity = columns

    def _begin(self, place: int, new: np.ndarray) -> None:
        """Write what the rows' adapters put before the text into new memory."""
        for row, adapter in enumerate(self.adapters):
            if adapter.prompt:
                new[row, :, : adapter.columns] = list(adapter.prompt.values())[place][0]

    def _array(self, buffer: Any) -> np.ndarray:
        """Return what a buffer holds."""
        return buffer

    def _put(self, place: int, array: np.ndarray) -> None:
        """Let a buffer be what an array is."""
        self._buffers[place] = array

    def values(self, first: int, count: int) -> list[Any]:
        """Return the memory of some rows as ONNX Runtime binds it; this cache keeps it alive."""
        from onnxruntime import OrtValue

        return [OrtValue.ortvalue_from_numpy(view) for view in self.views(first, count)]

    def views(self, first: int, count: int) -> list[np.ndarray]:
        """Return the memory of some rows: key and value of the first layer, of the second, and so on."""
        return [buffer[first : first + count] for buffer in self._buffers]

    def forget(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row."""
        del self.tokens[row][length:]

    def copy(self, row: int, source: Cache, source_row: int, length: int) -> None:
        """Take over the first `length` tokens of a row, of this cache or another, and what adapter they are of."""
        end = source.adapters[source_row].columns + length
        self.reserve(end)
        for place, other in enumerate(source._buffers):
            mine = self._array(self._buffers[place])
            mine[row, :, :end] = source._array(other)[source_row, :, :end]
            self._put(place, mine)
        self.tokens[row], self.adapters[row] = source.tokens[source_row][:length], source.adapters[source_row]

    def clear(self) -> None:
        """Forget everything, as after a run that failed."""
        for tokens in self.tokens:
            tokens.clear()


class GpuCache(Cache):
    """Keys and values of one sequence in a GPU's memory."""

    def _array(self, buffer: Any) -> np.ndarray:
        return buffer.numpy()

    def _put(self, place: int, array: np.ndarray) -> None:
        self._buffers[place] = webgpu.on_device(array)
        self.bindings.clear()

    def values(self, first: int, count: int) -> list[Any]:
        """Return the memory where it is."""
        return self._buffers


class Pool:
    """Idle caches of single sequences, the last used first; at most `keep`, then the oldest goes. For all threads."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._idle: list[Cache] = []
        self._lock = threading.Lock()

    def _best(self, adapter: Adapter, ids: Sequence[int]) -> tuple[Cache | None, int]:
        """Return this adapter's cache that shares the longest beginning with `ids`, and how long that is."""
        own = [(shared(cache.tokens[0], ids), cache) for cache in self._idle if cache.adapters[0] is adapter]
        length, best = max(own, key=lambda pair: pair[0], default=(0, None))
        return (best, length) if length else (None, 0)

    def take(self, adapter: Adapter, ids: Sequence[int]) -> Cache | None:
        """Hand out a cache that begins as `ids` do and holds nothing else, unless more than half of it would go."""
        with self._lock:
            best, length = self._best(adapter, ids)
            if best is None or 2 * length < len(best.tokens[0]):
                return None
            self._idle.remove(best)
            best.forget(0, length)
            return best

    def fill(self, cache: Cache, row: int, ids: Sequence[int]) -> None:
        """Copy the longest beginning of `ids` that is known, here or in an earlier row, to a row of a new cache."""
        with self._lock:
            best, length = self._best(cache.adapters[row], ids)
            rows = [(length, best, 0)] if best is not None else []
            own = [place for place in range(row) if cache.adapters[place] is cache.adapters[row]]
            rows += [(shared(cache.tokens[place], ids), cache, place) for place in own]
            length, source, place = max(rows, key=lambda found: found[0], default=(0, cache, row))
            if length:
                cache.copy(row, source, place, length)

    def give(self, cache: Cache) -> None:
        """Take back a cache, if there is anything in it."""
        if len(cache.tokens) == 1 and cache.tokens[0]:
            with self._lock:
                self._idle = [cache, *self._idle][: self.keep]
