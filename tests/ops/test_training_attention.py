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
from bitjax.ops import ffi, ffi_training, reference
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


def size_turned(x, cos, sin):
    """The sum of magnitudes of what a rotation adds up."""
    a, b = np.split(np.abs(x), 2, -1)
    cos, sin = np.abs(cos), np.abs(sin)
    return np.concatenate([a * cos + b * sin, b * cos + a * sin], -1)


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
            q_size = size_turned(x[b, :, head], cos[b], sin[b]) / np.sqrt(h)
            k_size = size_turned(x[b, :, g], cos[b], sin[b])
            s = np.where(seen, q @ k.T, -np.inf)
            s_error = (h + 12) * U * (q_size @ k_size.T) * seen
            p = np.exp(s - s.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            # Its own score's error and the others' through the total, the subtraction from the
            # maximum, exponentials (one a block, for what is summed shrinks), the total's sum.
            lowest = np.where(seen, s, np.inf).min(-1, keepdims=True)
            relative = (
                2 * s_error.max(-1, keepdims=True) + 2 * U * (s.max(-1, keepdims=True) - lowest)
                + (T // 64 + 3) * EXP + (T + 4) * U
            )  # fmt: skip
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
                dp_error + delta_error + 2 * U * (np.abs(dp) + np.abs(delta))
            )  # fmt: skip

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
                bound[b, :, at] += size_turned(error + 6 * U * np.abs(value), cos[b], sin[b])
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
    check(qkv, turn, None, H, d_out)


def documents(*lengths):
    return np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)


@pytest.mark.parametrize(
    "segments",
    [
        np.arange(70),  # every token by itself
        np.zeros(70),
        documents(1, 1, 63, 1, 4),
        documents(64, 6),  # a whole block unseen
        documents(10, 56, 1, 3) % 2,  # a document that goes on after another
        -documents(30, 40),
        [7, 3] * 35,
    ],
)
def test_segments_are_apart(segments):
    qkv, turn, d_out = operands(2, 70, 2, 1, 32, seed=1)
    both = np.stack([segments, documents(20, 45, 5)]).astype(np.int32)
    check(qkv, turn, both, 2, d_out)


def test_a_token_by_itself_gives_its_value_and_its_gradient_goes_there_alone():
    qkv, turn, d_out = operands(1, 130, 2, 2, 16)
    segments = np.arange(130, dtype=np.int32)[None]
    y, back = computed(qkv, turn, segments, 2, d_out)
    np.testing.assert_array_equal(y.reshape(1, 130, 2, 16), qkv[:, :, 4:])
    np.testing.assert_array_equal(back[:, :, 4:], d_out.reshape(1, 130, 2, 16))
    assert np.abs(back[:, :, :4]).max() < 1e-5  # d_out . v - d_out . out, rounded


