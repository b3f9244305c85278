import jax
import numpy as np
import packing_oracle
import pytest

from bitjax.packing import FORMAT_VERSION, PackedTernary, pack, packed_shape, unpack, validate


def test_golden_bytes():
    # The same bytes stand in tests/ffi/kernel_test.cc. Row r, column c holds ((r + c) mod 3) - 1,
    # so code (r + c) mod 3.
    w = np.fromfunction(lambda r, c: (r + c) % 3 - 1, (16, 16)).astype(np.int8)
    packed = pack(w, 0.5)
    # Byte 0 is row 0, j = 0: columns 0, 4, 8, 12 with codes 0, 1, 2, 0 -> 0 + 1*4 + 2*16 + 0*64.
    # Byte 1: columns 1, 5, 9, 13, codes 1, 2, 0, 1 -> 1 + 2*4 + 0 + 1*64; byte 2 by the same rule.
    first_row = [36, 73, 146, 36]
    second_row = [73, 146, 36, 73]
    assert packed.codes.shape == (1, 1, 64)
    assert packed.codes[0, 0, :8].tolist() == first_row + second_row
    assert packed.codes[0, 0, 60:].tolist() == first_row  # row 15 is row 0 shifted by 15 = 0 mod 3
    assert FORMAT_VERSION == 1


def test_padding_is_weight_zero():
    packed = pack(np.array([[-1]]), 1.0)
    codes = np.asarray(packed.codes)
    assert codes[0, 0, 0] == 0b01010100  # column 0 has code 0, columns 4, 8 and 12 are padding
    assert (codes[0, 0, 1:] == 0b01010101).all()


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("cols", [1, 15, 16, 17, 33, 64])
def test_round_trip_and_the_slow_packer(rows, cols):
    w = np.random.default_rng(rows * 100 + cols).integers(-1, 2, (rows, cols))
    packed = pack(w, 0.25)
    assert packed.shape == (rows, cols)
    assert packed.codes.shape == packed_shape(rows, cols)
    np.testing.assert_array_equal(np.asarray(packed.codes), packing_oracle.pack(w))
    np.testing.assert_array_equal(np.asarray(unpack(packed)), w)
    np.testing.assert_array_equal(np.asarray(jax.jit(unpack)(packed)), w)


def test_is_a_pytree_with_static_shape():
    packed = pack(np.eye(5, 7, dtype=int), 2.0)
    leaves, structure = jax.tree.flatten(packed)
    assert len(leaves) == 2
    again = jax.tree.unflatten(structure, leaves)
    assert (again.shape, again.version) == ((5, 7), 1)


@pytest.mark.parametrize(
    ("codes", "scale", "message"),
    [
        (np.full((2, 2), 2), 1.0, "must be -1, 0 or 1"),
        (np.full((2, 2), 0.5), 1.0, "must be -1, 0 or 1"),
        (np.full((2, 2), np.nan), 1.0, "must be -1, 0 or 1"),
        (np.zeros(3), 1.0, r"non-empty matrix; got shape \(3,\)"),
        (np.zeros((0, 3)), 1.0, "non-empty matrix"),
        (np.zeros((2, 2)), np.inf, "scale must be finite"),
    ],
)
def test_pack_refuses(codes, scale, message):
    with pytest.raises(ValueError, match=message):
        pack(codes, scale)


def _replaced(**changes):
    packed = pack(np.zeros((20, 20)), 1.0)
    fields = {"codes": np.array(packed.codes), "scale": np.array(packed.scale), "rows": 20,
              "cols": 20, "version": 1}  # fmt: skip
    return PackedTernary(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "w: packed format version 2; this build reads 1"),
        ({"rows": 33}, r"uint8\[2, 2, 64\]; a 33 x 20 matrix needs uint8\[3, 2, 64\]"),
        ({"codes": np.zeros((2, 2, 64), np.int8)}, r"codes are int8\[2, 2, 64\]"),
        ({"codes": np.full((2, 2, 64), 0b11, np.uint8)}, "holds the code 3"),
        ({"codes": np.full((2, 2, 64), 0b11000000, np.uint8)}, "holds the code 3"),
        ({"scale": np.float32("nan")}, "is not finite"),
        ({"scale": np.ones(2, np.float32)}, r"must be one float32; got float32\[2\]"),
        ({"scale": np.float64(1)}, "must be one float32; got float64"),
    ],
)
def test_validate_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        validate("w", _replaced(**changes))


def test_validate_accepts_what_pack_makes():
    for seed in range(3):
        w = np.random.default_rng(seed).integers(-1, 2, (17, 31))
        validate("w", pack(w, 0.1))
