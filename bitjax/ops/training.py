"""The product of a BitLinear layer in training, with a backward pass of its own.

    q, s_x  = int8_per_token(x)
    y       = (q @ w.T) * (s_x * s_w)                        w: codes -1, 0, 1, as float32
    dx      = bf16(dy * s_w) @ w                             straight through the quantisation of x
    dw      = bf16(dy * s_x).T @ q * s_w
    ds_w[n] = sum_k (bf16(dy * s_x).T @ q)[n, k] * w[n, k]

Forward it is exact: the integers' sum, scaled once, is what the pure float32 form in
`bitjax.model.layers` gives. Backward, codes are exact in bfloat16, so the only thing rounded but
for float32 sums is the gradient: 8 bits of it, to nearest even, as in mixed precision training
(arXiv 1710.03740). Sums are float32.

Deliberately absent: other quantisers of activations than int8, and scales for groups of weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bitjax.ops import ffi, ffi_training
from bitjax.quant import int8_per_token

_Kept = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # q, s_x, w, s_w


@jax.custom_vjp
def bit_product(x_MxK: jax.Array, w_NxK: jax.Array, w_scale_N: jax.Array) -> jax.Array:
    """`int8(x) @ w.T`, rescaled, by the custom calls; see the module's docstring.

    Args:
        x_MxK: float32.
        w_NxK: codes -1, 0 and 1 as float32; other values give wrong results.
        w_scale_N: float32.

    Returns:
        float32 `[M, N]`.

    Raises:
        ValueError: when the program runs, shapes or dtypes that do not fit, or a processor
            without the instructions (`require_available`).
        ModuleNotFoundError: the extension is not installed.
    """
    return ffi_training.train_forward(x_MxK, w_NxK, w_scale_N)[0]


def _forward(x_MxK: jax.Array, w_NxK: jax.Array, w_scale_N: jax.Array) -> tuple[jax.Array, _Kept]:
    y, q, x_scale = ffi_training.train_forward(x_MxK, w_NxK, w_scale_N)
    return y, (q, x_scale, w_NxK, w_scale_N)


def _backward(kept: _Kept, dy_MxN: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, x_scale, w, w_scale = kept
    dx, dw = ffi_training.train_backward(dy_MxN, q, x_scale, w, w_scale)
    return dx, dw * w_scale[:, None], (dw * w).sum(-1)


bit_product.defvjp(_forward, _backward)


@jax.custom_vjp
def bit_product_reference(x_MxK: jax.Array, w_NxK: jax.Array, w_scale_N: jax.Array) -> jax.Array:
    """`bit_product` in pure JAX: any backend."""
    return _reference_forward(x_MxK, w_NxK, w_scale_N)[0]


def _reference_forward(
    x_MxK: jax.Array, w_NxK: jax.Array, w_scale_N: jax.Array
) -> tuple[jax.Array, _Kept]:
    q, x_scale = int8_per_token(x_MxK)
    sums = jnp.matmul(q, w_NxK.T, precision="highest")
    return sums * (x_scale * w_scale_N[None, :]), (q, x_scale[:, 0], w_NxK, w_scale_N)


def _reference_backward(kept: _Kept, dy_MxN: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, x_scale, w, w_scale = kept

    def rounded(scale: jax.Array) -> jax.Array:
        return (dy_MxN * scale).astype(jnp.bfloat16).astype(jnp.float32)

    dx = jnp.matmul(rounded(w_scale[None, :]), w, precision="highest")
    dw = jnp.matmul(rounded(x_scale[:, None]).T, q, precision="highest")
    return dx, dw * w_scale[:, None], (dw * w).sum(-1)


bit_product_reference.defvjp(_reference_forward, _reference_backward)


def require_available() -> None:
    """Refuse a machine that cannot run `bit_product`.

    Raises:
        ValueError: the default backend is not a CPU, the extension is not installed, or the
            processor lacks the instructions.
    """
    if jax.default_backend() != "cpu":
        missing = f"runs on CPU; JAX's default backend is {jax.default_backend()}"
    elif not ffi.available():
        missing = "needs the extension bitjax._ffi, which is not installed"
    elif not ffi.training_products():
        missing = "needs a processor with AVX-512 BF16 and VNNI instructions"
    else:
        return
    raise ValueError(f"train.products='integer' {missing}; 'xla' runs everywhere")
