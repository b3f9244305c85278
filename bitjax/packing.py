"""Packed weights: the Python twin of `ffi/packed_format.h`, format version 2.

A matrix of small integers w, stored as codes `c = w + offset` in one of four layouts:

    layout      w          offset  planes  bits a weight
    ternary2    -1..1      1       4       2
    ternary1.6  -1..1      1       5       1.6
    int4        -8..7      8       2       4.25 with multipliers
    int8        -127..127  128     1       8

    dequant(w)[n, k] = w[n, k] * scale[n]                                   one scale, or one a row
    int4:            = w[n, k] * multiplier[n, k // 32] * scale[n],         multiplier in 1..15

Blocks of 16 rows x 4*planes columns take 64 bytes: uint8 `[row blocks, column blocks, 64]`. In a
block, byte `4*r + j` holds for row r and each plane s the code of column `4*s + j`: ternary2 in the
bits 2s and 2s+1, int4 in the bits 4s..4s+3, ternary1.6 as digit s of a number in base 3. Rows and
columns beyond the matrix hold weight zero; int4 has whole groups of 32 columns.

A ternary matrix may be stored by columns as well (`with_columns`): uint8 `[column tiles, columns,
64]`, where byte b of tile t holds for each plane s the code of row `(t * planes + s) * 64 + b`.

So one 64-byte vector load brings four columns of sixteen rows per plane: every 32-bit lane is a
row, and a four-byte dot product with the same four activations in every lane advances all sixteen
rows with no horizontal sum.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

FORMAT_VERSION = 2
BLOCK_ROWS = 16
LANE_BYTES = 4  # columns of one plane of a block
BLOCK_BYTES = BLOCK_ROWS * LANE_BYTES
COLUMN_BYTES = 64  # of a column in a tile
ROWS_AT_ONCE = 1024  # packed together: a few megabytes of temporary values, whatever the matrix

LayoutName = Literal["ternary2", "ternary1.6", "int4", "int8"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to store codes.

    Attributes:
        number: in the custom calls.
        base: number of values of a code; a byte holds `planes` digits in this base.
        planes: codes in a byte.
        offset: code of weight 0.
        low, high: the weights there are.
        group_blocks: blocks of columns that share a multiplier; 0 without multipliers.
    """

    number: int
    base: int
    planes: int
    offset: int
    low: int
    high: int
    group_blocks: int = 0

    @property
    def block_cols(self) -> int:
        """Columns of a block."""
        return self.planes * LANE_BYTES


LAYOUTS: dict[LayoutName, Layout] = {
    "ternary2": Layout(0, base=4, planes=4, offset=1, low=-1, high=1),
    "ternary1.6": Layout(1, base=3, planes=5, offset=1, low=-1, high=1),
    "int4": Layout(2, base=16, planes=2, offset=8, low=-8, high=7, group_blocks=4),
    "int8": Layout(3, base=256, planes=1, offset=128, low=-127, high=127),
}
GROUP = LAYOUTS["int4"].group_blocks * LAYOUTS["int4"].block_cols  # columns that share a multiplier
SCREEN_GROUP = GROUP - 1  # columns of a screened table in a group
DITHER_CODE = 7  # the largest code, so that the input it meets stays small
MAX_MULTIPLIER = 15  # so that |w * multiplier| <= 120 fits int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeights:
    """Integer weights of one matrix, ready for the kernels. A pytree.

    Attributes:
        codes: uint8 `[row blocks, column blocks, 64]`, the layout above.
        scale: float32 `[]` or `[rows]`; multiplies.
        multipliers: uint8 `[row blocks, groups, 16]` for int4, else None.
        columns: uint8 `[column tiles, cols, 64]`, or None: the codes once more, column by column,
            see `with_columns`.
        rows, cols: output and input features, static.
        layout: static.
    """

    codes: jax.Array
    scale: jax.Array
    multipliers: jax.Array | None
    rows: int = dataclasses.field(metadata={"static": True})
    cols: int = dataclasses.field(metadata={"static": True})
    layout: LayoutName = dataclasses.field(metadata={"static": True})
    columns: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(output features, input features)."""
        return self.rows, self.cols

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, multipliers and columns."""
        return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Screen:
    """A small form of a table and what bounds its error (`bitjax.ops.screened_logits`). A pytree.

    Groups of 31 columns of the table share a step, `multiplier * scale`. A column that holds
    `DITHER_CODE` follows each of them; it takes the dither of the group along:

        screen . expand(x) = sum_d (code_d - dither_d) step_d x_d
        expand(x)          = for each group its x_d, then -(sum_d dither_d x_d) / DITHER_CODE

    Attributes:
        weights: int4 `[rows, 32 * groups]`, codes of `bitjax.quant.int4_dithered`.
        dither: float32 `[columns of the table]` in [-1/2, 1/2).
        spreads: float32 `[rows]`, `(sum_g step_g^4)^(1/4)`.
        norms: float32 `[rows]`, the length of the table's row or of its screen, the larger one.
    """

    weights: PackedWeights
    dither: jax.Array
    spreads: jax.Array
    norms: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the table."""
        return self.weights.rows, self.dither.shape[0]

    def expand(self, x: jax.Array) -> jax.Array:
        """Float32 `[..., D]` to `[..., 32 * groups]`, what `weights` is multiplied with."""
        groups = self.weights.cols // GROUP
        pad = [(0, 0)] * (x.ndim - 1) + [(0, groups * SCREEN_GROUP - x.shape[-1])]
        dither = self.dither.reshape((1,) * (x.ndim - 1) + (-1,))
        x, dithered = (
            jnp.pad(t, pad).reshape(*x.shape[:-1], groups, SCREEN_GROUP) for t in (x, x * dither)
        )
        last = dithered.sum(-1, keepdims=True) * (-1 / DITHER_CODE)
        return jnp.concatenate([x, last], axis=-1).reshape(*x.shape[:-2], self.weights.cols)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, multipliers, dither, spreads and norms."""
        return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(self))


