"""Codes in bytes, on golden bytes; exactly ternary floats."""

import ml_dtypes
import numpy as np
import pytest

from bitjax.interop.huggingface.codes import exact_ternary, pack_codes, packed_shape, unpack_codes


def test_golden_bytes():
    """Rows 0..4 in steps of two: byte 0 holds rows 0, 2, 4 and none; byte 1 rows 1 and 3."""
    codes = np.array([[-1], [0], [1], [1], [0]], np.int8)
    assert pack_codes(codes).tolist() == [[0 + 2 * 4 + 1 * 16], [1 + 2 * 4]]
    four = np.array([[1, 0], [0, -1], [-1, 0], [1, 1]], np.int8)
    assert pack_codes(four).tolist() == [[2 + 4 + 0 + 128, 1 + 0 + 16 + 128]]


@pytest.mark.parametrize("rows", range(1, 13))
def test_round_trip(rows):
    codes = np.random.default_rng(rows).integers(-1, 2, (rows, 5)).astype(np.int8)
    packed = pack_codes(codes)
    assert packed.shape == packed_shape(rows, 5)
    np.testing.assert_array_equal(unpack_codes(packed, rows), codes)


def test_the_code_three():
    packed = pack_codes(np.zeros((8, 3), np.int8))
    packed[1, 2] |= 3 << 4  # the third of rows 1, 3, 5, 7
    with pytest.raises(ValueError, match="holds the code 3 at row 5, column 2"):
        unpack_codes(packed, 8)
    beyond = pack_codes(np.zeros((5, 3), np.int8))
    beyond[1] |= 3 << 6  # of no row
    np.testing.assert_array_equal(unpack_codes(beyond, 5), 0)


def signs(*shape):
    return np.random.default_rng(0).integers(-1, 2, shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_exactly_ternary(dtype):
    codes = signs(2000, 6)  # more rows than are looked at together
    one = exact_ternary((codes * 0.25).astype(dtype))
    np.testing.assert_array_equal(one.codes, codes)
    assert (one.rows.shape, float(one.rows), one.cols) == ((), 0.25, None)
    scales = np.repeat(np.float32([0.5, 3, 0.125, 7]), 500)
    rows = exact_ternary((codes * scales[:, None]).astype(dtype))
    np.testing.assert_array_equal(rows.codes, codes)
    np.testing.assert_array_equal(rows.rows, scales)
    of_cols = np.float32([0.5, 0.5, 3, 3, 0.125, 0.125])
    cols = exact_ternary((codes * of_cols).astype(dtype))
    np.testing.assert_array_equal(cols.codes, codes)
    np.testing.assert_array_equal(cols.cols, of_cols)
    assert float(cols.rows) == 1


def test_rows_without_a_weight():
    codes = signs(6, 5)
    codes[[0, 3]] = 0
    found = exact_ternary(codes * np.float32([9, 2, 2, 9, 4, 4])[:, None])
    assert found.rows.tolist() == [2, 2, 2, 2, 4, 4]
    assert exact_ternary(np.zeros((3, 4), np.float32)).rows.tolist() == 1
    cols = signs(6, 4)
    cols[:, 2] = 0
    assert exact_ternary(cols * np.float32([1, 2, 3, 4])).cols.tolist() == [1, 2, 0, 4]


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_not_ternary(value):
    codes = signs(5, 4)
    codes[3, 1] = value
    assert exact_ternary(codes) is None
