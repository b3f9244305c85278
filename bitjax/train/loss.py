"""Next-token cross-entropy, a part of the positions at a time where all logits would be many.

Of `[B, T, V]` logits only `[B, C, V]` exist at once, C a divisor of T. Their gradients are taken
while they are there, in the forward pass, as sums over parts

    d loss / d table = sum_c (softmax(logits_c) - onehot_c).T @ hidden_c

so nothing is computed twice, and what is kept for the backward pass is as large as hidden states
and table. Where all logits are few they are one part, in the plain form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

# Logits of a part, at most: 16 MiB of float32. A batch of bytes (16 x 256 tokens, V = 256) is one
# part; of a vocabulary of 128k a part is 32 tokens.
PART = 2**22

Logits = Callable[[jax.Array, jax.Array], jax.Array]  # hidden [..., D], table [V, D] -> [..., V]


def positions_at_once(batch: int, length: int, vocabulary: int) -> int:
    """The largest divisor C of `length` with `batch * C * vocabulary <= PART`; at least 1."""
    fitting = max(PART // (batch * vocabulary), 1)
    return max(c for c in range(1, min(fitting, length) + 1) if length % c == 0)


def cross_entropy(
    logits_BxTxV: jax.Array, targets_BxT: jax.Array, counted_BxT: jax.Array | None = None
) -> jax.Array:
    """Mean next-token cross-entropy in nats, float32, over all targets or those that count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, targets_BxT)
    if counted_BxT is None:
        return losses.mean()
    return losses.sum(where=counted_BxT) / jnp.maximum(counted_BxT.sum(), 1)


def next_token_loss(
    logits: Logits,
    hidden_BxTxD: jax.Array,
    table_VxD: jax.Array,
    targets_BxT: jax.Array,
    counted_BxT: jax.Array | None = None,
) -> jax.Array:
    """`cross_entropy` of the head's logits, which are never all there at once if they are many.

    Args:
        logits: the head, of hidden states and the table: float32.
        hidden_BxTxD: final hidden states.
        table_VxD: of the head.
        targets_BxT: int32, the next tokens.
        counted_BxT: bool, which of them count; None: all.
    """
    B, T = targets_BxT.shape
    C = positions_at_once(B, T, len(table_VxD))
    if C == T:
        return cross_entropy(logits(hidden_BxTxD, table_VxD), targets_BxT, counted_BxT)
    count = B * T if counted_BxT is None else jnp.maximum(counted_BxT.sum(), 1)
    counted = jnp.ones((B, T), bool) if counted_BxT is None else counted_BxT
    return _summed(logits, C, hidden_BxTxD, table_VxD, targets_BxT, counted) / count


def _losses(
    logits: Logits, hidden: jax.Array, table_VxD: jax.Array, targets: jax.Array
) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(hidden, table_VxD), targets)


def _parts(C: int, x: jax.Array) -> jax.Array:
    """`[B, T, ...]` as `[T / C, B, C, ...]`."""
    return jnp.moveaxis(x.reshape(len(x), -1, C, *x.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    logits: Logits, C: int, hidden_BxTxD: jax.Array, table_VxD: jax.Array, targets_BxT: jax.Array,
    counted_BxT: jax.Array,
) -> jax.Array:  # fmt: skip
    """The sum of the losses that count, C positions at a time."""

    def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden, targets, counted = part
        return total + _losses(logits, hidden, table_VxD, targets).sum(where=counted), None

    parts = tuple(_parts(C, x) for x in (hidden_BxTxD, targets_BxT, counted_BxT))
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)[0]


def _summed_forward(
    logits: Logits, C: int, hidden_BxTxD: jax.Array, table_VxD: jax.Array, targets_BxT: jax.Array,
    counted_BxT: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # fmt: skip
    def add(
        sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        hidden, targets, counted = part

        def summed(hidden: jax.Array, table: jax.Array) -> jax.Array:
            return _losses(logits, hidden, table, targets).sum(where=counted)

        loss, (d_hidden, d_table) = jax.value_and_grad(summed, (0, 1))(hidden, table_VxD)
        return (sums[0] + loss, sums[1] + d_table), d_hidden

    parts = tuple(_parts(C, x) for x in (hidden_BxTxD, targets_BxT, counted_BxT))
    zeros = (jnp.zeros((), jnp.float32), jnp.zeros_like(table_VxD))
    (loss, d_table), d_hidden = jax.lax.scan(add, zeros, parts)
    return loss, (jnp.moveaxis(d_hidden, 0, 1).reshape(hidden_BxTxD.shape), d_table)


def _summed_backward(
    logits: Logits, C: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_table = kept
    return (gradient * d_hidden).astype(d_hidden.dtype), gradient * d_table, None, None


_summed.defvjp(_summed_forward, _summed_backward)
