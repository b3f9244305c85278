"""How tensors are stored in GGUF files: the block types, and ternary codes in three of them.

A tensor is a sequence of blocks of `values` consecutive values along its rows, `bytes` bytes each.
Value = code * scale in the ternary types, and codes are stored as q = code + 1:

    TQ2_0   256 values in 66 bytes: 64 bytes, then the scale, float16. Byte p of half h holds the
            values 128h + p, + 32, + 64, + 96 in bits 0, 2, 4, 6.
    TQ1_0   256 values in 54 bytes: 52 bytes of up to five q each, then the scale, float16. Byte
            j < 32 holds the values j, j + 32, ... j + 128; byte 32 + j, j < 16, the values
            160 + j, + 16, ... + 64; byte 48 + j, j < 4, the values 240 + j, + 4, + 8, + 12. A byte
            is ceil(256 v / 243), v = 81 q0 + 27 q1 + 9 q2 + 3 q3 + q4, so that the leading digit is
            (3 byte) >> 8 and the others follow from (3 byte) & 255.
    I2_S    of bitnet.cpp, the whole matrix one block: n / 4 bytes, the scale, float32, 28 bytes
            nothing. Of `group` values, byte p holds the values p, p + group / 4, ... in bits 6, 4,
            2, 0. Builds for x86 have groups of 128, builds for Arm groups of 64; files do not say
            which. (A third form, four rows to a byte, is that of x86 builds without ACT_PARALLEL.)

Sources: ggml's ggml-quants.c (quantize_row_tq1_0_ref, _tq2_0_ref); bitnet.cpp's
src/ggml-bitnet-mad.cpp (quantize_i2_s). Other types are decoded by the `gguf` package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

CHUNK = 2**22  # values decoded at once: temporary arrays stay in a few tens of MB
I2S_TAIL = 32  # bytes after the codes
I2S_ROWS = 4  # as a group: four rows to a byte
I2S_GROUPS = (128, 64, I2S_ROWS)


class TensorType(NamedTuple):
    """A ggml type.

    Attributes:
        number, name: of it, in ggml.
        values: in a block.
        bytes: of a block.
    """

    number: int
    name: str
    values: int
    bytes: int


# I2_S: bytes for the codes of 4 values; the tail is added by `nbytes`.
TYPES = {
    kind.number: kind
    for kind in (
        TensorType(0, "F32", 1, 4), TensorType(1, "F16", 1, 2), TensorType(30, "BF16", 1, 2),
        TensorType(2, "Q4_0", 32, 18), TensorType(3, "Q4_1", 32, 20),
        TensorType(6, "Q5_0", 32, 22), TensorType(7, "Q5_1", 32, 24),
        TensorType(8, "Q8_0", 32, 34), TensorType(10, "Q2_K", 256, 84),
        TensorType(11, "Q3_K", 256, 110), TensorType(12, "Q4_K", 256, 144),
        TensorType(13, "Q5_K", 256, 176), TensorType(14, "Q6_K", 256, 210),
        TensorType(34, "TQ1_0", 256, 54), TensorType(35, "TQ2_0", 256, 66),
        TensorType(36, "I2_S", 4, 1),
    )
}  # fmt: skip
BY_NAME = {kind.name: kind for kind in TYPES.values()}
FLOATS = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
BLOCKWISE = ("TQ1_0", "TQ2_0")  # ternary, with a scale in every block
TERNARY = (*BLOCKWISE, "I2_S")


def nbytes(kind: TensorType, shape: tuple[int, ...]) -> int:
    """Size of a tensor in a file."""
    tail = I2S_TAIL if kind.name == "I2_S" else 0
    return math.prod(shape) // kind.values * kind.bytes + tail


def decode_float(kind: TensorType, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of any type but I2_S: float32, or float16 or bfloat16 in place where stored so.

    Args:
        kind: its type.
        raw: its bytes, uint8.
        shape: its shape, slowest dimension first.
    """
    if kind.name in FLOATS:
        return raw.view(FLOATS[kind.name]).reshape(shape)
    import gguf.quants  # imports much else

    rows = raw.reshape(*shape[:-1], -1)
    out = np.empty(shape, np.float32)
    with np.errstate(all="ignore"):  # scales may be anything
        for part in _row_parts(rows, shape[-1]):
            out[part] = gguf.quants.dequantize(rows[part], gguf.GGMLQuantizationType(kind.number))
    return out


