"""NF4 is bitsandbytes' NF4, bit for bit: codes, absmax, double quantization, decoded weights."""

import numpy as np
import pytest
from bitsandbytes import functional

from edgepeft.quant import nf4_block
from edgepeft.quant.formats import FORMATS

FORMAT = FORMATS["nf4b64"]


def normal(n, k, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def mixed():
    w_nk = normal(64, 256)
    w_nk[::3] = 0
    for row, size in {1: 1e-38, 2: 1e-42, 4: 3e36, 5: 1e-30, 7: 1e-20}.items():
        w_nk[row] *= np.float32(size)
    return w_nk


def ties(offset):
    """Rows that hold every midpoint and every code times powers of two, where a float32 neighbour decides."""
    points = np.concatenate([nf4_block.MIDPOINTS, nf4_block.VALUES, -nf4_block.MIDPOINTS, np.ones(18, np.float32)])
    rows = np.tile(points, (16, 1)) * np.float32(2) ** np.arange(-8, 8, dtype=np.float32)[:, None]
    return np.nextafter(rows, np.float32(offset * np.inf)) if offset else rows


CASES = {
    "random": lambda: normal(96, 384),
    "one block": lambda: normal(1, 64),
    "zero": lambda: np.zeros((32, 64), np.float32),
    "constant": lambda: np.full((48, 128), 0.3, np.float32),
    "mixed sizes": mixed,
    "ties": lambda: ties(0),
    "above ties": lambda: ties(1),
    "below ties": lambda: ties(-1),
    "scaled ties": lambda: ties(0) * np.random.default_rng(1).random((16, 1), np.float32),
    "heavy tails": lambda: normal(300, 384) ** 5,
    "partial block of scales": lambda: normal(37, 192),
}


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("case", CASES)
def test_codes_scales_and_weights_are_those_of_bitsandbytes(case, double):
    import torch

    w_nk = CASES[case]()
    packed = FORMAT.quantize(w_nk, double)
    theirs, state = functional.quantize_4bit(
        torch.from_numpy(w_nk), quant_type="nf4", blocksize=64, compress_statistics=double
    )
    flat = theirs.numpy().reshape(-1)
    codes = np.stack([flat >> 4, flat & 15], axis=-1).reshape(w_nk.shape)
    np.testing.assert_array_equal(FORMAT.unpack(packed)[0], codes)
    np.testing.assert_array_equal(FORMAT.dequantize(packed), functional.dequantize_4bit(theirs, state).numpy())
    if not double:
        np.testing.assert_array_equal(FORMAT.unpack(packed)[1].reshape(-1), state.absmax.numpy())
        return
    np.testing.assert_array_equal(packed.extra["absmax_codes"], state.absmax.numpy())
    np.testing.assert_array_equal(packed.extra["absmax_code"], state.state2.code.numpy())
    np.testing.assert_array_equal(packed.extra["absmax_scale"], state.state2.absmax.numpy())
    assert packed.extra["absmax_offset"] == state.offset.numpy()


def test_the_dynamic_map_has_an_entry_per_byte_in_order():
    table = nf4_block.dynamic_map()
    assert table.shape == (256,)
    assert (np.diff(table) > 0).all()
    np.testing.assert_array_equal(table, functional.create_dynamic_map().numpy())


def test_stored_scales_are_what_the_doubly_quantized_ones_decode_to():
    packed = FORMAT.quantize(normal(40, 256), double_quant=True)
    decoded = nf4_block.decode_absmax(packed.extra).reshape(40, 4)
    np.testing.assert_array_equal(FORMAT.unpack(packed)[1], decoded)
