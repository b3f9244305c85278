"""Causal attention of a training step by custom calls, with a backward pass of its own.

    q', k'  = turn(q) / sqrt(h), turn(k)          rotary positions, half-split (arXiv 2104.09864)
    out[q]  = sum_s softmax_s(q'[q] . k'[s]) v[s]     s <= q, of the same segment

Nothing of the size of `[T, T]` is in memory: forward keeps the result and two numbers a row, its
scores' maximum and the sum of exponentials; backward, scores are computed again (FlashAttention,
arXiv 2205.14135). Everything is float32. ffi/training_attention.h has the arithmetic;
`bitjax.ops.reference` the same in pure JAX (`rotate`, `attend`).

Deliberately absent: a KV cache (`bitjax.ops.cached_attention`), other dtypes and platforms, and
gradients of the rotation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from bitjax.ops import ffi, ffi_training

_Kept = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]  # operands, out, rows


def train_attention(
    qkv_BxTxNxh: jax.Array,
    turn_BxTxh: jax.Array,
    segments_BxT: jax.Array | None,
    num_heads: int,
) -> jax.Array:
    """Causal attention of whole sequences, positions included; see the module's docstring.

    Args:
        qkv_BxTxNxh: float32, heads of queries, then of keys, then as many of values, not turned;
            h a multiple of 16 up to 512 (`bitjax.ops.attention_fits`).
        turn_BxTxh: float32 cosines, then sines; see `bitjax.ops.reference.rotate`.
        segments_BxT: int32; a token attends to its own segment only. None: all are of one.
        num_heads: of queries.

    Returns:
        float32 `[B, T, num_heads * h]`. A NaN or infinite score makes its row NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        ModuleNotFoundError: the extension is not installed.
    """
    B, _, N, _ = qkv_BxTxNxh.shape
    keys = N - num_heads
    if not 0 < num_heads < N or keys % 2 or num_heads % (keys // 2):
        raise ValueError(
            f"train_attention: {N} heads are not {num_heads} of queries and as many of keys as of "
            "values, which divide them"
        )
    if qkv_BxTxNxh.dtype != jnp.float32:
        raise ValueError(f"train_attention: qkv wanted float32, got {qkv_BxTxNxh.dtype}")
    if segments_BxT is None:
        segments_BxT = jnp.zeros((B, 0), jnp.int32)
    return _attention(num_heads, qkv_BxTxNxh, turn_BxTxh, segments_BxT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    num_heads: int, qkv_BxTxNxh: jax.Array, turn_BxTxh: jax.Array, segments: jax.Array
) -> jax.Array:
    return ffi_training.train_attention(num_heads, qkv_BxTxNxh, turn_BxTxh, segments)[0]


def _forward(
    num_heads: int, qkv_BxTxNxh: jax.Array, turn_BxTxh: jax.Array, segments: jax.Array
) -> tuple[jax.Array, _Kept]:
    out, rows = ffi_training.train_attention(num_heads, qkv_BxTxNxh, turn_BxTxh, segments)
    return out, (qkv_BxTxNxh, turn_BxTxh, segments, out, rows)


def _backward(num_heads: int, kept: _Kept, d_out: jax.Array) -> tuple[jax.Array, None, None]:
    del num_heads  # the shape of `out` says it
    return ffi_training.train_attention_backward(*kept, d_out), None, None


_attention.defvjp(_forward, _backward)


def require_available() -> None:
    """Refuse a machine that cannot run `train_attention`.

    Raises:
        ValueError: the default backend is not a CPU, or the extension is not installed.
    """
    if jax.default_backend() != "cpu":
        missing = f"runs on CPU; JAX's default backend is {jax.default_backend()}"
    elif not ffi.available():
        missing = "needs the extension bitjax._ffi, which is not installed"
    else:
        return
    raise ValueError(f"train.attention='fused' {missing}; 'xla' runs everywhere")
