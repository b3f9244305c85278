import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import packing_oracle
import pytest

from bitjax.packing import (
    FORMAT_VERSION,
    LAYOUTS,
    PackedWeights,
    multiplier_shape,
    pack,
    packed_rows,
    packed_shape,
    unpack,
    unpack_ternary,
    validate,
)

# The same bytes stand in tests/ffi/kernel_test.cc: rows 0, 1, 2 and 15 of a block.
GOLDEN = {
    # Codes (r + c) mod 3. Byte 0 is row 0, j = 0: columns 0, 4, 8, 12 with codes 0, 1, 2, 0 ->
    # 0 + 1*4 + 2*16 + 0*64. Byte 1: columns 1, 5, 9, 13, codes 1, 2, 0, 1 -> 1 + 2*4 + 0 + 1*64.
    "ternary2": (
        lambda r, c: (r + c) % 3 - 1,
        [[36, 73, 146, 36], [73, 146, 36, 73], [146, 36, 73, 146], [36, 73, 146, 36]],
    ),
    # The same codes. Byte 0: columns 0, 4, 8, 12, 16, codes 0, 1, 2, 0, 1 -> 1*3 + 2*9 + 1*81.
    "ternary1.6": (
        lambda r, c: (r + c) % 3 - 1,
        [[102, 196, 65, 102], [196, 65, 102, 196], [65, 102, 196, 65], [102, 196, 65, 102]],
    ),
    # Codes (3r + 5c) mod 16. Byte 0: columns 0 and 4, codes 0 and 4 -> 0 + 4*16.
    "int4": (
        lambda r, c: (3 * r + 5 * c) % 16 - 8,
        [[64, 149, 234, 63], [115, 200, 29, 98], [166, 251, 64, 149], [29, 98, 183, 12]],
    ),
    # Codes 1 + (16r + 5c) mod 255.
    "int8": (
        lambda r, c: (16 * r + 5 * c) % 255 - 127,
        [[1, 6, 11, 16], [17, 22, 27, 32], [33, 38, 43, 48], [241, 246, 251, 1]],
    ),
}


def make(layout, rows, cols, seed=0, scale=0.25):
    """(weights, multipliers, packed)."""
    w, m = packing_oracle.random_weights(np.random.default_rng(seed), layout, rows, cols)
    return w, m, pack(w, scale, layout, m)


def test_version():
    assert FORMAT_VERSION == 2
    assert tuple(LAYOUTS) == packing_oracle.LAYOUTS
    assert [about.number for about in LAYOUTS.values()] == [0, 1, 2, 3]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_bytes(layout):
    weight, rows = GOLDEN[layout]
    cols = {"ternary2": 16, "ternary1.6": 20, "int4": 64, "int8": 4}[layout]
    w = np.fromfunction(weight, (16, cols), dtype=int)
    m = None
    if layout == "int4":
        m = np.fromfunction(lambda r, g: 1 + (r + 7 * g) % 15, (16, 2), dtype=int)
    packed = pack(w, 0.5, layout, m)
    first = np.asarray(packed.codes)[0, 0]
    assert first[:12].tolist() == rows[0] + rows[1] + rows[2]
    assert first[60:].tolist() == rows[3]
    if layout == "int4":
        assert packed.codes.shape == (1, 8, 64)
        # Columns 8..15 follow in the next block, 8 codes on.
        assert packed.codes[0, 1, :4].tolist() == [200, 29, 98, 183]
        assert packed.multipliers.tolist() == [
            [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 1],
             [8, 9, 10, 11, 12, 13, 14, 15, 1, 2, 3, 4, 5, 6, 7, 8]]
        ]  # fmt: skip
    else:
        assert packed.codes.shape == (1, 1, 64)
        assert packed.multipliers is None


@pytest.mark.parametrize(
    ("layout", "first", "padding", "shape"),
    [
        ("ternary2", 0b01010100, 0b01010101, (1, 1, 64)),
        ("ternary1.6", 0 + 3 + 9 + 27 + 81, 1 + 3 + 9 + 27 + 81, (1, 1, 64)),
        ("int4", 0x87, 0x88, (1, 4, 64)),  # a whole group
        ("int8", 127, 128, (1, 1, 64)),
    ],
)
def test_padding_is_weight_zero(layout, first, padding, shape):
    m = np.array([[9]]) if layout == "int4" else None
    packed = pack(np.array([[-1]]), 1.0, layout, m)
    codes = np.asarray(packed.codes)
    assert codes.shape == shape
    assert codes.flat[0] == first  # column 0; the byte's other columns are padding
    assert (codes.flat[1:] == padding).all()
    if layout == "int4":
        assert packed.multipliers.tolist() == [[[9] + [1] * 15]]


