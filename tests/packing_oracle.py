"""Independent, slow oracle: packing written from the format's text, products in int64.

Where the kernels' contract fixes every float32 rounding, NumPy performs the same ones; `bounded`
does without that, in float64, and says how far a float32 result may be off. Imports nothing from
bitjax.
"""

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
UNIT = 2.0**-24  # relative error of a float32 operation, at most

LAYOUTS = ("ternary2", "ternary1.6", "int4", "int8")
BASE = {"ternary2": 4, "ternary1.6": 3, "int4": 16, "int8": 256}  # a byte holds digits in this base
PLANES = {"ternary2": 4, "ternary1.6": 5, "int4": 2, "int8": 1}
OFFSET = {"ternary2": 1, "ternary1.6": 1, "int4": 8, "int8": 128}
RANGE = {"ternary2": (-1, 1), "ternary1.6": (-1, 1), "int4": (-8, 7), "int8": (-127, 127)}


def random_weights(rng, layout, rows, inputs):
    """Weights [rows, inputs] int64, and for int4 multipliers [rows, groups], else None."""
    low, high = RANGE[layout]
    w = rng.integers(low, high + 1, size=(rows, inputs))
    if layout != "int4":
        return w, None
    return w, rng.integers(1, 16, size=(rows, -(-inputs // 32)))


def pack(layout, w_NxK):
    """Weights [N, K] -> codes [NB, KB, 64] uint8."""
    rows, inputs = w_NxK.shape
    inputs_of_block = 4 * PLANES[layout]
    unit = 32 if layout == "int4" else inputs_of_block  # int4 has whole groups
    codes = np.zeros((-(-rows // 16), -(-inputs // unit) * unit // inputs_of_block, 64), np.int64)
    row, k = np.indices((codes.shape[0] * 16, codes.shape[1] * inputs_of_block))
    padded = np.zeros(row.shape, np.int64)
    padded[:rows, :inputs] = w_NxK
    byte, plane = row % 16 * 4 + k % 4, k % inputs_of_block // 4
    digits = (padded + OFFSET[layout]) * BASE[layout] ** plane
    np.add.at(codes, (row // 16, k // inputs_of_block, byte), digits)
    return codes.astype(np.uint8)


def pack_multipliers(m_NxG):
    """Multipliers [N, G] -> [NB, G, 16] uint8, ones beyond N."""
    rows, groups = m_NxG.shape
    packed = np.ones((-(-rows // 16), groups, 16), np.uint8)
    for row in range(rows):
        packed[row // 16, :, row % 16] = m_NxG[row]
    return packed


def multiplied(w_NxK, m_NxG):
    """The weights times their multipliers, if there are any."""
    if m_NxG is None:
        return w_NxK
    return w_NxK * np.repeat(m_NxG, 32, axis=1)[:, : w_NxK.shape[1]]


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


def relu2_gate(x_Mx2K):
    gate, up = np.split(x_Mx2K.astype(np.float32), 2, axis=1)
    gate = np.where(gate < 0, np.float32(0), gate)
    return gate * gate * up


def rms_norm(x_MxK, scale_K, eps):
    """Squares are summed in 16 lanes, which are then folded in halves."""
    x = x_MxK.astype(np.float32)
    rows, inputs = x.shape
    squares = np.zeros((rows, -(-inputs // 16) * 16), np.float32)
    squares[:, :inputs] = x * x
    lanes = np.zeros((rows, 16), np.float32)
    for i in range(0, inputs, 16):
        lanes = lanes + squares[:, i : i + 16]
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    inverse = np.float32(1) / np.sqrt(lanes / np.float32(inputs) + np.float32(eps))
    return x * inverse * scale_K


def integer_product(q_MxK, w_NxK):
    return q_MxK.astype(np.int64) @ w_NxK.astype(np.int64).T


def packed_matmul(x, w_NxK, scale, *, gate="none", norm=None, eps=0.0, residual=None):
    """The whole operation, bit-exact; float32 or bfloat16 in, the same out. Multiplied weights."""
    assert gate in ("none", "relu2")
    h = relu2_gate(x) if gate == "relu2" else x
    q, x_scale = quantise(h if norm is None else rms_norm(h, norm, eps))
    factor = x_scale[:, None] * np.asarray(scale, np.float32).reshape(1, -1)
    y = integer_product(q, w_NxK).astype(np.float32) * factor
    if residual is not None:
        y = y + residual.astype(np.float32)
    return y.astype(x.dtype)


def bounded(x, w_NxK, scale, units, *, gate="none", norm=None, eps=0.0, residual=None):
    """The operation in float64 and a bound of the error of a float32 one: (y, error), [M, N].

    The bound follows from `units`, the relative error of gate and norm in units of float32
    rounding. With it h * 127 / amax, at most 127, is known up to 127 times the errors of h, of
    amax, and of two roundings; only values so close to a tie may round to the other side, and each
    of them moves the sum by one weight. All else that rounds is the scale, as often as h's, and
    the product of it.
    """
    h = x.astype(np.float64)
    if gate != "none":
        gated, up = np.split(h, 2, axis=1)
        h = (gated / (1 + np.exp(-gated)) if gate == "silu" else np.maximum(gated, 0) ** 2) * up
    if norm is not None:
        h = h / np.sqrt((h**2).mean(axis=1, keepdims=True) + eps) * norm
    amax = np.maximum(np.abs(h).max(axis=1, keepdims=True), 1e-5)
    values = h * (127 / amax)
    from_tie = np.abs(np.abs(values - np.floor(values)) - 0.5)
    may_flip = from_tie <= 127 * (2 * units + 2) * UNIT
    w = w_NxK.astype(np.float64)
    factor = amax / 127 * np.asarray(scale, np.float64).reshape(1, -1)
    product = np.rint(values) @ w.T * factor
    # amax: units; its product with 1/127 (rounded), with the weights' scale, with the sum: 4.
    error = may_flip @ np.abs(w).T * np.abs(factor) + np.abs(product) * (units + 4) * 1.01 * UNIT
    y = product if residual is None else product + residual.astype(np.float64)
    error = error + (np.abs(y) + error) * UNIT
    if x.dtype == BF16:
        error = error + (np.abs(y) + error) * 2.0**-8
    return y, error
