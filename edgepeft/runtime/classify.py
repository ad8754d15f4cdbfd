"""A loaded bundle that classifies texts.

    text ── tokens ──► ids, mask, types int64 [batch, sequence] ──┐
                                                                  ├──► session ──► logits float32 [batch, labels]
    adapter ── mapped file ──► OrtValues, bound once ─────────────┘

A call binds only the ids anew, so neither the number of adapters nor that of their tensors is paid per call. Bindings
are kept per thread and adapter, so one Model serves many threads, each call with the adapter it names. The texts of one
call may have adapters of their own, see `edgepeft.runtime.mixing`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from edgepeft.errors import ArtifactError
from edgepeft.runtime import adapters as ad
from edgepeft.runtime import library as lib
from edgepeft.runtime import webgpu
from edgepeft.runtime.fallback import or_on_the_cpu
from edgepeft.runtime.manifest import Manifest
from edgepeft.runtime.mixing import Mix
from edgepeft.runtime.session import Bundle, Name, Names, per_row
from edgepeft.runtime.tasks import Prediction, predictions
from edgepeft.runtime.tokens import Tokens, check_texts


class Model(Bundle):
    """A bundle ready to classify. Made by `load`; safe to call from several threads."""

    def __init__(self, manifest: Manifest, session: Any, library: lib.Library | None, threads: int) -> None:
        super().__init__(manifest, session, library, threads)
        self.tokens = Tokens(manifest.folder / "tokenizer.json", int(manifest["max_length"]))
        self._inputs = [item.name for item in session.get_inputs()]
        self._output = session.get_outputs()[0].name
        self._local = threading.local()

    def _make(self, name: str) -> ad.Adapter:
        """Return an adapter. Raises ArtifactError for a prompt longer than what the longest text leaves room for."""
        made, longest = super()._make(name), int(self.manifest["max_length"])
        if made.columns and longest + made.columns > (most := int(self.manifest["positions"])):
            what = f"its prompt of {made.columns} and a text of {longest} tokens take more than the {most} positions"
            raise ArtifactError(f"{self.manifest.folder}: adapter {name!r}: {what}. Build with a smaller --max-length.")
        return made

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels of the adapter in use, in the order of the logits."""
        return self._active.labels

    def _binding(self, adapter: ad.Adapter) -> Any:
        """Return this thread's binding of an adapter's tensors."""
        kept = self._local.__dict__.setdefault("bindings", {})
        if adapter.name not in kept:
            kept[adapter.name] = self._bind(self._feeds([adapter]))
        return kept[adapter.name]

    def _gated_binding(self, mix: Mix, rows: Sequence[ad.Adapter]) -> Any:
        """Return this thread's binding of a mix's tensors, and of the gates of some rows, which may change."""
        kept = self._local.__dict__.setdefault("mixed", weakref.WeakKeyDictionary())
        binding, gates, gated = kept[mix] if mix in kept else (self._bind(mix.tensors), {}, [])
        if list(map(id, rows)) != list(map(id, gated)):
            gates = mix.gates(rows)
            for name, value in gates.items():
                binding.bind_ortvalue_input(name, value)
        kept[mix] = binding, gates, list(rows)
        return binding

    def trial(self) -> None:
        """Classify a word."""
        self.logits(["a"])

    def run(self, arrays: dict[str, np.ndarray], adapter: Name = None) -> np.ndarray:
        """Return logits float32 [batch, labels] for ready input arrays, int64 [batch, sequence]."""
        chosen = self._get(adapter)
        if chosen.parts:
            return np.stack(self._run_rows(arrays, [chosen] * len(arrays[self._inputs[0]])))
        return self._run(self._binding(chosen), arrays, chosen.columns)

    def _run(self, binding: Any, arrays: dict[str, np.ndarray], columns: int = 0) -> np.ndarray:
        arrays = webgpu.classifier_inputs(self.session, arrays, columns) if self.gpu else arrays
        for name in self._inputs:
            binding.bind_cpu_input(name, arrays[name])
        binding.bind_output(self._output)  # anew each time: a kept one would be written into, whatever its shape
        self._run_bound(binding)
        return binding.copy_outputs_to_cpu()[0]

    def _run_rows(self, arrays: dict[str, np.ndarray], rows: Sequence[ad.Adapter]) -> list[np.ndarray]:
        """Return the logits [labels] of each row under its own adapter."""
        if all(adapter is rows[0] for adapter in rows) and not rows[0].parts:
            return list(self._checked(self.run(arrays, rows[0].name), rows[0]))
        mix = self._mixes.of(rows)
        found = self._run(self._gated_binding(mix, rows), arrays)
        return [
            self._checked(row[None, mix.labels(adapter)], adapter)[0] for row, adapter in zip(found, rows, strict=True)
        ]

    @staticmethod
    def _checked(found: np.ndarray, adapter: ad.Adapter) -> np.ndarray:
        """Return logits [rows, labels]. Raises ArtifactError when they are not one for each of the adapter's labels."""
        if found.shape[1:] != (len(adapter.labels),):
            raise ArtifactError(
                f"adapter {adapter.name!r}: its head gives {found.shape[1]} logits, it names {len(adapter.labels)} "
                "labels. Its labels.json belongs to another head."
            )
        return found

    @or_on_the_cpu
    def logits(self, texts: Sequence[str], adapter: Name = None, batch_size: int = 32) -> np.ndarray:
        """Return logits float32 [len(texts), labels]; texts of like length share a batch."""
        chosen = self._get(adapter)
        found = self._logits_of_rows(texts, [chosen] * len(texts), batch_size)
        return np.array(found, np.float32).reshape(len(texts), len(chosen.labels))

    def _logits_of_rows(
        self, texts: Sequence[str], adapters: Sequence[ad.Adapter], batch_size: int = 32
    ) -> list[np.ndarray]:
        """Return the logits [labels] of each text under its adapter."""
        out: list[Any] = [None] * len(texts)
        for group in self._groups(adapters):
            for places, arrays in self.tokens.batches([texts[place] for place in group], batch_size):
                rows = [group[place] for place in places]
                for row, found in zip(rows, self._run_rows(arrays, [adapters[row] for row in rows]), strict=True):
                    out[row] = found
        return out

    @overload
    def classify(self, text: str, adapter: Name = ..., top_k: int | None = ...) -> Prediction: ...

    @overload
    def classify(
        self, text: list[str] | tuple[str, ...], adapter: Names = ..., top_k: int | None = ...
    ) -> list[Prediction]: ...

    @or_on_the_cpu
    def classify(
        self, text: str | list[str] | tuple[str, ...], adapter: Names = None, top_k: int | None = None
    ) -> Prediction | list[Prediction]:
        """Return the label and scores of one text, or a list of them for several, in order.

        `adapter` may be a list, one for each text; {name: weight} is a sum, exact for adapters that add B·A and nothing
        else (else ArtifactError), None the one in use. Raises DataError for an empty text and
        VerifyError for logits that are not finite.
        """
        texts = check_texts(text)
        adapters = [self._get(name) for name in per_row("adapter", adapter, len(texts))]
        rows = zip(self._logits_of_rows(texts, adapters), adapters, strict=True)
        found = [predictions(logits[None], own.labels, top_k)[0] for logits, own in rows]
        return found[0] if isinstance(text, str) else found