def decode_blockwise(
    kind: TensorType, raw: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and block scales of a matrix in TQ1_0 or TQ2_0.

    Returns:
        int8 `[rows, cols]`, of which TQ2_0 can hold +2 too, which is not ternary, and float32
        `[rows, cols / 256]`.
    """
    rows, cols = shape
    blocks = raw.reshape(rows, cols // kind.values, kind.bytes)
    codes = np.empty((rows, cols // kind.values, kind.values), np.int8)
    decode = _decode_tq1 if kind.name == "TQ1_0" else _decode_tq2
    for part in _row_parts(blocks, cols):
        decode(blocks[part][..., :-2], codes[part])
    return codes.reshape(shape), block_scales(kind, raw, shape)


def block_scales(kind: TensorType, raw: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The scales alone, as in `decode_blockwise`."""
    blocks = raw.reshape(shape[0], shape[1] // kind.values, kind.bytes)
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(blocks[..., -2:]).view("<f2")[..., 0].astype(np.float32)


def encode_blockwise(kind: TensorType, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The inverse of `decode_blockwise`: uint8 `[rows, blocks, bytes]`.

    Args:
        kind: TQ1_0 or TQ2_0.
        codes: int8 `[rows, cols]`.
        scales: float16 `[rows, blocks]`.
    """
    rows, cols = codes.shape
    q = (codes.reshape(rows, cols // kind.values, kind.values) + 1).astype(np.uint8)
    encode = _encode_tq1 if kind.name == "TQ1_0" else _encode_tq2
    scale = np.ascontiguousarray(scales, "<f2")[..., None].view(np.uint8)
    return np.concatenate([encode(q), scale], axis=-1)


def decode_i2s(
    raw: np.ndarray, shape: tuple[int, int], group: int
) -> tuple[np.ndarray, np.float32]:
    """Codes and scale of a matrix in I2_S; codes may be +2, which is not ternary.

    Args:
        raw: its bytes.
        shape: its shape; a multiple of `group` values, or of four rows.
        group: see `I2S_GROUPS`.
    """
    count = math.prod(shape)
    scale = raw[count // 4 : count // 4 + 4].view("<f4")[0]
    codes = np.empty(count, np.int8)
    width = shape[1] if group == I2S_ROWS else group // 4
    planes, q = codes.reshape(-1, 4, width), raw[: count // 4].reshape(-1, width)
    for part in _row_parts(q, 4 * width):
        for plane, shift in enumerate((6, 4, 2, 0)):
            planes[part, plane] = ((q[part] >> shift) & 3).astype(np.int8) - 1
    return codes.reshape(shape), scale


def encode_i2s(codes: np.ndarray, scale: float, group: int = 128) -> np.ndarray:
    """The inverse of `decode_i2s`: uint8 `[n / 4 + 32]`."""
    width = codes.shape[1] if group == I2S_ROWS else group // 4
    q = (codes.reshape(-1, 4, width) + 1).astype(np.uint8)
    packed = q[:, 0] << 6 | q[:, 1] << 4 | q[:, 2] << 2 | q[:, 3]
    tail = np.zeros(I2S_TAIL // 4, "<f4")
    tail[0] = scale
    return np.concatenate([packed.reshape(-1), tail.view(np.uint8)])


def _row_parts(array: np.ndarray, cols: int) -> Iterator[slice]:
    """Slices of the first axis, of about `CHUNK` values each."""
    step = max(1, CHUNK // cols)
    for start in range(0, len(array), step):
        yield slice(start, start + step)


def _decode_tq2(q: np.ndarray, codes: np.ndarray) -> None:
    planes = codes.reshape(*codes.shape[:2], 2, 4, 32)
    for plane in range(4):
        planes[..., plane, :] = (q.reshape(*q.shape[:2], 2, 32) >> (2 * plane)) & 3
    codes -= 1


def _encode_tq2(q: np.ndarray) -> np.ndarray:
    planes = q.reshape(*q.shape[:2], 2, 4, 32)
    packed = planes[..., 0, :] | planes[..., 1, :] << 2 | planes[..., 2, :] << 4
    return (packed | planes[..., 3, :] << 6).reshape(*q.shape[:2], 64)


# Bytes, digits of each, and where their values start, for the three parts of a TQ1_0 block.
TQ1_PARTS = ((slice(0, 32), 5, 0), (slice(32, 48), 5, 160), (slice(48, 52), 4, 240))


def _decode_tq1(q: np.ndarray, codes: np.ndarray) -> None:
    for part, digits, first in TQ1_PARTS:
        rest = np.ascontiguousarray(q[..., part])
        width = rest.shape[-1]
        for digit in range(digits):
            start = first + digit * width
            tripled = rest.astype(np.uint16) * 3
            codes[..., start : start + width] = tripled >> 8
            rest = tripled.astype(np.uint8)
    codes -= 1


def _encode_tq1(q: np.ndarray) -> np.ndarray:
    packed = np.empty((*q.shape[:2], 52), np.uint8)
    for part, digits, first in TQ1_PARTS:
        width = part.stop - part.start
        value = np.zeros((*q.shape[:2], width), np.uint16)
        for digit in range(5):
            value *= 3
            if digit < digits:
                start = first + digit * width
                value += q[..., start : start + width]
        packed[..., part] = (value * np.uint16(256) + np.uint16(242)) // np.uint16(243)
    return packed
