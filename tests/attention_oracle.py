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


def slots_of(keys):
    """Keys slot by slot, [B, G, S, h], of a float [B, G, S/64, h, 64] or an int8 cache."""
    B, G, C = keys.shape[:3]
    h = keys.shape[3] * (2 if keys.ndim == 6 else 1)
    slots = np.zeros((B, G, C * 64, h), keys.dtype)
    for s in range(C * 64):
        block = keys[:, :, s // 64]
        if keys.ndim == 5:
            slots[:, :, s] = block[:, :, :, s % 64]
        else:
            slots[:, :, s, 0::2] = block[:, :, :, s % 64, 0]
            slots[:, :, s, 1::2] = block[:, :, :, s % 64, 1]
    return slots


def blocks_of(slots_BxGxSxh):
    """Keys as a cache of their dtype holds them."""
    B, G, S, h = slots_BxGxSxh.shape
    int8 = slots_BxGxSxh.dtype == np.int8
    keys = np.zeros((B, G, S // 64, *((h // 2, 64, 2) if int8 else (h, 64))), slots_BxGxSxh.dtype)
    for s in range(S):
        block, slot = keys[:, :, s // 64], slots_BxGxSxh[:, :, s]
        if int8:
            block[:, :, :, s % 64, 0] = slot[:, :, 0::2]
            block[:, :, :, s % 64, 1] = slot[:, :, 1::2]
        else:
            block[:, :, :, s % 64] = slot
    return keys


def in_pairs(values_BxGxSxh):
    """Values as an int8 cache holds them: [B, G, S/2, h, 2]."""
    return np.stack([values_BxGxSxh[:, :, 0::2], values_BxGxSxh[:, :, 1::2]], axis=-1)


def quantize(x):
    """(codes, scale): the steps of absmax / 127, rounded up to bfloat16, at least 2^-100."""
    x = x.astype(np.float32)
    absmax = np.abs(x).max(axis=-1)
    fine = np.isfinite(absmax)
    least = np.maximum(absmax / np.float32(127), np.float32(2.0**-100))
    with np.errstate(all="ignore"):
        scale = least.astype(BF16)
        scale = np.where(scale.astype(np.float32) < least, np.nextafter(scale, BF16(np.inf)), scale)
        codes = np.rint(x * (np.float32(1) / scale.astype(np.float32))[..., None])
    scale = np.where(fine, scale, BF16(np.nan)).astype(BF16)
    return np.where(fine[..., None], codes, 0).astype(np.int8), scale


def store(qkv, turn, positions, *cache):
    """The cache after the tokens, to the bit; tokens at positions outside of it are not in it."""
    keys, values = cache[:2]
    G, S = keys.shape[1], keys.shape[2] * 64
    slots, values, scales = slots_of(keys), values.copy(), [x.copy() for x in cache[2:]]
    turned = rotate(qkv[:, :, :-G], turn)[:, :, -G:]
    for (b, t), p in np.ndenumerate(positions):
        if not 0 <= p < S:
            continue
        if not scales:
            slots[b, :, p] = turned[b, t].astype(keys.dtype)
            values[b, :, p] = qkv[b, t, -G:].astype(values.dtype)
        else:
            slots[b, :, p], scales[0][b, :, 0, p] = quantize(turned[b, t])
            values[b, :, p // 2, :, p % 2], scales[0][b, :, 1, p] = quantize(qkv[b, t, -G:])
    return blocks_of(slots), values, *scales


def numbers(*cache):
    """Keys and values that a cache stands for, [B, G, S, h] in float64."""
    keys, values = slots_of(cache[0]).astype(np.float64), cache[1].astype(np.float64)
    if len(cache) == 2:
        return keys, values
    values = values.swapaxes(3, 4).reshape(keys.shape)
    scales = cache[2].astype(np.float64)
    return keys * scales[:, :, 0, :, None], values * scales[:, :, 1, :, None]


def cached_attention(qkv, turn, positions, *cache):
    """(mixed, error, *cache): mixed in float64, |float32 result - mixed| <= error.

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

    Over an int8 cache, an implementation may moreover round queries to 1/32767 of their largest
    element, and weights times the values' scales to 1/32767 of the largest of 64 slots: half a
    step each, sum |k| max|q| / 65534 of a score, and max(w s_v) / 65534 sum |v| / s_v of mixed.
    """
    B, T, N, h = qkv.shape
    G, S = cache[0].shape[1], cache[0].shape[2] * 64
    H = N - 2 * G
    cache = store(qkv, turn, positions, *cache)
    k_BxGxSxh, v_BxGxSxh = numbers(*cache)
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
            if len(cache) == 3:
                half_step = np.abs(q[b, :, head]).max(axis=1, keepdims=True) / 65534
                relative += half_step * np.abs(k).sum(axis=1) / UNIT
            relative = weights * (relative + np.where(hidden_TxS, 0, below))
            off = _product(relative, np.abs(v).T) + relative.sum(1, keepdims=True) * np.abs(out)
            off += (2 * n_Tx1 + 8 * steps + 16) * magnitude
            floor = np.exp(-87.0) * 2 * n_Tx1 * np.abs(v).max()
            if len(cache) == 3:
                scale = cache[2][b, head // (H // G), 1].astype(np.float64)
                most = (weights * scale).reshape(T, S // 64, 64).max(axis=2)
                codes = np.abs(v / scale[:, None]).reshape(S // 64, 64, h).sum(axis=1)
                off += _product(most, codes.T) / 65534 / UNIT
            mixed[b, :, head], error[b, :, head] = out, 1.01 * off * UNIT + floor
    if qkv.dtype == BF16:
        error += (np.abs(mixed) + error) * 2.0**-8
    shape = (B, T, H * h)
    return mixed.reshape(shape), error.reshape(shape), *cache


def _product(a_NxK, b_MxK):
    """`a @ b.T` without BLAS, whose threads wait for each other where processors are few."""
    return np.einsum("nk,mk->nm", a_NxK, b_MxK)
