"""Block types of GGUF: bytes worked out by hand, and the `gguf` package bit for bit."""

import numpy as np
import pytest

from bitjax.interop.gguf import blocks
from bitjax.interop.gguf.blocks import BY_NAME, I2S_GROUPS, TYPES

HALF = bytes.fromhex("0038")  # 0.5 in float16
rng = np.random.default_rng(0)


def row(**values):
    """256 zeros but for `at<i>=value`."""
    codes = np.zeros((1, 256), np.int8)
    for name, value in values.items():
        codes[0, int(name.removeprefix("at"))] = value
    return codes


# Each byte of zeros holds 1, 1, 1, 1: 0b01010101.
TQ2_CODES = row(at0=1, at64=-1, at96=1, at133=-1, at165=-1, at197=1)
TQ2_BYTES = (
    bytes([2 | 1 << 2 | 0 << 4 | 2 << 6]) + b"\x55" * 31  # values 0, 32, 64, 96: +1, 0, -1, +1
    + b"\x55" * 5 + bytes([0 | 0 << 2 | 2 << 4 | 1 << 6]) + b"\x55" * 26  # -1, -1, +1, 0
    + HALF
)  # fmt: skip

# Each byte of five zeros holds 81 + 27 + 9 + 3 + 1 = 121: ceil(121 * 256 / 243) = 0x80; the four
# values of the last bytes 120: 0x7f.
TQ1_CODES = row(
    at0=1, at64=-1, at96=1, at128=-1,  # 2 1 0 2 0: 162 + 27 + 6 = 195: ceil(205.4) = 0xce
    at161=-1, at177=-1, at193=-1, at209=-1, at225=1,  # 0 0 0 0 2: ceil(2.1) = 3
    at243=1, at247=1, at255=-1,  # 2 2 1 0: 162 + 54 + 9 = 225: ceil(237.04) = 0xee
)  # fmt: skip
TQ1_BYTES = (
    b"\xce" + b"\x80" * 31 + b"\x80\x03" + b"\x80" * 14 + b"\x7f" * 3 + b"\xee" + HALF
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "codes", "raw"),
    [("TQ2_0", TQ2_CODES, TQ2_BYTES), ("TQ1_0", TQ1_CODES, TQ1_BYTES)],
)
def test_golden_bytes_of_blocks(name, codes, raw):
    kind = BY_NAME[name]
    assert len(raw) == kind.bytes
    scales = np.full((1, 1), 0.5, np.float16)
    assert blocks.encode_blockwise(kind, codes, scales).tobytes() == raw
    decoded, found = blocks.decode_blockwise(kind, np.frombuffer(raw, np.uint8), codes.shape)
    np.testing.assert_array_equal(decoded, codes)
    assert found.tolist() == [[0.5]]


# Values of one byte: +1, 0, -1, +1: 2 << 6 | 1 << 4 | 0 << 2 | 2 = 0x92.
@pytest.mark.parametrize(
    ("group", "shape", "places", "codes"),
    [
        (128, (1, 256), {0: 0x92, 32 + 5: 0x15}, {0: 1, 64: -1, 96: 1, 128 + 5: -1}),
        (64, (1, 128), {0: 0x92, 16 + 5: 0x15}, {0: 1, 32: -1, 48: 1, 64 + 5: -1}),
        (4, (4, 3), {0: 0x92, 2: 0x15}, {0: 1, 6: -1, 9: 1, 2: -1}),
    ],
)
def test_golden_bytes_of_i2s(group, shape, places, codes):
    size = shape[0] * shape[1]
    expected = np.zeros(size, np.int8)
    for place, code in codes.items():
        expected[place] = code
    raw = bytearray(b"\x55" * (size // 4) + bytes.fromhex("0000003f") + bytes(28))  # 0.5
    for place, byte in places.items():
        raw[place] = byte
    assert len(raw) == blocks.nbytes(BY_NAME["I2_S"], shape)
    assert blocks.encode_i2s(expected.reshape(shape), 0.5, group).tobytes() == bytes(raw)
    decoded, scale = blocks.decode_i2s(np.frombuffer(bytes(raw), np.uint8), shape, group)
    np.testing.assert_array_equal(decoded.reshape(-1), expected)
    assert scale == 0.5


@pytest.mark.parametrize("group", I2S_GROUPS)
def test_i2s_round_trip_in_parts(group, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", 600)  # decoded in many parts, of which the last is shorter
    codes = rng.integers(-1, 2, (20, 384), np.int8)
    decoded, scale = blocks.decode_i2s(blocks.encode_i2s(codes, 0.25, group), codes.shape, group)
    np.testing.assert_array_equal(decoded, codes)
    assert scale == 0.25


def test_sizes_of_types():
    constants = pytest.importorskip("gguf.constants", reason="package gguf is not installed")
    known = {kind.value: size for kind, size in constants.GGML_QUANT_SIZES.items()}
    for number, kind in TYPES.items():
        if kind.name != "I2_S":  # of bitnet.cpp
            assert known[number] == (kind.values, kind.bytes)
            assert constants.GGMLQuantizationType(number).name == kind.name


@pytest.mark.parametrize("name", blocks.BLOCKWISE)
def test_ternary_blocks_equal_the_package(name, monkeypatch):
    quants = pytest.importorskip("gguf.quants", reason="package gguf is not installed")
    monkeypatch.setattr(blocks, "CHUNK", 1024)
    kind, number = BY_NAME[name], quants.GGMLQuantizationType[name]
    codes = rng.integers(-1, 2, (7, 768), np.int8)
    scales = rng.uniform(0.01, 1, (7, 3)).astype(np.float16)
    values = codes * np.repeat(scales.astype(np.float32), 256, axis=1)
    ours = blocks.encode_blockwise(kind, codes, scales)
    np.testing.assert_array_equal(ours.reshape(7, -1), quants.quantize(values, number))
    # Any bytes: those that no encoder writes too.
    raw = rng.integers(0, 256, (7, 3, kind.bytes), np.uint8)
    raw[..., -1] &= 0x3F  # finite scales
    decoded, found = blocks.decode_blockwise(kind, raw.reshape(-1), (7, 768))
    theirs = quants.dequantize(raw.reshape(7, -1), number)
    np.testing.assert_array_equal(decoded * np.repeat(found, 256, axis=1), theirs)


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"I2_S"}))
def test_floats_equal_the_package(name, monkeypatch):
    quants = pytest.importorskip("gguf.quants", reason="package gguf is not installed")
    monkeypatch.setattr(blocks, "CHUNK", 1024)
    kind = BY_NAME[name]
    shape = (6, 512)
    raw = rng.integers(0, 256, blocks.nbytes(kind, shape), np.uint8)
    ours = blocks.decode_float(kind, raw, shape)
    with np.errstate(all="ignore"):
        theirs = quants.dequantize(raw.reshape(6, -1), quants.GGMLQuantizationType[name])
        np.testing.assert_array_equal(ours.astype(np.float32), theirs.reshape(shape))
    in_place = name in blocks.FLOATS
    assert np.shares_memory(ours, raw) == in_place
