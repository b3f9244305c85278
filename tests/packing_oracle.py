"""Independent, slow oracle: packing written from the format's text, products in int64 and float64.

Imports nothing from bitjax.
"""

import ml_dtypes
import numpy as np


def random_weights(rng, rows, inputs):
    """Ternary weights [rows, inputs] int64."""
    return rng.integers(-1, 2, size=(rows, inputs))


def pack(w_NxK):
    """Weights [N, K] in {-1, 0, 1} -> codes [NB, KB, 64] uint8, one weight at a time."""
    rows, inputs = w_NxK.shape
    row_blocks, input_blocks = -(-rows // 16), -(-inputs // 16)
    codes = np.zeros((row_blocks, input_blocks, 64), np.uint8)
    for row in range(row_blocks * 16):
        for k in range(input_blocks * 16):
            inside = row < rows and k < inputs
            code = int(w_NxK[row, k]) + 1 if inside else 1
            byte = (row % 16) * 4 + k % 4
            codes[row // 16, k // 16, byte] |= code << (2 * (k % 16 // 4))
    return codes


def quantise(x_MxK):
    """Rows of float32 -> (int64 values, float32 scales); a row that is not finite has scale NaN."""
    x = x_MxK.astype(np.float32)
    finite = np.isfinite(x).all(axis=1)
    x = np.where(finite[:, None], x, np.float32(0))
    amax = np.max(np.abs(x), axis=1, initial=np.float32(1e-5)).astype(np.float32)
    inverse = np.float32(127) / amax
    rounded = np.rint(x * inverse[:, None])  # NumPy rounds halves to even
    q = np.clip(rounded, -128, 127).astype(np.int64)
    return q, np.where(finite, amax * np.float32(1 / 127), np.float32(np.nan)).astype(np.float32)


def integer_product(q_MxK, w_NxK):
    return q_MxK.astype(np.int64) @ w_NxK.astype(np.int64).T


def ternary_matmul(x_MxK, w_NxK, scale):
    """The whole operation; float32 or bfloat16 in, the same out, bit-exact by the contract."""
    q, x_scale = quantise(x_MxK)
    factor = (x_scale * np.float32(scale)).astype(np.float32)
    y = integer_product(q, w_NxK).astype(np.float32) * factor[:, None]
    return y.astype(x_MxK.dtype)


BF16 = ml_dtypes.bfloat16
