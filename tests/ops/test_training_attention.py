"""Attention of a training step against NumPy in float64, forward and analytic backward.

Bounds: every number compared comes with the sum of magnitudes it was summed from. With u = 2^-24, a
float32 sum of n products is off by at most (n + 1) u times that sum, in any order; what goes into a
product carries the errors of what it was computed from, so they are followed from line to line.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bitjax
from bitjax.ops import ffi, reference
from bitjax.ops.training_attention import require_available, train_attention

needs_extension = pytest.mark.skipif(not ffi.available(), reason="the extension is not installed")
pytestmark = needs_extension
U = 2.0**-24
EXP = 4 * U  # of an exponential, relative: 2 units in the last place


def operands(B, T, H, G, h, seed=0, size=1.0):
    """qkv, turns of real positions, and a gradient of the result."""
    rng = np.random.default_rng(seed)
    qkv = (size * rng.standard_normal((B, T, H + 2 * G, h))).astype(np.float32)
    angles = np.arange(T)[:, None] * 10000.0 ** (-np.arange(h // 2) / (h // 2))
    turn = np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    d_out = rng.standard_normal((B, T, H * h)).astype(np.float32)
    return qkv, np.ascontiguousarray(np.broadcast_to(turn, (B, T, h))), d_out


def turned(x, cos, sin):
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def oracle(qkv, turn, segments, H, d_out):
    """Result and gradient in float64, each with a bound of a float32 computation's error."""
    B, T, N, h = qkv.shape
    G = (N - H) // 2
    x, d = qkv.astype(np.float64), d_out.astype(np.float64).reshape(B, T, H, h)
    cos, sin = np.split(turn.astype(np.float64), 2, -1)
    out, out_bound = np.zeros((B, T, H, h)), np.zeros((B, T, H, h))
    gradient, bound = np.zeros(x.shape), np.zeros(x.shape)
    for b in range(B):
        seen = np.tril(np.ones((T, T), bool))
        if segments is not None:
            seen &= segments[b][:, None] == segments[b][None, :]
        for head in range(H):
            g = H + head // (H // G)
            v, dy = x[b, :, g + G], d[b, :, head]
            q = turned(x[b, :, head], cos[b], sin[b]) / np.sqrt(h)
            k = turned(x[b, :, g], cos[b], sin[b])
            # Sizes of what a rotation sums; it rounds each term and the sum, and scales.
            q_size = turned(np.abs(x[b, :, head]), np.abs(cos[b]), -np.abs(sin[b]))
            q_size = np.maximum(np.abs(q_size), np.abs(turned(np.abs(x[b, :, head]),
                                np.abs(cos[b]), np.abs(sin[b])))) / np.sqrt(h)  # fmt: skip
            k_size = np.maximum(
                np.abs(turned(np.abs(x[b, :, g]), np.abs(cos[b]), -np.abs(sin[b]))),
                np.abs(turned(np.abs(x[b, :, g]), np.abs(cos[b]), np.abs(sin[b]))),
            )
            s = np.where(seen, q @ k.T, -np.inf)
            s_error = (h + 12) * U * (q_size @ k_size.T) * seen
            p = np.exp(s - s.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            # Its own score's error, the others' through the total, subtraction, exponential, sum.
            relative = 2 * s_error.max(-1, keepdims=True) + 4 * U * np.ptp(
                np.where(seen, s, s.max(-1, keepdims=True)), axis=-1)[:, None] + EXP * (T // 64 + 3) + (T + 4) * U  # fmt: skip
            p_error = p * np.expm1(relative) + seen * 1e-37
            y = p @ v
            y_error = p_error @ np.abs(v) + (T + 4) * U * (p @ np.abs(v))
            out[b, :, head], out_bound[b, :, head] = y, y_error
            dp = dy @ v.T
            dp_error = (h + 1) * U * (np.abs(dy) @ np.abs(v).T)
            delta = (dy * y).sum(-1, keepdims=True)
            delta_error = (np.abs(dy) * (y_error + (h + 1) * U * np.abs(y))).sum(-1, keepdims=True)
            e = p * (dp - delta)
            e_error = p_error * (np.abs(dp) + np.abs(delta) + dp_error + delta_error) + p * (
                dp_error + delta_error + 2 * U * (np.abs(dp) + np.abs(delta)))  # fmt: skip

            def summed(a, a_error, b, b_error):
                size = np.abs(a) @ np.abs(b)
                return a @ b, a_error @ np.abs(b) + np.abs(a) @ b_error + (T + 2) * U * size

            dv, dv_error = summed(p.T, p_error.T, dy, 0 * dy)
            dk, dk_error = summed(e.T, e_error.T, q, 6 * U * q_size)
            dq, dq_error = summed(e, e_error, k, 6 * U * k_size)
            for at, value, error in (
                (head, dq / np.sqrt(h), dq_error / np.sqrt(h)), (g, dk, dk_error),
            ):  # fmt: skip
                gradient[b, :, at] += turned(value, cos[b], -sin[b])
                size = error + 6 * U * np.abs(value)
                bound[b, :, at] += np.maximum(*(
                    np.abs(turned(size, np.abs(cos[b]), sign * np.abs(sin[b]))) for sign in (-1, 1)
                ))  # fmt: skip
            gradient[b, :, g + G] += dv
            bound[b, :, g + G] += dv_error
    merged = (B, T, H * h)
    return out.reshape(merged), out_bound.reshape(merged), gradient, bound


def computed(qkv, turn, segments, H, d_out):
    """Result and gradient by the custom calls."""
    given = None if segments is None else jnp.asarray(segments)
    y, back = jax.vjp(lambda x: train_attention(x, turn, given, H), jnp.asarray(qkv))
    return np.asarray(y), np.asarray(back(jnp.asarray(d_out))[0])


def check(qkv, turn, segments, H, d_out):
    y, y_bound, gradient, bound = oracle(qkv, turn, segments, H, d_out)
    found, back = computed(qkv, turn, segments, H, d_out)
    worst = np.max(np.abs(found - y) / y_bound), np.max(np.abs(back - gradient) / bound)
    assert max(worst) <= 1, worst
    return worst


# B, T, H, G, h: remainders of tiles (6 rows), vectors (16) and blocks (64); groups of 1, 2 and 4;
# heads of every number of vectors of a strip, and of several strips.
SHAPES = [
    (2, 1, 2, 1, 16), (1, 2, 1, 1, 32), (1, 5, 2, 2, 48), (3, 17, 4, 1, 64), (1, 63, 4, 2, 16),
    (1, 64, 2, 2, 80), (1, 65, 1, 1, 128), (1, 127, 4, 4, 16), (1, 255, 2, 1, 16),
    (1, 256, 1, 1, 64), (2, 257, 4, 2, 32), (9, 70, 4, 4, 16), (1, 7, 1, 1, 512), (0, 4, 2, 2, 16),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradient_are_numpys(shape):
    H = shape[2]
    qkv, turn, d_out = operands(*shape)
    if shape[0] == 0:
        found, back = computed(qkv, turn, None, H, d_out)
        assert (found.shape, back.shape) == (d_out.shape, qkv.shape)
        return
    print(check(qkv, turn, None, H, d_out))
