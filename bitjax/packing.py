"""Packed ternary weights: the Python twin of `ffi/packed_format.h`, format version 1.

    dequant(w)[n, k] = (code[n, k] - 1) * scale,    code in {0, 1, 2}

Rows (output features) and columns (input features) are padded to multiples of 16 with code 1,
weight zero. Codes are stored in blocks of 16 rows x 16 columns, 64 bytes each, as a uint8 array
`[ceil(rows/16), ceil(cols/16), 64]`. In block (nb, kb), byte `4*r + j` holds row `16*nb + r`; its
bits `2*s` and `2*s + 1` hold the code of column `16*kb + 4*s + j`, for r in 0..15 and j, s in 0..3.

So one 64-byte vector load brings four columns of sixteen rows per bit plane: every 32-bit lane is
a row, and a four-byte dot product with the same four activations in every lane advances all
sixteen rows with no horizontal sum.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

FORMAT_VERSION = 1
BLOCK = 16  # rows, and columns, of one block
BLOCK_BYTES = 64
PLANES = 4  # 2-bit planes of a byte


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTernary:
    """Ternary (or binary) weights of one linear layer, ready for the kernels. A pytree.

    Attributes:
        codes: uint8 `[ceil(rows/16), ceil(cols/16), 64]`, the layout above.
        scale: float32 scalar; multiplies.
        rows, cols: output and input features, static.
        version: of the layout, static.
    """

    codes: jax.Array
    scale: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})
    cols: int = dataclasses.field(metadata={"static": True})
    version: int = dataclasses.field(default=FORMAT_VERSION, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(output features, input features)."""
        return self.rows, self.cols


def packed_shape(rows: int, cols: int) -> tuple[int, int, int]:
    """Shape of the uint8 codes that hold a `rows` x `cols` matrix."""
    return -(-rows // BLOCK), -(-cols // BLOCK), BLOCK_BYTES


def pack(codes_NxK: np.ndarray, scale: float | np.ndarray) -> PackedTernary:
    """Pack integer weights.

    Args:
        codes_NxK: `[rows, cols]`, every value -1, 0 or 1, any numeric dtype.
        scale: finite float; `codes * scale` are the real weights.

    Raises:
        ValueError: not a matrix, empty, a value outside {-1, 0, 1}, or a scale that is not finite.
    """
    codes_NxK = np.asarray(codes_NxK)
    if codes_NxK.ndim != 2 or 0 in codes_NxK.shape:
        raise ValueError(f"packed weights must be a non-empty matrix; got shape {codes_NxK.shape}")
    if not np.isin(codes_NxK, (-1, 0, 1)).all():
        raise ValueError("packed weights must be -1, 0 or 1")
    scale = np.asarray(scale, np.float32).reshape(())
    if not np.isfinite(scale):
        raise ValueError(f"the weight scale must be finite; got {scale}")
    rows, cols = codes_NxK.shape
    row_blocks, col_blocks, _ = packed_shape(rows, cols)
    padded = np.ones((row_blocks * BLOCK, col_blocks * BLOCK), np.uint8)
    padded[:rows, :cols] = (codes_NxK + 1).astype(np.uint8)
    planes = padded.reshape(row_blocks, BLOCK, col_blocks, PLANES, 4)  # nb, r, kb, s, j
    planes = planes.transpose(0, 2, 1, 4, 3)  # nb, kb, r, j, s
    shifts = 2 * np.arange(PLANES, dtype=np.uint8)
    codes = np.bitwise_or.reduce(planes << shifts, axis=-1)
    return PackedTernary(
        jnp.asarray(codes.reshape(row_blocks, col_blocks, BLOCK_BYTES)),
        jnp.asarray(scale),
        rows,
        cols,
    )


def unpack(packed: PackedTernary) -> jax.Array:
    """The weights as int8 `[rows, cols]` in {-1, 0, 1}; pure JAX, works under jit anywhere."""
    row_blocks, col_blocks, _ = packed_shape(*packed.shape)
    codes = packed.codes.reshape(row_blocks, col_blocks, BLOCK, 4)  # nb, kb, r, j
    shifts = 2 * jnp.arange(PLANES, dtype=jnp.uint8)
    planes = (codes[..., None] >> shifts.reshape(1, 1, 1, 1, PLANES)) & jnp.uint8(3)
    planes = planes.transpose(0, 2, 1, 4, 3)  # nb, r, kb, s, j
    padded = planes.reshape(row_blocks * BLOCK, col_blocks * BLOCK)
    return padded[: packed.rows, : packed.cols].astype(jnp.int8) - jnp.int8(1)


def validate(name: str, packed: PackedTernary) -> None:
    """Check packed weights that came from outside (a file) before any kernel reads them.

    Raises:
        ValueError: naming the tensor: unknown version, wrong shape or dtype, the invalid code 3,
            or a scale that is not finite.
    """
    if packed.version != FORMAT_VERSION:
        raise ValueError(
            f"{name}: packed format version {packed.version}; this build reads {FORMAT_VERSION}"
        )
    wanted = packed_shape(*packed.shape)
    if packed.codes.shape != wanted or packed.codes.dtype != np.uint8:
        raise ValueError(
            f"{name}: codes are {packed.codes.dtype}{list(packed.codes.shape)}; "
            f"a {packed.rows} x {packed.cols} matrix needs uint8{list(wanted)}"
        )
    codes = np.asarray(packed.codes)
    if (codes & (codes >> 1) & 0x55).any():
        raise ValueError(f"{name}: holds the code 3, which stands for no weight")
    if packed.scale.shape != () or packed.scale.dtype != np.float32:
        raise ValueError(f"{name}: the scale must be one float32; got {packed.scale.dtype}"
                         f"{list(packed.scale.shape)}")  # fmt: skip
    if not np.isfinite(np.asarray(packed.scale)):
        raise ValueError(f"{name}: the scale {packed.scale} is not finite")
