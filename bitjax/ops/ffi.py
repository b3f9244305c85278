"""The ternary product as XLA custom calls on CPU: registration, shape checks, kernel choice.

    y = dequant(q) @ dequant(W)^T,   dequant(q) = q * x_scale,   dequant(W) = (code - 1) * w_scale

The arithmetic is stated in ffi/kernel.h and ffi/epilogue.h, the code layout in
ffi/packed_format.h (whose Python twin is bitjax/packing.py). This is the only importer of
`bitjax._ffi`, and it imports it on first use, so that `import bitjax` works without the extension.

Dimensions: M rows of activations, K input features, N output features (`rows` of the weight
matrix), NB = ceil(N/16), KB = ceil(K/16).

Deliberately absent: any fallback (that choice is `bitjax.ops`'), gradients (packed weights are for
inference), and platforms other than CPU.
"""

from __future__ import annotations

import functools
import math
import threading
from types import ModuleType

import jax
import jax.numpy as jnp

_MODULE = "bitjax._ffi"
_lock = threading.Lock()


@functools.cache
def _extension() -> ModuleType | None:
    """Imports the extension and registers its custom calls; None when it is not installed.

    Only the absence of `bitjax._ffi` itself counts as "not installed". A build that is there but
    does not load raises its own ImportError.
    """
    try:
        import bitjax._ffi as extension
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        return None
    for name, capsule in extension.registrations().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return extension


def _load() -> ModuleType:
    with _lock:  # functools.cache alone would let two threads register
        extension = _extension()
    if extension is None:
        raise ModuleNotFoundError(
            f"{_MODULE} is not installed: install bitjax with a C++17 compiler present "
            "(pip install .), or use the reference implementation",
            name=_MODULE,
        )
    return extension


def available() -> bool:
    """Whether the extension is installed. Raises ImportError if it is installed but broken."""
    with _lock:
        return _extension() is not None


def kernels() -> tuple[str, ...]:
    """Names of the kernels this machine can run, fastest first."""
    return tuple(_load().kernels_available())


def active_kernel() -> str:
    """Name of the kernel that products use now.

    Raises ValueError when the environment variable BITJAX_KERNEL names a kernel that is unknown
    or that this machine cannot run.
    """
    return str(_load().active_kernel())


def force_kernel(name: str | None) -> None:
    """Makes every product of this process use one kernel; None lifts the force.

    Process state that is read when a product runs: compiled functions follow it too. Raises
    ValueError, and changes nothing, when the kernel is unknown or this machine cannot run it.
    """
    _load().force_kernel(name)


def kernel_calls() -> dict[str, int]:
    """How many products each compiled kernel has run in this process so far."""
    return dict(_load().kernel_calls())


def _check_codes(where: str, codes: jax.Array, features: int, rows: int, max_inputs: int) -> None:
    if codes.dtype != jnp.uint8:
        raise ValueError(f"{where}: codes wanted uint8, got {codes.dtype}")
    if rows < 0:
        raise ValueError(f"{where}: rows wanted >= 0, got {rows}")
    if features > max_inputs:
        raise ValueError(f"{where}: x wanted at most {max_inputs} features, got {features}")
    wanted = (-(-rows // 16), -(-features // 16), 64)
    if codes.shape != wanted:
        raise ValueError(
            f"{where}: codes wanted shape {wanted} for rows={rows} and x with {features} features, "
            f"got {codes.shape}"
        )


def ternary_matmul(x: jax.Array, codes: jax.Array, scale: jax.Array, *, rows: int) -> jax.Array:
    """Quantises x per row to int8, multiplies with packed ternary weights, scales the result.

    Args:
      x: [..., K], float32 or bfloat16. A row with a NaN or an infinity gives a row of NaN.
      codes: [NB, KB, 64] uint8, packed weights [N, K].
      scale: [] float32; multiplies the weights.
      rows: N, the output features; static.

    Returns:
      [..., N] in x's dtype.

    Raises:
      ValueError: a shape or dtype is not as above (at trace time), or BITJAX_KERNEL names a kernel
        this machine cannot run (at run time).
      ModuleNotFoundError: the extension is not installed.
    """
    where = "ternary_matmul"
    extension = _load()
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{where}: x wanted float32 or bfloat16, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"{where}: x wanted shape [..., K], got {x.shape}")
    if scale.dtype != jnp.float32 or scale.shape != ():
        raise ValueError(f"{where}: scale wanted float32 (), got {scale.dtype} {scale.shape}")
    *lead, features = x.shape
    _check_codes(where, codes, features, rows, extension.MAX_INPUTS)
    x_MxK = x.reshape(math.prod(lead), features)
    call = jax.ffi.ffi_call(
        "bitjax_ternary_matmul",
        jax.ShapeDtypeStruct((x_MxK.shape[0], rows), x.dtype),
        vmap_method="expand_dims",
    )
    return call(x_MxK, codes, scale).reshape(*lead, rows)


def ternary_matmul_i32(x_q: jax.Array, codes: jax.Array, *, rows: int) -> jax.Array:
    """The exact integer product of int8 activations and packed ternary weights.

    Args:
      x_q: [..., K] int8, any values in -128..127.
      codes: [NB, KB, 64] uint8, packed weights [N, K].
      rows: N, the output features; static.

    Returns:
      [..., N] int32.

    Raises:
      ValueError, ModuleNotFoundError: as `ternary_matmul`.
    """
    where = "ternary_matmul_i32"
    extension = _load()
    if x_q.dtype != jnp.int8:
        raise ValueError(f"{where}: x_q wanted int8, got {x_q.dtype}")
    if x_q.ndim < 1:
        raise ValueError(f"{where}: x_q wanted shape [..., K], got {x_q.shape}")
    *lead, features = x_q.shape
    _check_codes(where, codes, features, rows, extension.MAX_INPUTS)
    q_MxK = x_q.reshape(math.prod(lead), features)
    call = jax.ffi.ffi_call(
        "bitjax_ternary_matmul_i32",
        jax.ShapeDtypeStruct((q_MxK.shape[0], rows), jnp.int32),
        vmap_method="expand_dims",
    )
    return call(q_MxK, codes).reshape(*lead, rows)
