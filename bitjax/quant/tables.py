"""Embeddings and heads, kept in full precision by BitNet, in their forms for inference.

`int8_per_row` and `int4_grouped`; `int4_dithered` screens a head (`bitjax.ops.screened_logits`).
"""

from __future__ import annotations

import numpy as np

from bitjax.quant.codes import EPS


def int8_per_row(table_VxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Absmax int8 rows of an embedding or head: int8 codes in -127..127, float32 scales `[V]`."""
    table_VxD = np.asarray(table_VxD, np.float32)
    scale_V = np.maximum(np.abs(table_VxD).max(axis=1), EPS) / 127
    codes = np.rint(table_VxD / scale_V[:, None])
    return codes.astype(np.int8), scale_V.astype(np.float32)


def int4_grouped(table_VxD: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """4-bit rows of an embedding or head, with an integer multiplier for each group of columns.

        dequant(w)[v, d] = code[v, d] * multiplier[v, d // group] * scale[v]

    Of the multipliers near absmax / 7, each group takes the one of least squared error.

    Returns:
        int8 codes in -8..7 `[V, D]`, uint8 multipliers in 1..15 `[V, ceil(D/group)]`, float32
        scales `[V]`.
    """
    table_VxD = np.asarray(table_VxD, np.float32)
    V, D = table_VxD.shape
    w = np.pad(table_VxD, ((0, 0), (0, -D % group))).reshape(V, -1, group)
    step = np.abs(w).max(axis=2) / 7
    scale = np.maximum(step.max(axis=1), EPS) / 15
    nearest = np.rint(step / scale[:, None])
    best_error = np.full(step.shape, np.inf, np.float32)
    codes = np.zeros(w.shape, np.int8)
    multipliers = np.ones(step.shape, np.uint8)
    for candidate in (nearest - 2, nearest - 1, nearest, nearest + 1):
        m = np.clip(candidate, 1, 15)
        unit = (m * scale[:, None])[..., None]
        c = np.clip(np.rint(w / unit), -8, 7)
        error = np.square(c * unit - w).sum(axis=2)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        codes[better] = c[better]
        multipliers = np.where(better, m, multipliers).astype(np.uint8)
    return codes.reshape(V, -1)[:, :D], multipliers, scale.astype(np.float32)


def int4_dithered(
    table_VxD: np.ndarray, group: int, dither_D: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """4-bit rows by subtractive dither (Schuchman, 1964): `code - dither` stands for a weight.

        step[v, g] = multiplier[v, g] * scale[v]        code = round(w / step + dither[d])
        dequant(w)[v, d] = (code[v, d] - dither[d]) * step[v, d // group]

    The steps are large enough for every weight of their group to lie inside -8..7 steps, so nothing
    is clipped. With a dither drawn from [-1/2, 1/2) the errors of a row, `dequant(w) - w`, are then
    independent and uniform over one step around 0, whatever the weights.

    Args:
        table_VxD: finite.
        group: columns that share a multiplier.
        dither_D: float32 in [-1/2, 1/2), the same for all rows.

    Returns:
        As `int4_grouped`.
    """
    table_VxD = np.asarray(table_VxD, np.float64)
    V, D = table_VxD.shape
    w = np.pad(table_VxD, ((0, 0), (0, -D % group))).reshape(V, -1, group)
    # A little more than needed: rounding the scale to float32 puts no weight outside.
    step = np.maximum(w.max(axis=2) / 7, w.min(axis=2) / -8) * (1 + 2.0**-20)
    largest = np.maximum(step.max(axis=1), EPS)
    scale = np.nextafter((largest / 15).astype(np.float32), np.float32(np.inf))
    multipliers = np.maximum(np.ceil(step / scale[:, None]), 1)
    units = (w / (multipliers * scale[:, None])[..., None]).reshape(V, -1)[:, :D]
    codes = np.floor(units + (dither_D.astype(np.float64) + 0.5))
    return codes.astype(np.int8), multipliers.astype(np.uint8), scale
