"""The loss in parts against the loss at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitjax.model import float_logits
from bitjax.train import loss

HEAD = functools.partial(float_logits, dtype=jnp.dtype("float32"))


def operands(B=2, T=12, D=8, V=20):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    table = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    return hidden, table, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def test_parts_give_the_losses_and_gradients_of_the_whole(monkeypatch):
    hidden, table, targets = operands()
    weights_BxT = jnp.asarray(np.random.default_rng(1).standard_normal(targets.shape))

    def whole(hidden, table):
        chances = jax.nn.log_softmax(hidden @ table.T)
        return -jnp.take_along_axis(chances, targets[..., None], -1)[..., 0]

    def parts(hidden, table):
        return loss.next_token_losses(HEAD, hidden, table, targets)

    def of(losses):
        return lambda *x: (weights_BxT * losses(*x)).sum()

    monkeypatch.setattr(loss, "PART", 2 * 4 * 20)
    np.testing.assert_allclose(jax.jit(parts)(hidden, table), whole(hidden, table), rtol=1e-5)
    gradients = jax.jit(jax.grad(of(parts), (0, 1)))(hidden, table)
    for a, b in zip(gradients, jax.grad(of(whole), (0, 1))(hidden, table), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_all_logits_never_exist_where_they_are_many(monkeypatch):
    operand = operands()

    def step(*x):
        return jax.grad(lambda *x: loss.next_token_losses(HEAD, *x).sum(), (0, 1))(*x)

    assert "2x12x20xf32" in jax.jit(step).lower(*operand).as_text()
    monkeypatch.setattr(loss, "PART", 2 * 4 * 20)
    text = jax.jit(lambda *x: step(*x)).lower(*operand).as_text()
    assert "2x4x20xf32" in text
    assert "2x12x20xf32" not in text


@pytest.mark.parametrize(
    ("batch", "length", "vocabulary", "wanted"),
    [(16, 256, 256, 256), (16, 256, 4096, 64), (8, 100, 128_256, 4), (8, 97, 128_256, 1)],
)
def test_parts_divide_the_length(batch, length, vocabulary, wanted):
    assert loss.positions_at_once(batch, length, vocabulary) == wanted
