"""A loaded language model that writes: prompts in, answers out, token by token.

    prompt ─ template, tokens ─► ids ─ chunks ─► session ─► logits of the last ─ sample ─► token ─┐
                                                    ▲  │ keys, values: the same memory            │
                                                    └──┴──────────── one token a step ◄───────────┘

Prompts are read row by row, `chunk` tokens at a time, so that memory does not grow with the prompt; what is known of a
prompt's beginning (see edgepeft.runtime.cache) is not read again. Rows then write together, one run a step for all,
each under its own adapter (see edgepeft.runtime.mixing for those that cannot share a run). A row is what it would be
alone, up to the rounding of sums that a kernel takes in another order for more rows.

Prompt and answer share the context. A longer prompt is an error, and an answer that fills it ends with "length".

One object serves many threads: a cache belongs to one answer at a time, and a pool of them is locked only to take one
and give it back. A call that fails, is cancelled or is interrupted leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Generator as Pieces
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from edgepeft.errors import ArtifactError, ConfigError, DataError
from edgepeft.runtime import library as lib
from edgepeft.runtime import prompts, webgpu
from edgepeft.runtime.adapters import Adapter
from edgepeft.runtime.answer import Answer, Clock, Row, Stream
from edgepeft.runtime.cache import Cache, GpuCache, Pool
from edgepeft.runtime.chat import ChatTemplate
from edgepeft.runtime.fallback import or_on_the_cpu
from edgepeft.runtime.manifest import Manifest
from edgepeft.runtime.sampling import Sampler, Sampling
from edgepeft.runtime.session import Bundle, Name, Names, cache_scales, per_row
from edgepeft.runtime.stream import Decoding, Stops
from edgepeft.runtime.tokens import Tokens, is_unicode

MAX_NEW_TOKENS = 256
CHUNK = 256
IDLE_CACHES = 2
Messages = Sequence[Mapping[str, Any]]
Prompt = str | Messages


def _is_batch(prompt: Any) -> bool:
    """Tell a list of prompts from one prompt, which is a string or messages."""
    if isinstance(prompt, str):
        return False
    if not isinstance(prompt, (list, tuple)):
        raise DataError(f"prompt: expected a string, messages, or a list of these, found {type(prompt).__name__}.")
    return not (prompt and isinstance(prompt[0], Mapping))


def _stop_strings(stop: str | Sequence[str]) -> list[str]:
    strings: list[Any] = list(stop) if isinstance(stop, (list, tuple)) else [stop]
    if not all(isinstance(string, str) and string for string in strings):
        raise ConfigError(f"stop: expected strings that are not empty, found {stop!r:.60}.")
    return strings


class Bound(NamedTuple):
    """What a run is bound to: `logits` [rows, 1, vocabulary] are one token's, and `value` as ONNX Runtime has them."""

    binding: Any
    logits: np.ndarray
    value: Any
    alive: Any  # what has to live as long


@functools.cache
def _number(value: int) -> Any:
    """Return a number as a tensor [1] that ONNX Runtime holds."""
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.array([value], np.int64))


