"""AdamW with the two-stage learning rate and weight decay of `OptimizerConfig`.

Weight decay applies to the weights of BitLinear layers only: not to norms, embedding or head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bitjax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """`lr(t)` of `OptimizerConfig` for t in 0..steps-1."""
    boundary = config.stage_two_at * steps
    peak = _staged(config.learning_rate, config.stage_two_learning_rate, boundary)

    def schedule(t: Any) -> jax.Array:
        t = jnp.asarray(t, jnp.float32)
        warmup = jnp.minimum(1.0, (t + 1) / max(config.warmup_steps, 1))
        left = jnp.maximum(0.0, 1 - t / steps)
        falling = left if config.falling == "linear" else (1 - jnp.cos(jnp.pi * left)) / 2
        return peak(t) * warmup * falling

    return schedule


def weight_decay(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Decay coefficient at step t; AdamW multiplies it by the learning rate."""
    at = config.weight_decay_stage_two_at
    boundary = (config.stage_two_at if at is None else at) * steps
    return _staged(config.weight_decay, config.stage_two_weight_decay, boundary)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW under both schedules (arXiv 1711.05101)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=weight_decay(config, steps),
            mask=decay_mask,
        ),
    )


def decay_mask(params: Any) -> Any:
    """A pytree like `params`: True where weight decay applies (the weights of BitLinear)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "weight" in _keys(path), params)


def _keys(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]


def _staged(first: float, second: float | None, boundary: float) -> optax.Schedule:
    second = first if second is None else second
    return lambda t: jnp.where(jnp.asarray(t) < boundary, first, second)
