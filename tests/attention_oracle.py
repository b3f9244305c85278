"""Independent, slow oracle of attention over a KV cache, written from the layout's text.

Turning and storing are float32 operations that the contract fixes one by one, so the cache is exact
to the bit; attention is float64, with a bound of the error of a float32 one. Imports nothing from
bitjax.
"""

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
UNIT = 2.0**-24  # relative error of a float32 operation, at most


def rotate(x_BxTxNxh, turn_BxTxh):
    """Turns each pair (i, i + h/2) by the token's angle i; float32, each operation rounded."""
    half = x_BxTxNxh.shape[-1] // 2
    x = x_BxTxNxh.astype(np.float32)
    cos, sin = turn_BxTxh[:, :, None, :half], turn_BxTxh[:, :, None, half:]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def slots_of(keys_BxGxCxhx16):
    """Keys slot by slot: [B, G, S, h]."""
    B, G, C, h, block = keys_BxGxCxhx16.shape
    slots = np.zeros((B, G, C * block, h), keys_BxGxCxhx16.dtype)
    for s in range(C * block):
        slots[:, :, s] = keys_BxGxCxhx16[:, :, s // 16, :, s % 16]
    return slots


def blocks_of(slots_BxGxSxh):
    """Keys as the cache holds them: [B, G, S/16, h, 16]."""
    B, G, S, h = slots_BxGxSxh.shape
    keys = np.zeros((B, G, S // 16, h, 16), slots_BxGxSxh.dtype)
    for s in range(S):
        keys[:, :, s // 16, :, s % 16] = slots_BxGxSxh[:, :, s]
    return keys


def store(qkv, turn, positions, keys, values):
    """The cache after the tokens, to the bit; tokens at positions outside of it are not in it."""
    G, S = values.shape[1:3]
    slots, values = slots_of(keys), values.copy()
    turned = rotate(qkv[:, :, :-G], turn)[:, :, -G:]
    for (b, t), p in np.ndenumerate(positions):
        if 0 <= p < S:
            slots[b, :, p] = turned[b, t].astype(keys.dtype)
            values[b, :, p] = qkv[b, t, -G:].astype(values.dtype)
    return blocks_of(slots), values


def cached_attention(qkv, turn, positions, keys, values):
    """(mixed, error, keys, values): mixed in float64, |float32 result - mixed| <= error.

    Relative errors, in UNIT, of what a float32 implementation sums over n visible slots:

      score    h for h products and their sum, 4 for 1/sqrt(h) (two), its product with q, and one to
               spare; all of it relative to sum |q| |k| / sqrt(h), and a weight's relative error is
               its score's absolute one
      weight   1 for score - maximum, relative to that difference (later maxima add up to it); 4
               for e^x, two units in the last place
      rescale  each of n/64 steps may multiply by another e^x, good for 4, and round twice
      sums     n for total and for mixed, 1 for the product in it, and 8 for a join of splits and
               the division

    Weights below e^-87 of the largest may be taken for it.
    """
    B, T, N, h = qkv.shape
    G, S = values.shape[1:3]
    H = N - 2 * G
    keys, values = store(qkv, turn, positions, keys, values)
    k_BxGxSxh, v_BxGxSxh = slots_of(keys).astype(np.float64), values.astype(np.float64)
    q = rotate(qkv[:, :, :H], turn).astype(np.float64) / np.sqrt(h)
    last = np.where((positions < 0) | (positions >= S), S - 1, positions)
    mixed, error = np.zeros((2, B, T, H, h))
    for b in range(B):
        hidden_TxS = np.arange(S) > last[b][:, None]
        n_Tx1 = last[b][:, None] + 1.0
        for head in range(H):
            k, v = (x[b, head // (H // G)] for x in (k_BxGxSxh, v_BxGxSxh))
            scores = np.where(hidden_TxS, -np.inf, _product(q[b, :, head], k))
            below = scores.max(axis=1, keepdims=True) - scores
            weights = np.exp(-below)
            weights /= weights.sum(axis=1, keepdims=True)
            out, magnitude = _product(weights, v.T), _product(weights, np.abs(v).T)
            steps = n_Tx1 // 64 + 1
            relative = (h + 4) * (_product(np.abs(q[b, :, head]), np.abs(k))) + 5 + 6 * steps
            relative = weights * (relative + np.where(hidden_TxS, 0, below))
            off = _product(relative, np.abs(v).T) + relative.sum(1, keepdims=True) * np.abs(out)
            off += (2 * n_Tx1 + 8 * steps + 16) * magnitude
            floor = np.exp(-87.0) * 2 * n_Tx1 * np.abs(v).max()
            mixed[b, :, head], error[b, :, head] = out, 1.01 * off * UNIT + floor
    if qkv.dtype == BF16:
        error += (np.abs(mixed) + error) * 2.0**-8
    shape = (B, T, H * h)
    return mixed.reshape(shape), error.reshape(shape), keys, values


def _product(a_NxK, b_MxK):
    """`a @ b.T` without BLAS, whose threads wait for each other where processors are few."""
    return np.einsum("nk,mk->nm", a_NxK, b_MxK)
