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
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    return hidden, table, targets, jnp.asarray(rng.random((B, T)) < 0.7)


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_parts_give_the_loss_and_gradients_of_the_whole(monkeypatch, some):
    hidden, table, targets, counted = operands()
    counted = counted if some else None

    def whole(hidden, table):
        return loss.cross_entropy(HEAD(hidden, table), targets, counted)

    def parts(hidden, table):
        return 3 * loss.next_token_loss(HEAD, hidden, table, targets, counted)

    monkeypatch.setattr(loss, "PART", 2 * 4 * 20)
    value, gradients = jax.jit(jax.value_and_grad(parts, (0, 1)))(hidden, table)
    wanted, expected = jax.value_and_grad(whole, (0, 1))(hidden, table)
    np.testing.assert_allclose(value, 3 * wanted, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(parts)(hidden, table), value, rtol=1e-6)  # no gradients
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, 3 * b, rtol=1e-5, atol=1e-6)


def test_all_logits_never_exist_where_they_are_many(monkeypatch):
    hidden, table, targets, _ = operands()
    step = jax.value_and_grad(functools.partial(loss.next_token_loss, HEAD), (0, 1))
    assert "2x12x20xf32" in jax.jit(step).lower(hidden, table, targets).as_text()
    monkeypatch.setattr(loss, "PART", 2 * 4 * 20)
    text = jax.jit(lambda *x: step(*x)).lower(hidden, table, targets).as_text()
    assert "2x4x20xf32" in text
    assert "2x12x20xf32" not in text


@pytest.mark.parametrize(
    ("batch", "length", "vocabulary", "wanted"),
    [(16, 256, 256, 256), (16, 256, 4096, 64), (8, 100, 128_256, 4), (8, 97, 128_256, 1)],
)
def test_parts_divide_the_length(batch, length, vocabulary, wanted):
    assert loss.positions_at_once(batch, length, vocabulary) == wanted