def expanded_cols(cols: int) -> int:
    """Columns of a screen's weights, for a table of `cols`."""
    return -(-cols // SCREEN_GROUP) * GROUP


def packed_shape(layout: LayoutName, rows: int, cols: int) -> tuple[int, int, int]:
    """Shape of the uint8 codes that hold a `rows` x `cols` matrix."""
    about = LAYOUTS[layout]
    unit = about.group_blocks or 1
    return -(-rows // BLOCK_ROWS), -(-cols // (about.block_cols * unit)) * unit, BLOCK_BYTES


def multiplier_shape(rows: int, cols: int) -> tuple[int, int, int]:
    """Shape of the uint8 multipliers of an int4 matrix."""
    return -(-rows // BLOCK_ROWS), -(-cols // GROUP), BLOCK_ROWS


def pack(
    w_NxK: np.ndarray,
    scale: float | np.ndarray,
    layout: LayoutName = "ternary2",
    multipliers: np.ndarray | None = None,
) -> PackedWeights:
    """Pack integer weights.

    Args:
        w_NxK: `[rows, cols]`, integers that the layout can hold, any numeric dtype.
        scale: finite floats, one or `[rows]`.
        layout: a name in `LAYOUTS`.
        multipliers: integers 1..15 `[rows, ceil(cols/32)]`; for int4, and required there.

    Raises:
        ValueError: not a matrix, empty, a value that the layout cannot hold, or a scale that is
            not finite.
    """
    about = LAYOUTS[layout]
    w_NxK = np.asarray(w_NxK)
    if w_NxK.ndim != 2 or 0 in w_NxK.shape:
        raise ValueError(f"packed weights must be a non-empty matrix; got shape {w_NxK.shape}")
    parts = (w_NxK[i : i + ROWS_AT_ONCE] for i in range(0, len(w_NxK), ROWS_AT_ONCE))
    if not all(((w >= about.low) & (w <= about.high) & (w == np.trunc(w))).all() for w in parts):
        raise ValueError(f"{layout} weights must be integers from {about.low} to {about.high}")
    rows, cols = w_NxK.shape
    scale = np.asarray(scale, np.float32)
    if scale.shape not in ((), (rows,)):
        raise ValueError(f"scales must be one number or {rows}, one a row; got {scale.shape}")
    if not np.isfinite(scale).all():
        raise ValueError(f"the weight scale must be finite; got {scale}")
    codes = np.empty(packed_shape(layout, rows, cols), np.uint8)
    for first in range(0, rows, ROWS_AT_ONCE):
        part = w_NxK[first : first + ROWS_AT_ONCE]
        blocks = slice(first // BLOCK_ROWS, -(-(first + len(part)) // BLOCK_ROWS))
        codes[blocks] = _pack_rows(part, layout)
    packed_multipliers = None
    if about.group_blocks:
        packed_multipliers = jnp.asarray(_pack_multipliers(rows, cols, multipliers))
    return PackedWeights(
        jnp.asarray(codes), jnp.asarray(scale), packed_multipliers, rows, cols, layout
    )


def _pack_rows(w_NxK: np.ndarray, layout: LayoutName) -> np.ndarray:
    """Codes of some rows of a matrix, padding included."""
    about = LAYOUTS[layout]
    rows, cols = w_NxK.shape
    shape = packed_shape(layout, rows, cols)
    padded = np.full((shape[0] * BLOCK_ROWS, shape[1] * about.block_cols), about.offset, np.uint8)
    padded[:rows, :cols] = w_NxK.astype(np.int8).view(np.uint8) + np.uint8(about.offset)
    # Four columns of a plane at a time: bytes do not carry, for codes are below the base.
    lanes = padded.view(np.uint32).reshape(shape[0], BLOCK_ROWS, shape[1], about.planes)
    packed = lanes[..., 0].copy()
    for s in range(1, about.planes):
        packed += lanes[..., s] * np.uint32(about.base**s)
    return np.ascontiguousarray(packed.transpose(0, 2, 1)).view(np.uint8).reshape(shape)


def columns_shape(layout: LayoutName, rows: int, cols: int) -> tuple[int, int, int]:
    """Shape of the uint8 columns of a ternary matrix."""
    return -(-rows // (COLUMN_BYTES * LAYOUTS[layout].planes)), cols, COLUMN_BYTES


def with_columns(packed: PackedWeights) -> PackedWeights:
    """The same weights, stored by columns as well.

    A product of one row of activations then reads only the columns whose activation is not zero
    after quantisation, where that is faster (ffi/form_times.h), and gives the same bits. That is
    for matrices behind ReLU^2; the price is their size once more.

    Raises:
        ValueError: not a ternary layout.
    """
    if LAYOUTS[packed.layout].base > 4:
        raise ValueError(f"{packed.layout} weights are not stored by columns; ternary ones are")
    about = LAYOUTS[packed.layout]
    tiles, cols, _ = columns_shape(packed.layout, *packed.shape)
    codes = np.full((tiles * about.planes * COLUMN_BYTES, cols), about.offset, np.uint8)
    codes[: packed.rows] = np.asarray(unpack(packed)) + about.offset
    planes = codes.reshape(tiles, about.planes, COLUMN_BYTES, cols)
    columns = np.zeros((tiles, COLUMN_BYTES, cols), np.uint8)
    for s in range(about.planes):
        columns += planes[:, s] * np.uint8(about.base**s)
    return dataclasses.replace(packed, columns=jnp.asarray(columns.transpose(0, 2, 1)))


def _pack_multipliers(rows: int, cols: int, multipliers: np.ndarray | None) -> np.ndarray:
    row_blocks, groups, _ = multiplier_shape(rows, cols)
    if multipliers is None or multipliers.shape != (rows, groups):
        got = None if multipliers is None else multipliers.shape
        raise ValueError(f"int4 weights need multipliers {(rows, groups)}; got {got}")
    if not ((multipliers >= 1) & (multipliers <= MAX_MULTIPLIER)).all():
        raise ValueError(f"multipliers must be from 1 to {MAX_MULTIPLIER}")
    padded = np.ones((row_blocks * BLOCK_ROWS, groups), np.uint8)
    padded[:rows] = multipliers
    return np.ascontiguousarray(padded.reshape(row_blocks, BLOCK_ROWS, groups).transpose(0, 2, 1))


def unpack(packed: PackedWeights) -> jax.Array:
    """The integers, multipliers applied, as int8 `[rows, cols]`; pure JAX, under jit anywhere."""
    about = LAYOUTS[packed.layout]
    row_blocks, col_blocks, _ = packed_shape(packed.layout, *packed.shape)
    codes = packed.codes.reshape(row_blocks, col_blocks, BLOCK_ROWS, LANE_BYTES)
    w = _decode(codes, packed.layout)  # row block, column block, row, plane, j
    w = w.transpose(0, 2, 1, 3, 4).reshape(row_blocks * BLOCK_ROWS, col_blocks * about.block_cols)
    if packed.multipliers is not None:
        m = packed.multipliers.transpose(0, 2, 1).reshape(row_blocks * BLOCK_ROWS, -1)
        w = w * jnp.repeat(m.astype(jnp.int16), GROUP, axis=1)
    return w[: packed.rows, : packed.cols].astype(jnp.int8)


def unpack_ternary(codes: np.ndarray, rows: int, cols: int, layout: LayoutName) -> np.ndarray:
    """`unpack` of a ternary matrix's codes in NumPy, several times as fast outside jit.

    Args:
        codes: uint8 `[row blocks, column blocks, 64]`, of a layout of base 3 or 4.
        rows, cols: of the matrix.
        layout: of the codes.

    Returns:
        int8 `[rows, cols]`.
    """
    about = LAYOUTS[layout]
    row_blocks, col_blocks, _ = codes.shape
    w = np.empty((row_blocks, BLOCK_ROWS, col_blocks, about.planes), np.uint32)
    left = np.ascontiguousarray(codes)
    for s in range(about.planes):  # the inverse of `_pack_rows`, the lowest digit first
        rest = left // np.uint8(about.base)
        digit = left - rest * np.uint8(about.base) - np.uint8(about.offset)
        lanes = digit.view(np.uint32).reshape(row_blocks, col_blocks, BLOCK_ROWS)
        w[..., s] = lanes.transpose(0, 2, 1)
        left = rest
    return w.view(np.int8).reshape(row_blocks * BLOCK_ROWS, -1)[:rows, :cols]


def packed_rows(packed: PackedWeights, rows: jax.Array) -> jax.Array:
    """Some rows of a packed matrix as float32 `[..., cols]`: an embedding look-up.

    Args:
        packed: the table.
        rows: integers `[...]`, in range.
    """
    blocks, lanes = rows // BLOCK_ROWS, rows % BLOCK_ROWS
    codes = packed.codes.reshape(*packed.codes.shape[:2], BLOCK_ROWS, LANE_BYTES)
    w = _decode(codes[blocks, :, lanes], packed.layout).reshape(*rows.shape, -1)
    if packed.multipliers is not None:
        m = packed.multipliers[blocks, :, lanes].astype(jnp.int16)
        w = w * jnp.repeat(m, GROUP, axis=-1)
    scale = packed.scale if packed.scale.ndim == 0 else packed.scale[rows]
    return w[..., : packed.cols].astype(jnp.float32) * jnp.expand_dims(
        jnp.broadcast_to(scale, rows.shape), -1
    )


def _decode(codes: jax.Array, layout: LayoutName) -> jax.Array:
    """uint8 `[..., 4]` to int16 weights `[..., plane, 4]`, without multipliers."""
    about = LAYOUTS[layout]
    planes = [
        codes if about.planes == 1 else codes // jnp.uint8(about.base**s) % about.base
        for s in range(about.planes)
    ]
    return jnp.stack(planes, axis=-2).astype(jnp.int16) - jnp.int16(about.offset)


def validate(name: str, packed: PackedWeights, codes: bool = True) -> None:
    """Check packed weights that came from outside (a file) before they are used.

    Kernels read nothing outside the arrays whatever the bytes; invalid codes would only give
    wrong numbers.

    Args:
        name: of the tensor, for messages.
        packed: with NumPy arrays.
        codes: whether to read and check every byte of the codes.

    Raises:
        ValueError: naming the tensor: wrong shape or dtype, an invalid code or multiplier, or a
            scale that is not finite.
    """
    about = LAYOUTS[packed.layout]
    arrays = {"codes": (packed.codes, packed_shape(packed.layout, *packed.shape))}
    if about.group_blocks:
        if packed.multipliers is None:
            raise ValueError(f"{name}: int4 weights need multipliers")
        arrays["multipliers"] = packed.multipliers, multiplier_shape(*packed.shape)
    elif packed.multipliers is not None:
        raise ValueError(f"{name}: {packed.layout} weights have no multipliers")
    if packed.columns is not None:
        if about.base > 4:
            raise ValueError(f"{name}: {packed.layout} weights are not stored by columns")
        arrays["columns"] = packed.columns, columns_shape(packed.layout, *packed.shape)
    for what, (array, wanted) in arrays.items():
        if array.shape != wanted or array.dtype != np.uint8:
            raise ValueError(
                f"{name}: {what} are {array.dtype}{list(array.shape)}; a {packed.rows} x "
                f"{packed.cols} {packed.layout} matrix needs uint8{list(wanted)}"
            )
    scale = packed.scale
    if scale.shape not in ((), (packed.rows,)) or scale.dtype != np.float32:
        raise ValueError(
            f"{name}: scales must be one float32 or {packed.rows}, one a row; got "
            f"{scale.dtype}{list(scale.shape)}"
        )
    if not np.isfinite(np.asarray(scale)).all():
        bad = np.ravel(scale)[~np.isfinite(np.ravel(scale))][0]
        raise ValueError(f"{name}: the scale {bad} is not finite")
    if packed.multipliers is not None:
        multipliers = np.asarray(packed.multipliers)
        if multipliers.min() < 1 or multipliers.max() > MAX_MULTIPLIER:
            raise ValueError(f"{name}: multipliers must be from 1 to {MAX_MULTIPLIER}")
    if codes:
        blocks = [packed.codes, *([] if packed.columns is None else [packed.columns])]
        for block in itertools.chain(*map(np.asarray, blocks)):  # one at a time stays in the cache
            if _has_invalid_code(packed.layout, block):
                raise ValueError(f"{name}: {_INVALID[packed.layout]}")


_INVALID: dict[LayoutName, str] = {
    "ternary2": "holds the code 3, which stands for no weight",
    "ternary1.6": "holds a byte above 242, which stands for no five weights",
    "int8": "holds the code 0, which stands for no weight",
}


def _has_invalid_code(layout: LayoutName, block: np.ndarray) -> bool:
    if layout == "ternary2":
        words = block.reshape(-1).view(np.uint64)
        return bool((words & (words >> np.uint64(1)) & np.uint64(0x5555555555555555)).any())
    if layout == "ternary1.6":
        return int(block.max()) > 242
    return layout == "int8" and int(block.min()) == 0
