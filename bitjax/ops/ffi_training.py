"""The custom calls of a training step on CPU: shapes of results and of memory to work in.

The arithmetic is stated in ffi/training.h and ffi/training_attention.h; `bitjax.ops.training` and
`bitjax.ops.training_attention` give the calls their gradients. Shapes and dtypes are checked by the
calls, which raise ValueError when the program runs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bitjax.ops import ffi

_BLOCK, _CHUNKS = 64, 32  # kAttentionBlock, kWantedChunks of ffi/
_ROW, _PANEL, _STRIP = 64, 64, 48  # kRowPadding, kPanelColumns, kStripRows of ffi/


def train_forward(
    x_MxK: jax.Array, w_NxK: jax.Array, w_scale_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`bitjax.ops.training`'s forward pass: y float32 `[M, N]`, q int8 `[M, K']`, scales `[M]`.

    K' is K rounded up to 64; q is zero there.
    """
    ffi.load()
    (M, K), N = x_MxK.shape, len(w_NxK)
    padded = -(-K // _ROW) * _ROW
    scratch = _panel_bytes(N, -(-K // 4)) + 4 * M
    call = jax.ffi.ffi_call(
        "bitjax_train_forward",
        (
            jax.ShapeDtypeStruct((M, N), jnp.float32),
            jax.ShapeDtypeStruct((M, padded), jnp.int8),
            jax.ShapeDtypeStruct((M,), jnp.float32),
            jax.ShapeDtypeStruct((scratch,), jnp.uint8),
        ),
        vmap_method="sequential",
    )
    y, q, x_scale, _ = call(x_MxK, w_NxK, w_scale_N)
    return y, q, x_scale


def train_backward(
    dy_MxN: jax.Array, q: jax.Array, x_scale_M: jax.Array, w_NxK: jax.Array, w_scale_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`bitjax.ops.training`'s backward pass: dx `[M, K]` and `bf16(dy * s_x).T @ q`, `[N, K]`."""
    ffi.load()
    (M, N), K = dy_MxN.shape, w_NxK.shape[1]
    m, n = -(-M // 2), -(-N // 2)
    rows = -(-M * n * 4 // 64) * 64
    strips = -(-N // _STRIP) * _STRIP * m * 4
    call = jax.ffi.ffi_call(
        "bitjax_train_backward",
        (
            jax.ShapeDtypeStruct((M, K), jnp.float32),
            jax.ShapeDtypeStruct((N, K), jnp.float32),
            jax.ShapeDtypeStruct(
                (rows + strips + _panel_bytes(K, n) + _panel_bytes(K, m),), jnp.uint8
            ),
        ),
        vmap_method="sequential",
    )
    dx, dw, _ = call(dy_MxN, q, x_scale_M, w_NxK, w_scale_N)
    return dx, dw


def train_attention(
    num_heads: int, qkv_BxTxNxh: jax.Array, turn_BxTxh: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`bitjax.ops.training_attention`, forward: out `[B, T, H h]` and rows `[B, H, 2, T]`."""
    ffi.load()
    B, T, _, h = qkv_BxTxNxh.shape
    call = jax.ffi.ffi_call(
        "bitjax_train_attention",
        (
            jax.ShapeDtypeStruct((B, T, num_heads * h), jnp.float32),
            jax.ShapeDtypeStruct((B, num_heads, 2, T), jnp.float32),
        ),
        vmap_method="sequential",
    )
    out, rows = call(qkv_BxTxNxh, turn_BxTxh, segments)
    return out, rows


def train_attention_backward(
    qkv_BxTxNxh: jax.Array,
    turn_BxTxh: jax.Array,
    segments: jax.Array,
    out_BxTxHh: jax.Array,
    rows_BxHx2xT: jax.Array,
    d_out_BxTxHh: jax.Array,
) -> jax.Array:
    """`bitjax.ops.training_attention`, backward: the gradient of qkv."""
    ffi.load()
    B, T, N, h = qkv_BxTxNxh.shape
    H = rows_BxHx2xT.shape[1]
    G = (N - H) // 2
    parts = min(H // G * -(-T // _BLOCK), -(-_CHUNKS // max(B * G, 1)))
    call = jax.ffi.ffi_call(
        "bitjax_train_attention_backward",
        (
            jax.ShapeDtypeStruct(qkv_BxTxNxh.shape, jnp.float32),
            jax.ShapeDtypeStruct((B * G * parts * 2 * T * h * (parts > 1),), jnp.float32),
        ),
        vmap_method="sequential",
    )
    gradient, _ = call(qkv_BxTxNxh, turn_BxTxh, segments, out_BxTxHh, rows_BxHx2xT, d_out_BxTxHh)
    return gradient


def _panel_bytes(columns: int, groups: int) -> int:
    return -(-columns // _PANEL) * _PANEL * groups * 4