class Generator(Bundle):
    """A bundle ready to write. Made by `load`; safe to call from several threads.

    chunk: tokens of a prompt that one run reads.  pool.keep: caches of ended answers that stay in memory, for prompts
    that go on from them; one takes 8 * layers * kv_heads * head_dim bytes a token, a quarter of that as int8.
    """

    def __init__(self, manifest: Manifest, session: Any, library: lib.Library | None, threads: int) -> None:
        super().__init__(manifest, session, library, threads)
        about = manifest["decoder"]
        self.context = int(manifest["context"])
        self.vocabulary = int(about["vocabulary"])
        self.chunk = webgpu.CHUNK if self.gpu else CHUNK
        self.pool = Pool(IDLE_CACHES)
        self.tokens = Tokens(manifest.folder / "tokenizer.json", None)
        self.template = ChatTemplate(manifest.folder)
        self._shape = (int(about["layers"]), int(about["kv_heads"]), int(about["head_dim"]))
        self._eos = tuple(about["eos"])
        self._bos = about["bos"] if about.get("add_bos") else None

    def _make(self, name: str) -> Adapter:
        """Return an adapter, its prompt as this model's cache holds it."""
        made = super()._make(name)
        if made.columns >= int(self.manifest["context"]):
            what = f"its prompt of {made.columns} leaves nothing of the {self.manifest['context']} tokens of context"
            raise ArtifactError(f"{self.manifest.folder}: adapter {name!r}: {what}. Export with a larger --context.")
        if not made.prompt or self._kept_as != np.int8:
            return made
        return dataclasses.replace(made, prompt=prompts.codes(made.prompt, cache_scales(self.manifest)))

    @functools.cached_property
    def _kept_as(self) -> Any:
        """The type of keys and values."""
        kind = next(item.type for item in self.session.get_inputs() if item.name == "past_key_values.0.key")
        return {"tensor(int8)": np.int8, "tensor(float16)": np.float16}.get(kind, np.float32)

    # --- what a caller sees ---

    @or_on_the_cpu
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | Sequence[int | None] | None = None,
        adapter: Names = None,
        stream: bool = False,
        cancel: threading.Event | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return an `Answer` for a prompt, a list of them for a list of prompts, or a `Stream` of its text's pieces.

        A prompt is a string, which is continued, or messages, which the chat template makes a prompt of. Temperature 0
        is greedy. `seed` and `adapter` may be lists, one for each prompt; adapter None is the one in use, and {name:
        weight} a sum, exact for adapters that add B·A and nothing else (else ArtifactError). `cancel` ends
        all answers when it is set. `template_options` go to the chat template.

        Raises DataError for a prompt that is none or is longer than the context, ConfigError for settings that cannot
        be, VerifyError for logits that are not finite.
        """
        batch = _is_batch(prompt)
        if batch and stream:
            raise ConfigError("stream: one answer at a time; give one prompt, or stream=False.")
        asked: list[Any] = list(prompt) if batch else [prompt]
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        strings, adapters = _stop_strings(stop), per_row("adapter", adapter, len(asked))
        seeds = per_row("seed", seed, len(asked))
        chosen = [self._get(name) for name in adapters]
        rows = [
            self._row(one, own, max_new_tokens, sampling, number, strings, template_options)
            for one, own, number in zip(asked, chosen, seeds, strict=True)
        ]
        if stream:
            return Stream(rows[0], self._write([row for row in rows if not row.finish], chosen, cancel))
        self._write_all(rows, chosen, cancel)
        answers = [row.answer() for row in rows]
        return answers if batch else answers[0]

    def chat(self, messages: str | Messages, **options: Any) -> Any:
        """Return the answer to messages, or to one of the user: `generate` with its options."""
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.generate(list(asked), **options)

    def encode(self, prompt: Prompt, template_options: Mapping[str, Any] | None = None) -> list[int]:
        """Return the tokens of a prompt. A string begins with the model's own first token if it has one.

        Raises DataError for a prompt without tokens, or with more than the context holds.
        """
        if isinstance(prompt, str):
            if not is_unicode(prompt):
                raise DataError(f"prompt: not valid Unicode (half of a surrogate pair): {prompt!r:.60}.")
            ids = self.tokens.ids(prompt)
            ids = [self._bos, *ids] if self._bos is not None and ids[:1] != [self._bos] else ids
        else:
            ids = self.tokens.ids(self.template.render(prompt, template_options))
        if not ids:
            raise DataError("prompt: empty, and this model has no token to begin with. Give it a text.")
        self._check_length("prompt", len(ids), 0)
        return ids

    def _check_length(self, what: str, count: int, columns: int) -> None:
        """Raise DataError for more tokens than the context holds behind the `columns` of an adapter's prompt."""
        if count > self.context - columns:
            less = f", {columns} of which are the adapter's" if columns else ""
            raise DataError(f"{what}: {count} tokens, this model's context has {self.context}{less}. Shorten it.")

    @or_on_the_cpu
    def logits(self, tokens: Sequence[int], adapter: Name = None, keep: int | None = None) -> np.ndarray:
        """Return logits float32 [len(tokens), vocabulary] of a token list, or of its last `keep`.

        Row i is what the model expects after token i. For more than fits into memory, see `logits_by_chunk`.
        """
        first = 0 if keep is None else max(0, len(tokens) - keep)
        out = np.empty((len(tokens) - first, self.vocabulary), np.float32)
        for start, part in self.logits_by_chunk(tokens, adapter, first):
            out[start - first : start - first + len(part)] = part
        return out

    def logits_by_chunk(
        self, tokens: Sequence[int], adapter: Name = None, first: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (place, logits float32 [some, vocabulary]) of the tokens from `first` on, in order."""
        ids = np.array(tokens, np.int64).reshape(1, -1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocabulary):
            raise DataError(f"tokens: expected ids from 0 to {self.vocabulary - 1}, found {ids.min()} to {ids.max()}.")
        chosen = self._get(adapter)
        self._check_length("tokens", ids.size, chosen.columns)
        cache = self._cache(chosen, 1)
        for start in range(0, ids.size, self.chunk):
            part = ids[:, start : start + self.chunk]
            wanted = start + part.shape[1] - max(first, start)
            found = self._run(cache, 0, part, max(wanted, 1))[0]
            if wanted > 0:
                yield max(first, start), found.copy() if wanted == 1 else found

    # --- how it is done ---

    def trial(self) -> None:
        """Read a token."""
        self.logits([0])

    def _row(
        self,
        prompt: Prompt,
        adapter: Adapter,
        asked: int,
        sampling: Sampling,
        seed: int | None,
        stop: list[str],
        template_options: Mapping[str, Any] | None,
    ) -> Row:
        """Return the row that will be a prompt's answer."""
        if not isinstance(asked, int) or asked < 1:
            raise ConfigError(f"max_new_tokens: expected a whole number of at least 1, found {asked!r}.")
        ids = self.encode(prompt, template_options)
        self._check_length("prompt", len(ids), adapter.columns)
        left = self.context - adapter.columns - len(ids)
        before = ids if isinstance(prompt, str) else ()  # an answer to messages begins a text of its own
        decoding = Decoding(self.tokens.text, before)
        row = Row(ids, min(asked, left), self._eos, Sampler(sampling, ids, seed), decoding, Stops(stop))
        if asked > left:
            row.note = f"the prompt has {len(ids)} of the context's {self.context} tokens, so {left} are left to answer"
        return row

    def _write_all(self, rows: list[Row], adapters: list[Adapter], cancel: threading.Event | None) -> None:
        """Write the answers of a batch, together where their adapters can share a run."""
        for group in self._groups(adapters):
            places = [place for place in group if not rows[place].finish]
            for _ in self._write([rows[place] for place in places], [adapters[place] for place in places], cancel):
                pass

    def _write(
        self, active: list[Row], adapters: list[Adapter], cancel: threading.Event | None
    ) -> Pieces[tuple[Row, str], None, None]:
        """Write rows that share runs and yield each piece of their texts, in the order they come."""
        if not active:
            return
        known = self.pool.take(adapters[0], active[0].prompt) if len(active) == 1 else None
        cache = known or self._empty(adapters)
        stopped = (cancel or threading.Event()).is_set
        try:
            for place, row in enumerate(active):
                yield row, self._prefill(cache, place, row, stopped)
            while self._close_ranks(cache, active):
                if stopped():
                    yield from [(row, row.cancel()) for row in active]
                else:
                    yield from self._step(cache, active)
        except GeneratorExit:
            raise
        except BaseException:  # what the cache holds may be half of something, or wrong
            cache.clear()
            raise
        finally:
            self.pool.give(cache)

    def _prefill(self, cache: Cache, place: int, row: Row, stopped: Any) -> str:
        """Read a row's prompt and return the text of its first token."""
        if not cache.tokens[place]:
            self.pool.fill(cache, place, row.prompt)
        cache.forget(place, len(row.prompt) - 1)  # the last one is run again for its logits
        row.reused = len(cache.tokens[place])
        with Clock([row], "prefill_s"):
            for start in range(row.reused, len(row.prompt), self.chunk):
                if stopped():
                    return row.cancel()
                logits = self._run(cache, place, np.array([row.prompt[start : start + self.chunk]], np.int64))
            return row.take(logits[0, -1])

    @staticmethod
    def _close_ranks(cache: Cache, active: list[Row]) -> bool:
        """Drop rows that have ended, moving the last into each gap, and tell whether any is left."""
        for place in reversed(range(len(active))):
            if active[place].finish:
                last = len(active) - 1
                if place != last:
                    cache.copy(place, cache, last, len(cache.tokens[last]))
                    active[place] = active[last]
                active.pop()
        return bool(active)

    def _step(self, cache: Cache, active: list[Row]) -> list[tuple[Row, str]]:
        """Write one token in each row and return their texts."""
        with Clock(active, "decode_s"):
            ids = np.array([row.tokens[-1:] for row in active], np.int64)
            logits = self._run(cache, 0, ids)
            return [(row, row.take(found)) for row, found in zip(active, logits[:, -1], strict=True)]

    def _cache(self, adapter: Adapter, rows: int) -> Cache:
        return self._empty([adapter] * rows)

    def _empty(self, adapters: list[Adapter]) -> Cache:
        """Return an empty cache of rows of some adapters: of one row on a GPU."""
        if self.gpu:
            return GpuCache(adapters, self._shape, self.context, self._kept_as)
        zeros = self.memory.zeros if self.memory else np.zeros
        return Cache(adapters, self._shape, self.context, self._kept_as, zeros)

    def _groups(self, adapters: Sequence[Adapter]) -> list[list[int]]:
        """Return the places of rows that are written together: each by itself on a GPU."""
        return [[place] for place in range(len(adapters))] if self.gpu else self._mixes.groups(adapters)

    def _run(self, cache: Cache, first: int, ids: np.ndarray, keep: int = 1) -> np.ndarray:
        """Run new tokens [rows, sequence] of the cache's rows from `first` on; return logits [rows, keep, vocabulary].

        More than one token at a time is for one row alone: attention takes no more in one run. Logits of one token lie
        in memory that the next run of these rows writes anew.
        """
        rows, new = ids.shape
        lengths = [cache.columns(first + row) + new for row in range(rows)]
        total = max(lengths)
        cache.reserve(total)
        bound = self._bound(cache, first, rows)
        binding = bound.binding
        mask = np.zeros((rows, total), np.int64)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
        binding.bind_cpu_input("input_ids", ids)
        if self.gpu:
            for name, array in webgpu.decoder_inputs(self.session, mask, new, keep, cache.capacity).items():
                binding.bind_cpu_input(name, array)
        else:
            binding.bind_cpu_input("attention_mask", mask)
            binding.bind_ortvalue_input("logits_to_keep", _number(keep))  # a default's takes no array
        if keep == 1:  # as the graph declares it; telling ONNX Runtime's outputs apart costs more than all else here
            binding.bind_ortvalue_output("logits", bound.value)
        else:
            binding.bind_output("logits")
        self._run_bound(binding)
        for row in range(rows):
            cache.tokens[first + row] += ids[row].tolist()
        return bound.logits if keep == 1 else binding.get_outputs()[-1].numpy()

    def _bound(self, cache: Cache, first: int, rows: int) -> Bound:
        """Return a binding of adapters and of some rows' keys and values, which go in and come out in one place.

        `logits` are bound after them, so they are the last output.
        """
        from onnxruntime import OrtValue

        adapters = cache.adapters[first : first + rows]
        key = (first, *map(id, adapters))
        if key not in cache.bindings:
            feeds = self._feeds(adapters)
            binding = self._bind(feeds)
            for place, value in enumerate(cache.values(first, rows)):
                name = f"{place // 2}.{'key' if place % 2 == 0 else 'value'}"
                binding.bind_ortvalue_input(f"past_key_values.{name}", value)
                binding.bind_ortvalue_output(f"present.{name}", value)
            logits = np.empty((rows, 1, self.vocabulary), np.float32)
            cache.bindings[key] = Bound(binding, logits, OrtValue.ortvalue_from_numpy(logits), (feeds, adapters))
        return cache.bindings[key]


__all__ = ["Answer", "Generator", "Stream"]