def test_segments_that_are_one_change_no_bit():
    qkv, turn, d_out = operands(2, 130, 2, 1, 48)
    for found, wanted in zip(
        computed(qkv, turn, np.full((2, 130), 5, np.int32), 2, d_out),
        computed(qkv, turn, None, 2, d_out),
        strict=True,
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("size", [1e-8, 10, 100, 1e4])
def test_extreme_scores(size):
    """Scores of up to 1e9: weights of one and nothing, and nothing overflows."""
    qkv, turn, d_out = operands(1, 130, 2, 1, 32, size=size)
    y, back = computed(qkv, turn, None, 2, d_out)
    assert np.isfinite(y).all()
    assert np.isfinite(back).all()
    largest = np.abs(qkv[:, :, 3]).max() * (1 + 1e-5)
    assert np.abs(y).max() <= largest
    if size <= 10:
        check(qkv, turn, None, 2, d_out)


@pytest.mark.parametrize("kernel", ffi.kernels() if ffi.available() else ())
def test_every_kernel(kernel):
    qkv, turn, d_out = operands(1, 77, 4, 2, 48, seed=2)
    ffi.force_kernel(kernel)
    try:
        check(qkv, turn, documents(20, 50, 7)[None], 4, d_out)
    finally:
        ffi.force_kernel(None)


@pytest.mark.parametrize("B", [1, 17])  # parts that are joined, and one a head
def test_results_do_not_depend_on_the_number_of_threads(B):
    given = *operands(B, 150, 2, 2, 16)[:2], None, 2, operands(B, 150, 2, 2, 16)[2]
    wanted = computed(*given)
    before = bitjax.set_threads(1)
    try:
        found = computed(*given)
    finally:
        bitjax.set_threads(before)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_reference_has_the_same_gradients():
    qkv, turn, d_out = operands(2, 70, 4, 2, 32)
    positions = jnp.broadcast_to(jnp.arange(70), (2, 70))
    segments = jnp.asarray(np.stack([documents(70), documents(33, 37)]))

    def plain(x):
        q, k = jnp.split(reference.rotate(x[:, :, :6], jnp.asarray(turn)), [4], axis=2)
        k, v = k.transpose(0, 2, 1, 3), x[:, :, 6:].transpose(0, 2, 1, 3)
        return reference.attend(q, k, v, positions, segments)

    def both(x, d_out):
        wanted, back = jax.vjp(plain, x)
        return wanted, back(d_out)[0]

    wanted, expected = jax.jit(both)(qkv, d_out)
    y, gradient = computed(qkv, turn, segments, 4, d_out)
    np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_no_scores_are_in_memory():
    qkv, turn, d_out = operands(1, 257, 2, 2, 16)

    def step(x):
        y, back = jax.vjp(lambda x: train_attention(x, turn, None, 2), x)
        return y, back(d_out)

    text = jax.jit(step).lower(qkv).compile().as_text()
    assert "bitjax_train_attention_backward" in text
    assert "257,257" not in text


@pytest.mark.parametrize(("head", "bad"), [(0, np.nan), (2, np.nan), (3, np.inf), (4, np.nan)])
def test_what_is_not_finite_is_not_hidden(head, bad):
    """Of a query, key or value at position 66: rows of the blocks before it are as they were."""
    qkv, turn, d_out = operands(1, 130, 2, 1, 16)  # heads: queries 0, 1, key 2, value 3
    clean, _ = computed(qkv, turn, None, 2, d_out)
    if head == 4:
        d_out[0, 66, 3] = bad
    else:
        qkv[0, 66, head, 5] = bad
    y, gradient = computed(qkv, turn, None, 2, d_out)
    np.testing.assert_array_equal(y[0, :64], clean[0, :64])
    assert np.isfinite(y[0, 66]).all() == (head == 4)
    assert not np.isfinite(gradient[0, 66]).all()
    if head == 2:
        assert np.isnan(y[0, 66:]).all()


def test_heads_that_do_not_fit_are_refused():
    qkv, turn, _ = operands(1, 4, 2, 1, 16)
    with pytest.raises(ValueError, match="4 heads are not 3 of queries and as many of keys as of"):
        train_attention(jnp.asarray(qkv), jnp.asarray(turn), None, 3)
    with pytest.raises(ValueError, match="qkv wanted float32, got bfloat16"):
        train_attention(jnp.asarray(qkv, jnp.bfloat16), jnp.asarray(turn), None, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turn": np.ones((1, 5, 16), np.float32)}, r"turn: wanted \[1, 4, 16\], got \[1, 5, 16\]"),
        ({"segments": np.ones((1, 3), np.int32)}, r"segments: wanted \[1, 4 or 0\], got \[1, 3\]"),
        ({"segments": np.ones((1, 4), np.float32)}, "segments: wanted s32, got f32"),
        ({"qkv": np.ones((1, 4, 4, 24), np.float32)}, "heads of a multiple of 16 up to 512"),
    ],
)
def test_wrong_operands_are_refused(change, message):
    qkv, turn, _ = operands(1, 4, 2, 1, 16)
    given = {"qkv": qkv, "turn": turn, "segments": np.ones((1, 4), np.int32)} | change
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        jax.block_until_ready(ffi_training.train_attention(2, *given.values()))


def test_machines_that_cannot_are_told(monkeypatch):
    monkeypatch.setattr(ffi, "available", lambda: False)
    with pytest.raises(ValueError, match=r"train\.attention='fused' needs the extension"):
        require_available()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="fused' runs on CPU; JAX's default backend is gpu"):
        require_available()
