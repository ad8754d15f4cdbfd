"""A bundle of ours as a measured process: `python -m edgepeft.bench.peers.ours '{"folder": ..., "threads": 1}'`."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from edgepeft import __version__
from edgepeft.bench.peers import protocol
from edgepeft.runtime import load
from edgepeft.runtime.adapters import BASE, DEFAULT


class Text:
    """A cache of one row."""

    def __init__(self, model: Any, adapter: str) -> None:
        self._model = model
        self._cache = model._cache(model._get(adapter), 1)

    @property
    def length(self) -> int:
        """Return how many tokens were read."""
        return len(self._cache.tokens[0])

    def read(self, ids: list[int]) -> None:
        """Read tokens in the chunks that the runtime reads prompts in."""
        for start in range(0, len(ids), self._model.chunk):
            self._model._run(self._cache, 0, np.array([ids[start : start + self._model.chunk]], np.int64))

    def back(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._cache.forget(0, length)


class Engine:
    """A loaded bundle."""

    def __init__(self, folder: str, threads: int) -> None:
        self._model: Any = load(folder, threads)
        self.version, self.vocabulary = __version__, self._model.vocabulary

    def open(self, adapter: bool) -> Text:
        """Return an empty text."""
        return Text(self._model, DEFAULT if adapter else BASE)

    def end_profiling(self) -> str:
        """Return the file of ONNX Runtime's profile, if the session was made to write one."""
        return self._model.session.end_profiling()


if __name__ == "__main__":
    import onnxruntime  # noqa: F401 - packages are imported before the clock starts, as the peers' are

    import edgepeft.runtime.generate  # noqa: F401 - likewise

    about = json.loads(sys.argv[1])
    protocol.serve(lambda: Engine(about["folder"], about["threads"]))
