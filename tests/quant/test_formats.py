"""Every format of the tables: bytes on disk, errors, what it refuses."""

import subprocess
import sys

import numpy as np
import pytest

from edgepeft.errors import ModelError
from edgepeft.quant.formats import EMBEDDING_FORMATS, FORMATS, TIED_FORMATS, TILE_COLUMNS, TILE_ROWS, Packed
from edgepeft.quant.solvers import SOLVERS

ALL = [*FORMATS.values(), *EMBEDDING_FORMATS.values()]
IDS = [f"{fmt.tag}-{fmt.layout}" for fmt in ALL]
every_format = pytest.mark.parametrize("fmt", ALL, ids=IDS)
TILED = list(FORMATS.values())
ROWS = list(EMBEDDING_FORMATS.values())


def normal(n, k, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def random_parts(fmt, n, k, seed=1):
    chance = np.random.default_rng(seed)
    codes = chance.integers(0, 1 << fmt.bits, (n, k), dtype=np.uint8)
    return codes, chance.standard_normal((n, fmt.blocks(k))).astype(fmt.scale_dtype)


@pytest.mark.parametrize("n", [1, 16, 17, 40])
@pytest.mark.parametrize("fmt", TILED, ids=[fmt.tag for fmt in TILED])
def test_tiles_are_laid_out_as_the_kernels_read_them(fmt, n):
    k = 2 * fmt.k_multiple
    codes, scales = random_parts(fmt, n, k)
    packed = fmt.pack(codes, scales)
    assert (packed.w.shape, packed.scale.shape) == fmt.packed_shapes(n, k)
    assert packed.scale.dtype == fmt.scale_dtype
    code_at = lambda row, column: int(codes[row, column]) if row < n else fmt.zero  # noqa: E731 - one line
    for t in range(packed.w.shape[0]):
        for u in range(k // TILE_COLUMNS):
            for j in range(fmt.bits):
                for row in range(TILE_ROWS):
                    for i in range(4):
                        column = TILE_COLUMNS * u + 4 * j + i
                        expected = code_at(16 * t + row, column)
                        if fmt.bits == 4:
                            expected |= code_at(16 * t + row, column + 16) << 4
                        assert packed.w[t, u, (j * 16 + row) * 4 + i] == expected
        for b in range(fmt.blocks(k)):
            for row in range(TILE_ROWS):
                assert packed.scale[t, b, row] == (scales[16 * t + row, b] if 16 * t + row < n else 0)


@pytest.mark.parametrize("fmt", ROWS, ids=[fmt.tag for fmt in ROWS])
def test_rows_put_the_first_code_into_the_low_nibble(fmt):
    codes, scales = random_parts(fmt, 5, 64)
    packed = fmt.pack(codes, scales)
    for row in range(5):
        for column in range(64):
            byte = int(packed.w[row, column * fmt.bits // 8])
            found = byte if fmt.bits == 8 else (byte >> 4 if column % 2 else byte & 15)
            assert found == codes[row, column]
    assert packed.scale is scales


@pytest.mark.parametrize("n", [1, 15, 33])
@every_format
def test_unpacking_returns_what_was_packed(fmt, n):
    codes, scales = random_parts(fmt, n, 2 * fmt.k_multiple)
    found_codes, found_scales = fmt.unpack(fmt.pack(codes, scales))
    np.testing.assert_array_equal(found_codes, codes)
    np.testing.assert_array_equal(found_scales, scales)


@every_format
def test_dequantizing_is_one_exact_product(fmt):
    codes, scales = random_parts(fmt, 3, fmt.k_multiple)
    found = fmt.dequantize(fmt.pack(codes, scales))
    assert found.dtype == np.float32
    values, block = fmt.values(), fmt.block or fmt.k_multiple
    for row in range(3):
        for column in range(fmt.k_multiple):
            expected = np.float32(values[codes[row, column]]) * np.float32(scales[row, column // block])
            assert found[row, column] == expected


@every_format
def test_values_are_those_of_the_table(fmt):
    values = fmt.values()
    assert values.dtype == np.float32
    assert len(values) == 1 << fmt.bits
    assert values[fmt.zero] == 0
    if fmt.codec != "nf4_block":
        np.testing.assert_array_equal(values, np.arange(1 << fmt.bits) - fmt.zero)


@every_format
def test_every_code_is_the_nearest_for_its_scale(fmt):
    n, k = 24, 2 * max(fmt.k_multiple, 128)
    w_nk = normal(n, k)
    packed = fmt.quantize(w_nk)
    scale = np.repeat(fmt.unpack(packed)[1].astype(np.float64), k // fmt.blocks(k), axis=1)
    values = fmt.values()[1 if fmt.bits == 8 else 0 :]  # code 0 of 8 bits, -128, is not used
    least = np.abs(w_nk[..., None] - values * scale[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(w_nk - fmt.dequantize(packed)), least, atol=1e-6)


@every_format
def test_the_error_is_that_of_the_grid(fmt):
    """Evenly spread values err by step / sqrt(12), over the table's gaps; few values to a block are fitted better."""
    w_nk = np.random.default_rng(0).uniform(-1, 1, (64, 2 * max(fmt.k_multiple, 128))).astype(np.float32)
    gaps = np.diff(fmt.values()[1 if fmt.bits == 8 else 0 :]) / np.abs(fmt.values()[1:]).max()
    expected = np.sqrt((gaps**3).sum() / 12 / gaps.sum())
    found = np.sqrt(np.mean(np.square(w_nk - fmt.dequantize(fmt.quantize(w_nk)))))
    assert 0.75 * expected < found < 1.06 * expected


@pytest.mark.parametrize("fmt", [f for f in ALL if f.codec != "nf4_block"], ids=[i for i in IDS if "nf4" not in i])
def test_the_search_never_loses_to_plain_rounding(fmt):
    n, k = 32, 2 * max(fmt.k_multiple, 128)
    w_nk = normal(n, k) ** 3  # long tails, where it matters
    blocks = w_nk.reshape(n * fmt.blocks(k), -1)
    low, high = (-8, 7) if fmt.bits == 4 else (-127, 127)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = (extreme / low).astype(fmt.scale_dtype).astype(np.float32)
    plain = np.clip(np.rint(blocks / scale), low, high) * scale
    found = fmt.dequantize(fmt.quantize(w_nk)).reshape(blocks.shape)
    plain_error, error = (np.square(blocks - x).sum(1) for x in (plain, found))
    assert (error <= plain_error * 1.0001).all()
    assert error.sum() < plain_error.sum()


@every_format
def test_weights_on_their_own_grid_stay_bit_for_bit(fmt):
    first = fmt.quantize(normal(20, 2 * fmt.k_multiple))
    again = fmt.quantize(fmt.dequantize(first), known_nb=fmt.unpack(first)[1])
    np.testing.assert_array_equal(again.w, first.w)
    np.testing.assert_array_equal(again.scale, first.scale)


@every_format
def test_an_all_zero_block_is_exactly_zero(fmt):
    w_nk = normal(16, 2 * fmt.k_multiple)
    w_nk[3] = 0
    w_nk[4, : fmt.k_multiple] = 0
    found = fmt.dequantize(fmt.quantize(w_nk))
    assert not found[3].any()
    assert not (fmt.block and found[4, : fmt.block].any())


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e-12])
@every_format
def test_tiny_values_stay_tiny_and_finite(fmt, size):
    w_nk = normal(16, fmt.k_multiple) * np.float32(size)
    found = fmt.dequantize(fmt.quantize(w_nk))
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1.2 * np.abs(w_nk).max() + 1e-44


@every_format
def test_huge_values_fit_or_are_refused(fmt):
    w_nk = normal(16, fmt.k_multiple) * np.float32(3e37)
    if fmt.scale_dtype == "float16":
        with pytest.raises(ModelError, match="too large for its float16 scales"):
            fmt.quantize(w_nk)
        return
    found = fmt.dequantize(fmt.quantize(w_nk)).astype(np.float64)
    assert np.linalg.norm(found - w_nk) < 0.15 * np.linalg.norm(w_nk.astype(np.float64))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_format
def test_values_that_are_no_numbers_are_refused(fmt, bad):
    w_nk = normal(16, fmt.k_multiple)
    w_nk[5, 7] = bad
    with pytest.raises(ModelError, match="NaN or infinite"):
        fmt.quantize(w_nk)


@pytest.mark.parametrize(("n", "offset"), [(16, 1), (16, -1), (0, 0)])
@every_format
def test_a_shape_that_does_not_fit_is_refused_with_the_reason(fmt, n, offset):
    k = 3 * fmt.k_multiple + offset
    assert fmt.check_shape(16, 3 * fmt.k_multiple) is None
    reason = fmt.check_shape(n, k)
    assert reason == (f"K={k} is no multiple of {fmt.k_multiple}" if n else f"it is empty (0 x {k})")
    with pytest.raises(ModelError, match="does not fit"):
        fmt.quantize(np.ones((n, k), np.float32))


def test_every_embedding_format_has_one_of_its_width_for_a_tied_head():
    assert TIED_FORMATS.keys() == EMBEDDING_FORMATS.keys()
    for embedding, tied in TIED_FORMATS.items():
        assert FORMATS[tied].bits == EMBEDDING_FORMATS[embedding].bits


def test_k_of_8_bit_linears_is_a_multiple_of_their_activation_blocks():
    assert FORMATS["i8c"].check_shape(16, 96) == "K=96 is no multiple of 64"


@every_format
def test_input_of_another_type_or_order_is_taken(fmt):
    w_nk = normal(16, fmt.k_multiple)
    plain = fmt.quantize(w_nk)
    for other in (w_nk.astype(np.float64), np.asfortranarray(w_nk)):
        np.testing.assert_array_equal(fmt.quantize(other).w, plain.w)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("fmt", TILED, ids=[fmt.tag for fmt in TILED])
def test_every_solver_gives_every_format(fmt, solver):
    w_nk = normal(20, fmt.k_multiple)
    packed = SOLVERS[solver].round(fmt, w_nk)
    assert isinstance(packed, Packed)
    assert packed[:3] == (fmt.tag, 20, fmt.k_multiple)


def test_the_tables_load_no_array_library():
    code = "import sys; import edgepeft.quant.formats, edgepeft.quant.solvers, edgepeft.backbone.families"
    code += "; print([m for m in ('numpy', 'torch', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
