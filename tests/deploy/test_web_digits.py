"""An adapter in 4-bit digits: a browser makes what Python does, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgepeft.runtime import digits

MAKE = """(async () => {
  const { down, up } = await import("/web/digits.js");
  const [a, b] = %s.map((values) => Float32Array.from(values));
  return [...down(a, %d, %d), ...up(b, %d, %d)].map(({ dims, data }) => [dims, [...data]]);
})()"""


@pytest.mark.parametrize(("ranks", "k", "n"), [(1, 32, 5), (4, 64, 33), (17, 96, 40)])
def test_digits_are_those_of_python(pages, ranks: int, k: int, n: int) -> None:
    rng = np.random.default_rng(ranks)
    a, b = rng.standard_normal((ranks, k), np.float32), rng.standard_normal((n, ranks), np.float32)
    a[0, :32] = 0  # a block of nothing
    b[:, 0] = np.arange(n) % 15 / np.float32(2)  # codes half way between two
    wanted = [*digits.down(a), *digits.up(b)]
    given = json.dumps([a.ravel().tolist(), b.ravel().tolist()])
    found = pages("classifier", "wasm").run(MAKE % (given, ranks, k, n, ranks))
    for (dims, values), array in zip(found, wanted, strict=True):
        assert dims == list(array.shape)
        assert np.array_equal(np.array(values, array.dtype), array.ravel())
