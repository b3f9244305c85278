"""Ternary matrices as Hugging Face files hold them: packed in bytes, or exact in floats.

Packed, uint8 `[R, cols]` with `R = ceil(rows / 4)`: a byte holds four rows that are R apart,

    packed[r, c] = sum_i (w[i * R + r, c] + 1) * 4^i        i = 0..3

and no code is 3. Bits of rows that the matrix does not have mean nothing.

In floats, every weight is `-s`, 0 or `+s` exactly, with s one number of the matrix, or one of each
shard that another machine held in training: shards are runs of rows (column-parallel layers) or of
columns (row-parallel layers).

Sources: transformers, integrations/bitnet.py; Spectra (arXiv 2407.12327), section 3.
"""

from __future__ import annotations

import dataclasses

import numpy as np

ROWS_PER_BYTE = 4
CHUNK_ROWS = 1024  # of a matrix looked at together: temporary values of a few megabytes


def packed_shape(rows: int, cols: int) -> tuple[int, int]:
    """Of the bytes of a matrix."""
    return -(-rows // ROWS_PER_BYTE), cols


def unpack_codes(packed: np.ndarray, rows: int) -> np.ndarray:
    """int8 `[rows, cols]` of -1, 0 and +1.

    Raises:
        ValueError: a code is 3.
    """
    step, cols = packed.shape
    codes = np.empty((rows, cols), np.int8)
    for i in range(ROWS_PER_BYTE):
        part = codes[i * step : (i + 1) * step]
        shifted = packed[: len(part)] >> (2 * i)
        np.subtract(shifted & 3, 1, out=part, casting="unsafe")
        if part.size and part.max() > 1:
            row, col = np.argwhere(part > 1)[0]
            raise ValueError(
                f"holds the code 3 at row {i * step + row}, column {col}; a ternary weight is "
                "0, 1 or 2"
            )
    return codes


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_codes`."""
    rows, cols = codes.shape
    step, _ = packed_shape(rows, cols)
    packed = np.zeros((step, cols), np.uint8)
    for i in range(ROWS_PER_BYTE):
        part = codes[i * step : (i + 1) * step]
        packed[: len(part)] |= (part + 1).astype(np.uint8) << (2 * i)
    return packed


@dataclasses.dataclass(frozen=True)
class ExactTernary:
    """A float matrix that is ternary: `w[n, k] = codes[n, k] * rows[n] * cols[k]`.

    Attributes:
        codes: int8 `[N, K]`.
        rows: float32 `[]` or `[N]`, above 0.
        cols: float32 `[K]` where the scale is one of columns (then rows is 1), else None; 0 for a
            column without a weight.
    """

    codes: np.ndarray
    rows: np.ndarray
    cols: np.ndarray | None


def exact_ternary(w_NxK: np.ndarray) -> ExactTernary | None:
    """A float matrix as codes and scales, or None if it is not exactly ternary.

    Rows without a weight take the scale of the row before.
    """
    rows = _scales(w_NxK, axis=1)
    if _is_ternary(w_NxK, rows[:, None]):
        rows = _filled(rows)
        return ExactTernary(_signs(w_NxK), rows[0] if (rows == rows[0]).all() else rows, None)
    cols = _scales(w_NxK, axis=0)
    if _is_ternary(w_NxK, cols[None, :]):
        return ExactTernary(_signs(w_NxK), np.ones((), np.float32), cols)
    return None


def _chunks(w_NxK: np.ndarray) -> list[slice]:
    return [slice(i, i + CHUNK_ROWS) for i in range(0, len(w_NxK), CHUNK_ROWS)]


def _scales(w_NxK: np.ndarray, axis: int) -> np.ndarray:
    """float32 largest magnitudes of rows (axis 1) or columns (axis 0)."""
    parts = [np.abs(w_NxK[rows].astype(np.float32)).max(axis=axis) for rows in _chunks(w_NxK)]
    return np.concatenate(parts) if axis == 1 else np.max(parts, axis=0)


def _is_ternary(w_NxK: np.ndarray, scales: np.ndarray) -> bool:
    """Whether every weight is 0 or its scale, up to sign; NaN and infinity are neither."""
    if not np.isfinite(scales).all():
        return False
    per_row = scales.shape[0] > 1 or len(w_NxK) == 1
    for rows in _chunks(w_NxK):
        sizes = np.abs(w_NxK[rows].astype(np.float32))
        if not ((sizes == (scales[rows] if per_row else scales)) | (sizes == 0)).all():
            return False
    return True


def _filled(scales: np.ndarray) -> np.ndarray:
    """Each zero replaced by the last number before it, leading ones by the first; 1 if there is
    none."""
    if not scales.any():
        return np.ones_like(scales)
    places = np.where(scales > 0, np.arange(len(scales)), 0)
    filled = scales[np.maximum.accumulate(places)]
    return np.where(filled > 0, filled, scales[np.argmax(scales > 0)])


def _signs(w_NxK: np.ndarray) -> np.ndarray:
    return np.concatenate([np.sign(w_NxK[rows]).astype(np.int8) for rows in _chunks(w_NxK)])
