"""Model FLOPs, and the machine's peak that MFU is a fraction of.

MFU ("PaLM", arXiv 2204.02311, appendix B) counts what the model needs, whatever is recomputed:

    FLOPs per trained token = 6 N + 12 L H h T

N: weights that multiply (linear layers and head, not the embedding's look-up); 6 for one product
forward and two backward; the second term for attention's two products over T positions, the causal
half not taken off.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

from bitjax.config import DType, ModelConfig

SIDE = 1024  # of the measured product: 12 MB of float32, 2 GFLOP, so milliseconds even when slow
ROUNDS = 5


def multiplying_weights(config: ModelConfig) -> int:
    """Weights of all linear layers and the head."""
    D, F, h = config.hidden_size, config.intermediate_size, config.head_dim
    attention = D * h * (2 * config.num_heads + 2 * config.num_kv_heads)
    return config.num_layers * (attention + 3 * D * F) + D * config.vocab_size


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Of one trained token in a sequence of `seq_len`, forward and backward."""
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * seq_len
    return 6.0 * multiplying_weights(config) + attention


@functools.cache
def measured_peak(dtype: DType) -> float:
    """FLOP/s of this device's dense product, the best of a few; measured once a process."""
    x = jnp.ones((SIDE, SIDE), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return float(2 * SIDE**3 / min(seconds))
