"""What adapters add beside the terms of a linear: schema, ONNX body and numpy reference of each, one row of BRANCHES.

    RouterGate    gate[..., e·R/E + r] = softmax(router x)[e]            x [.., K], router [E, K], A [R, K]
    Before        z = rows, then x, in each row of a batch               x [B, S, H], rows [V, H], z [B, V + S, H]
    Bottleneck    z = y + up·gelu(down·h + down_bias) + up_bias          y [.., N], h [.., H], down [R, H], up [N, R]

They are functions of domain `edgepeft` like those of `functions`, without kernels of our own: ONNX Runtime inlines them
everywhere, as products of float matrices. A router over one expert gives 1 and a bottleneck of width 0 and no bias adds
nothing: these are the neutral ones, which stand for an adapter that has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepeft.export.functions import Function

if TYPE_CHECKING:
    import numpy as np

    from edgepeft.export.body import Body


def _router_body(body: Body) -> None:
    share = body("Softmax", body("MatMul", "x", body.transposed("router")), axis=-1)
    each = body("Div", body("Shape", "a", start=0, end=1), body("Shape", "router", start=0, end=1))
    wide = body("Expand", body("Unsqueeze", share, body.ints(-1)), each)
    leading = body("Shape", share, start=0, end=-1)
    shape = body("Concat", leading, body("Shape", "a", start=0, end=1), axis=0)
    body("Reshape", wide, shape, out="gate", allowzero=1)


def router_gate(x: np.ndarray, router: np.ndarray, a: np.ndarray) -> list[np.ndarray]:
    """Return [each expert's share, once for each of its ranks] in float64."""
    import numpy as np

    scores = x.astype(np.float64) @ router.astype(np.float64).T
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return [np.repeat(share / share.sum(axis=-1, keepdims=True), len(a) // len(router), axis=-1)]


def _before_body(body: Body) -> None:
    count = body("Concat", body("Shape", "x", start=0, end=1), body.ints(1, 1), axis=0)
    each = body("Expand", body("Unsqueeze", "rows", body.ints(0)), count)
    body("Concat", each, "x", out="z", axis=1)


def before(x: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Return [rows, then x] in float64."""
    import numpy as np

    return [np.concatenate([np.broadcast_to(rows, (len(x), *rows.shape)), x], 1).astype(np.float64)]


def _bottleneck_body(body: Body) -> None:
    low = body("Add", body("MatMul", "h", body.transposed("down")), "down_bias")
    added = body("Add", body("MatMul", body("Gelu", low), body.transposed("up")), "up_bias")
    body("Add", "y", added, out="z")


def bottleneck(
    y: np.ndarray, h: np.ndarray, down: np.ndarray, down_bias: np.ndarray, up: np.ndarray, up_bias: np.ndarray
) -> list[np.ndarray]:
    """Return [y + up gelu(down h + down_bias) + up_bias] in float64."""
    import math

    import numpy as np

    low = h.astype(np.float64) @ down.T + down_bias
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return [y + (0.5 * low * (1 + erf(low / math.sqrt(2)))) @ up.T + up_bias]


BRANCHES = {
    row.name: row
    for row in (
        Function("RouterGate", ("x", "router", "a"), ("gate",), _router_body, router_gate),
        Function("Before", ("x", "rows"), ("z",), _before_body, before),
        Function("Bottleneck", ("y", "h", "down", "down_bias", "up", "up_bias"), ("z",), _bottleneck_body, bottleneck),
    )
}