# Rows and columns at a block's edge, one short of it, and one beyond; 32 columns are a group.
SHAPES = [(1, 1), (15, 3), (16, 4), (17, 5), (1, 15), (15, 16), (16, 17), (17, 19), (32, 20)]
SHAPES += [(33, 21), (1, 31), (16, 32), (15, 33), (40, 64), (17, 100)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_round_trip_and_the_slow_packer(layout, rows, cols):
    w, m, packed = make(layout, rows, cols, rows * 100 + cols)
    assert packed.shape == (rows, cols)
    assert packed.codes.shape == packed_shape(layout, rows, cols)
    np.testing.assert_array_equal(packed.codes, packing_oracle.pack(layout, w))
    if m is not None:
        assert packed.multipliers.shape == multiplier_shape(rows, cols)
        np.testing.assert_array_equal(packed.multipliers, packing_oracle.pack_multipliers(m))
    wanted = packing_oracle.multiplied(w, m)
    got = jax.jit(unpack)(packed)
    if layout.startswith("ternary"):
        unpacked = unpack_ternary(np.asarray(packed.codes), rows, cols, layout)
        assert unpacked.dtype == np.int8
        np.testing.assert_array_equal(unpacked, got)
    assert got.dtype == np.int8
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_survives(layout):
    low, high = packing_oracle.RANGE[layout]
    w = np.resize(np.arange(low, high + 1), (17, 96))
    for multiplier in (1, 15) if layout == "int4" else (None,):
        m = None if multiplier is None else np.full((17, 3), multiplier)
        unpacked = jax.jit(unpack)(pack(w, 1.0, layout, m))
        np.testing.assert_array_equal(unpacked, w * (multiplier or 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_row", [False, True])
def test_rows_of_a_table(layout, per_row):
    scale = np.float32(0.25) * np.arange(1, 38, dtype=np.float32) if per_row else 0.25
    w, m, packed = make(layout, 37, 45, scale=scale)
    table = packing_oracle.multiplied(w, m) * np.reshape(scale, (-1, 1)).astype(np.float32)
    for rows in ([0, 36, 15, 16, 0], [[31, 32], [1, 2]], 17):
        got = jax.jit(packed_rows)(packed, jnp.array(rows))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, table[np.array(rows)])  # |w m| * 37 has few bits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64, np.float32, np.float64])
def test_any_numeric_dtype(layout, dtype):
    w, m, packed = make(layout, 5, 40)
    again = pack(w.astype(dtype), 0.25, layout, m)
    np.testing.assert_array_equal(again.codes, packed.codes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_scale_or_one_a_row(layout):
    assert make(layout, 5, 7, scale=2.5)[2].scale.shape == ()
    scales = np.arange(1, 6) / 4
    packed = make(layout, 5, 7, scale=scales)[2]
    assert packed.scale.dtype == np.float32
    np.testing.assert_array_equal(packed.scale, scales)


def test_is_a_pytree_with_static_shape():
    leaves, structure = jax.tree.flatten(make("ternary1.6", 5, 7)[2])
    assert len(leaves) == 2
    again = jax.tree.unflatten(structure, leaves)
    assert (again.shape, again.layout) == ((5, 7), "ternary1.6")
    assert len(jax.tree.leaves(make("int4", 5, 7)[2])) == 3


def test_nbytes():
    assert make("ternary2", 16, 160)[2].nbytes == 16 * 160 // 4 + 4
    assert make("ternary1.6", 16, 160)[2].nbytes == 16 * 160 // 5 + 4
    assert make("int8", 16, 160, scale=np.ones(16))[2].nbytes == 16 * 160 + 4 * 16
    assert make("int4", 16, 160)[2].nbytes == 16 * 160 // 2 + 16 * 5 + 4


SOME = np.zeros((2, 2))


@pytest.mark.parametrize(
    ("w", "scale", "layout", "multipliers", "message"),
    [
        (np.full((2, 2), 2), 1.0, "ternary2", None, "ternary2 weights must be integers from -1 to"),
        (np.full((2, 2), 0.5), 1.0, "ternary2", None, "from -1 to 1"),
        (np.full((2, 2), np.nan), 1.0, "ternary2", None, "from -1 to 1"),
        (np.full((2, 2), -2), 1.0, "ternary1.6", None, "ternary1.6 weights .* from -1 to 1"),
        (np.full((2, 2), 8), 1.0, "int4", np.ones((2, 1)), "int4 weights .* from -8 to 7"),
        (np.full((2, 2), -9), 1.0, "int4", np.ones((2, 1)), "from -8 to 7"),
        (np.full((2, 2), -128), 1.0, "int8", None, "int8 weights .* from -127 to 127"),
        (np.full((2, 2), 128), 1.0, "int8", None, "from -127 to 127"),
        (np.zeros(3), 1.0, "ternary2", None, r"non-empty matrix; got shape \(3,\)"),
        (np.zeros((0, 3)), 1.0, "int8", None, "non-empty matrix"),
        (SOME, np.inf, "ternary2", None, "scale must be finite"),
        (SOME, np.array([1, np.nan]), "ternary2", None, "scale must be finite"),
        (SOME, np.ones(3), "int8", None, r"one number or 2, one a row; got \(3,\)"),
        (SOME, np.ones((2, 1)), "int8", None, r"one number or 2, one a row; got \(2, 1\)"),
        (SOME, 1.0, "int4", None, r"int4 weights need multipliers \(2, 1\); got None"),
        (SOME, 1.0, "int4", np.ones((2, 2)), r"need multipliers \(2, 1\); got \(2, 2\)"),
        (SOME, 1.0, "int4", np.full((2, 1), 16), "multipliers must be from 1 to 15"),
        (SOME, 1.0, "int4", np.array([[1], [0]]), "multipliers must be from 1 to 15"),
    ],
)
def test_pack_refuses(w, scale, layout, multipliers, message):
    with pytest.raises(ValueError, match=message):
        pack(w, scale, layout, multipliers)


def in_numpy(packed):
    return jax.tree.map(np.array, packed)


def replaced(layout, **changes):
    """A valid 20 x 20 matrix with some fields replaced."""
    packed = in_numpy(make(layout, 20, 20)[2])
    codes = changes.pop("byte", None)
    if codes is not None:  # somewhere, in the last block
        codes, packed.codes[-1, -1, 17] = packed.codes, codes
    return dataclasses.replace(packed, **changes)


WIDE = np.ones((2, 1, 16), np.uint8)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("ternary2", {"rows": 33}, r"uint8\[2, 2, 64\]; a 33 x 20 ternary2 .* uint8\[3, 2, 64\]"),
        ("ternary1.6", {"cols": 21}, r"uint8\[2, 1, 64\]; a 20 x 21 ternary1.6 .*\[2, 2, 64\]"),
        ("int4", {"cols": 33}, r"codes are uint8\[2, 4, 64\]; .* uint8\[2, 8, 64\]"),
        ("int8", {"rows": 16}, r"uint8\[2, 5, 64\]; a 16 x 20 int8 .*\[1, 5, 64\]"),
        ("ternary2", {"codes": np.zeros((2, 2, 64), np.int8)}, r"codes are int8\[2, 2, 64\]"),
        ("ternary2", {"scale": np.float32("nan")}, "the scale nan is not finite"),
        ("int8", {"scale": np.full(20, np.inf, np.float32)}, "the scale inf is not finite"),
        ("ternary2", {"scale": np.ones(2, np.float32)}, r"or 20, one a row; got float32\[2\]"),
        ("int8", {"scale": np.ones((20, 1), np.float32)}, r"got float32\[20, 1\]"),
        ("ternary2", {"scale": np.float64(1)}, "one float32 or 20, one a row; got float64"),
        ("int4", {"multipliers": None}, "int4 weights need multipliers"),
        ("int4", {"multipliers": WIDE[:1]}, r"multipliers are uint8\[1, 1, 16\]; .*\[2, 1, 16\]"),
        ("int4", {"multipliers": WIDE.astype(np.int32)}, r"multipliers are int32\[2, 1, 16\]"),
        ("int8", {"multipliers": WIDE}, "int8 weights have no multipliers"),
        ("int4", {"multipliers": WIDE * 0}, "multipliers must be from 1 to 15"),
        ("int4", {"multipliers": WIDE * 16}, "multipliers must be from 1 to 15"),
    ],
)
def test_validate_refuses(layout, changes, message):
    for codes in (True, False):
        with pytest.raises(ValueError, match="(?s)^w: .*" + message):
            validate("w", replaced(layout, **changes), codes=codes)


@pytest.mark.parametrize(
    ("layout", "byte", "message"),
    [
        *[("ternary2", 3 << (2 * s), "w: holds the code 3") for s in range(4)],
        *[("ternary1.6", byte, "w: holds a byte above 242") for byte in (243, 255)],
        ("int8", 0, "w: holds the code 0"),
    ],
)
def test_validate_refuses_invalid_codes_unless_told_not_to_look(layout, byte, message):
    spoilt = replaced(layout, byte=byte)
    with pytest.raises(ValueError, match=message):
        validate("w", spoilt)
    validate("w", spoilt, codes=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_valid_byte_is_accepted(layout):
    packed = replaced(layout)
    base, planes = packing_oracle.BASE[layout], packing_oracle.PLANES[layout]
    digits = {"ternary2": range(3), "int8": range(1, 256)}.get(layout, range(base))
    valid = np.array(
        [
            b
            for b in range(base**planes)
            if all(b // base**s % base in digits for s in range(planes))
        ]
    )
    assert len(valid) == len(digits) ** planes
    filled = np.resize(valid, packed.codes.shape).astype(np.uint8)
    validate("w", dataclasses.replace(packed, codes=filled))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validate_accepts_what_pack_makes(layout):
    for seed in range(3):
        packed = make(layout, 17, 31, seed)[2]
        validate("w", packed)
        validate("w", in_numpy(packed))
        validate("w", in_numpy(make(layout, 17, 31, seed, scale=np.ones(17))[2]), codes=False)


def test_types():
    packed = make("int4", 3, 3)[2]
    assert isinstance(packed, PackedWeights)
    assert (packed.codes.dtype, packed.multipliers.dtype) == (np.uint8, np.uint8)
    assert packed.scale.dtype == np.float32
