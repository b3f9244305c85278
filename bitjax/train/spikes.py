"""Steps that must not be applied: NaN, and losses or gradient norms far above the recent median.

    spike = not finite(loss), or not finite(norm),
            or loss > factor * median(losses), or norm > factor * median(norms)

over the last `spike_window` steps that were no spikes; the two comparisons only once there were as
many. All inside the compiled step: a bad update never reaches the parameters.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from bitjax.config import TrainConfig

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What the last steps were like: a pytree, part of the training state.

    Attributes:
        losses, norms: float32 `[spike_window]`, a ring; NaN where there was no step yet.
        accepted: int32 scalar, steps that were no spikes.
        in_a_row: int32 scalar, spikes since the last of those.
    """

    losses: jax.Array
    norms: jax.Array
    accepted: jax.Array
    in_a_row: jax.Array


def new_guard(config: TrainConfig) -> Guard | None:
    """The guard before the first step; None if the loop's own look at the loss is enough."""
    if config.on_spike == "stop" and config.spike_factor is None:
        return None
    zero = jnp.zeros((), jnp.int32)
    # Two arrays, not one twice: the step donates each.
    losses, norms = (jnp.full(config.spike_window, jnp.nan, jnp.float32) for _ in range(2))
    return Guard(losses, norms, zero, zero + 0)


def judge(guard: Guard, loss: jax.Array, norm: jax.Array, factor: float | None) -> jax.Array:
    """Whether a step of this loss and gradient norm is a spike: bool scalar."""
    spike = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    if factor is None:
        return spike
    # Medians of a ring that is not full are NaN: comparisons with them are False.
    above = (loss > factor * jnp.median(guard.losses)) | (norm > factor * jnp.median(guard.norms))
    return spike | above


def noted(guard: Guard, loss: jax.Array, norm: jax.Array, spike: jax.Array) -> Guard:
    """The guard after a step; a spike leaves the medians as they are."""
    place = guard.accepted % guard.losses.size
    return Guard(
        jnp.where(spike, guard.losses, guard.losses.at[place].set(loss)),
        jnp.where(spike, guard.norms, guard.norms.at[place].set(norm)),
        guard.accepted + ~spike,
        jnp.where(spike, guard.in_a_row + 1, 0),
    )


def unless(spike: jax.Array, new: T, old: T) -> T:
    """`new`, or after a spike `old` where it is of floats: counters, hence schedules, go on."""

    def choose(n: jax.Array, o: jax.Array) -> jax.Array:
        return jnp.where(spike, o, n) if jnp.issubdtype(n.dtype, jnp.floating) else n

    return jax.tree.map(choose, new, old)
