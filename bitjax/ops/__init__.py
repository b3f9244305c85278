"""Accelerated operations: one public function each, a pure-JAX twin, and a custom call.

`impl` is static:

    "auto"       the custom call on CPU where the extension is built, the reference elsewhere;
                 decided when the program is lowered, so the same function lowers for a GPU
    "ffi"        the custom call, or an error
    "reference"  pure JAX
"""

from __future__ import annotations

from typing import Literal

import jax

from bitjax.ops import ffi, reference
from bitjax.packing import PackedTernary

Impl = Literal["auto", "ffi", "reference"]


def ternary_matmul(x: jax.Array, weights: PackedTernary, impl: Impl = "auto") -> jax.Array:
    """Product of int8-quantised activations with packed ternary weights.

    `y = (int8_per_token(x) @ weights.T)` rescaled; see `bitjax.ops.reference` for the equations.

    Args:
        x: float32 or bfloat16 `[..., K]`.
        weights: packed N x K.
        impl: which implementation, see the module's docstring.

    Returns:
        `[..., N]` in x's dtype.

    Raises:
        ValueError: K differs from `weights.cols`, an unsupported dtype, or an unknown `impl`.
        ModuleNotFoundError: `impl="ffi"` without the extension.
    """
    if x.ndim < 1 or x.shape[-1] != weights.cols:
        raise ValueError(
            f"ternary_matmul: x has shape {x.shape}; its last axis must be the "
            f"{weights.cols} input features of the {weights.rows} x {weights.cols} weights"
        )

    def accelerated(x: jax.Array, weights: PackedTernary) -> jax.Array:
        return ffi.ternary_matmul(x, weights.codes, weights.scale, rows=weights.rows)

    if impl == "reference" or (impl == "auto" and not ffi.available()):
        return reference.ternary_matmul(x, weights)
    if impl == "ffi":
        return accelerated(x, weights)
    if impl != "auto":
        raise ValueError(f"impl={impl!r} is not auto, ffi or reference")
    return jax.lax.platform_dependent(x, weights, cpu=accelerated, default=reference.ternary_matmul)
