"""Matrices that are ternary without being stored so: one scale times -1, 0 and 1 in every row."""

from __future__ import annotations

import numpy as np

from bitjax.interop.checkpoint import Ternary

ROWS = 1024  # examined at once


def of_floats(values: np.ndarray) -> Ternary | None:
    """Codes and scale of a float matrix, if every row is one magnitude and zeros; else None.

    A matrix of zeros is not taken for ternary.
    """
    rows, cols = values.shape
    scale_R = np.empty(rows, np.float32)
    codes = np.empty((rows, cols), np.int8)
    for start in range(0, rows, ROWS):
        part = np.asarray(values[start : start + ROWS], np.float32)
        size = np.abs(part)
        largest = size.max(axis=1)
        if not np.isfinite(largest).all() or not ((size == largest[:, None]) | (size == 0)).all():
            return None
        scale_R[start : start + ROWS] = largest
        codes[start : start + ROWS] = np.sign(part)
    return Ternary(codes, _joined(scale_R)) if scale_R.any() else None


def of_blocks(codes: np.ndarray, scales: np.ndarray) -> Ternary | None:
    """Codes and scale of a matrix whose blocks have scales, if those of a row agree; else None.

    Blocks whose scale is 0 hold zeros whatever their codes.

    Args:
        codes: int8 `[rows, cols]`.
        scales: float32 `[rows, blocks]`, of either sign.
    """
    zero = scales == 0
    if zero.any():
        width = codes.shape[1] // scales.shape[1]
        codes = np.where(np.repeat(zero, width, axis=1), np.int8(0), codes)
    scale_R = np.take_along_axis(scales, np.argmax(~zero, axis=1)[:, None], axis=1)[:, 0]
    if not ((scales == scale_R[:, None]) | zero).all():
        return None
    if (scale_R < 0).any():
        codes = np.where(scale_R[:, None] < 0, -codes, codes)
    return Ternary(codes, _joined(np.abs(scale_R)))


def _joined(scale_R: np.ndarray) -> np.ndarray:
    """One scale if all rows have it, but for rows of zeros; else as it is."""
    used = scale_R[scale_R != 0]
    return scale_R if used.size and (used != used[0]).any() else np.asarray(used[:1].sum())
