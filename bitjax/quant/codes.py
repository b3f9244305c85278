"""What all quantisers share: codes with a scale, the straight-through gradient, finite inputs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Smallest absmean or absmax: keeps an all-zero tensor's scale finite and its codes zero.
EPS = 1e-5
# Largest number of int8 x {-1,0,1} products whose float32 sum is exact: 2**24 / 128.
EXACT_FLOAT32_TERMS = 2**24 // 128


class Quantized(NamedTuple):
    """`dequant = codes * scale`; codes are float32 integers, scale broadcasts against them."""

    codes: jax.Array
    scale: jax.Array

    def dequantize(self) -> jax.Array:
        """The real values the codes stand for, float32."""
        return self.codes * self.scale

    def softened(self, value: jax.Array, strength: jax.Array) -> Quantized:
        """Quantised by a share only: `dequant = value + strength * (codes * scale - value)`.

        At strength 1 the codes are untouched, to the bit; at 0 they are `value / scale`. Gradients
        are those of the same sum, so with straight-through codes the identity.

        Args:
            value: what was quantised.
            strength: lambda in 0..1, a scalar that may be traced.
        """
        real = value.astype(jnp.float32) / self.scale
        return Quantized(self.codes + (1 - strength) * (real - self.codes), self.scale)


def rounded(value: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The nearest integer, ties to even; with a key one of the two neighbours, drawn.

        round(x) = floor(x) + 1 with probability f, else floor(x)      f = x - floor(x)

    Its mean is x (but for 2^-23, the step of the draws) and its variance f (1 - f); integers stay.

    Source: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv 1502.02551.

    Args:
        value: float32.
        key: of the draws, independent for every element; they depend on it and the shape alone.
    """
    if key is None:
        return jnp.round(value)
    below = jnp.floor(value)
    return below + (jax.random.uniform(key, value.shape) < value - below)


def straight_through(value: jax.Array, quantized: jax.Array) -> jax.Array:
    """`quantized` in the forward pass (exactly), the gradient of `value` in the backward pass.

    Exact, unlike `value + stop_gradient(quantized - value)`, because `value - value` is zero.
    """
    return jax.lax.stop_gradient(quantized) + (value - jax.lax.stop_gradient(value))


def require_finite(name: str, array: jax.Array | np.ndarray) -> None:
    """Refuse a concrete array that holds NaN or an infinity.

    Raises:
        ValueError: naming the array, how many of its values are not finite, and the first.
    """
    array = np.asarray(array)
    flat = array.reshape(-1)
    # Part by part, in the cache: a table of bfloat16 would take twice its size more as float32.
    parts = (flat[i : i + 2**18] for i in range(0, flat.size, 2**18))
    if not all(np.isfinite(part.astype(np.float32)).all() for part in parts):
        bad = ~np.isfinite(array.astype(np.float32))
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} holds {int(bad.sum())} values that are not finite, the first at index "
            f"{first}; weights must be finite to be quantised"
        )
