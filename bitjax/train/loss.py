"""Losses of next tokens, a part of the positions at a time where all logits would be many.

Of `[B, T, V]` logits only `[B, C, V]` exist at once, C a divisor of T: a part's are made again in
the backward pass, which costs the head's product once more. Where all logits are few they are one
part, in the plain form.
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


def next_token_losses(
    logits: Logits, hidden_BxTxD: jax.Array, table_VxD: jax.Array, targets_BxT: jax.Array
) -> jax.Array:
    """Negative log-likelihoods of the next tokens, in nats.

    Args:
        logits: the head, of hidden states and the table: float32.
        hidden_BxTxD: final hidden states.
        table_VxD: of the head.
        targets_BxT: int32, the next tokens.

    Returns:
        float32 `[B, T]`.
    """
    B, T = targets_BxT.shape
    C = positions_at_once(B, T, len(table_VxD))
    losses = functools.partial(_losses, logits)
    if C == T:
        return losses(table_VxD, hidden_BxTxD, targets_BxT)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, -1, C, *x.shape[2:]), 1, 0)

    part = functools.partial(jax.checkpoint(losses), table_VxD)
    parts = jax.lax.map(lambda x: part(*x), (cut(hidden_BxTxD), cut(targets_BxT)))
    return jnp.moveaxis(parts, 0, 1).reshape(B, T)


def _losses(
    logits: Logits, table_VxD: jax.Array, hidden: jax.Array, targets: jax.Array
) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(hidden, table_VxD), targets)
