"""XLA custom calls on CPU: registration, kernel choice, and the calls of inference.

The arithmetic is stated in ffi/kernel.h and ffi/epilogue.h, the layouts of codes in
ffi/packed_format.h (whose Python twin is bitjax/packing.py). This is the only importer of
`bitjax._ffi`, and it imports it on first use, so that `import bitjax` works without the extension.

Deliberately absent: any fallback (that choice is `bitjax.ops`'), gradients (the calls of training
are `bitjax.ops.ffi_training`'s), and platforms other than CPU.
"""

from __future__ import annotations

import functools
import math
import threading
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from bitjax.packing import LAYOUTS, PackedWeights, Screen

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


def load() -> ModuleType:
    """The extension, its custom calls registered.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
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
    return tuple(load().kernels_available())


def active_kernel() -> str:
    """Name of the kernel that products use now.

    Raises ValueError when the environment variable BITJAX_KERNEL names a kernel that is unknown
    or that this machine cannot run.
    """
    return str(load().active_kernel())


def force_kernel(name: str | None) -> None:
    """Makes every product of this process use one kernel; None lifts the force.

    Process state that is read when a product runs: compiled functions follow it too. Raises
    ValueError, and changes nothing, when the kernel is unknown or this machine cannot run it.
    """
    load().force_kernel(name)


def kernel_calls() -> dict[str, int]:
    """How many products each compiled kernel has run in this process so far."""
    return dict(load().kernel_calls())


def set_threads(threads: int | None) -> int | None:
    """`bitjax.set_threads`; returns the limit until now."""
    before: int | None = load().set_threads(threads)
    return before


def attention_calls() -> dict[str, int]:
    """How many times each compiled kernel has run cached attention in this process so far."""
    return dict(load().attention_calls())


def dot_rounds(rounds: int) -> int:
    """Runs rounds of independent integer dot products in registers; returns their multiply-adds."""
    return int(load().dot_rounds(rounds))


def read_all(array: np.ndarray) -> int:
    """Reads every byte of a flat uint8 array with wide loads; returns a number that folds them."""
    return int(load().read_all(array))


_GATES = {"none": 0, "relu2": 1, "silu": 2}


def packed_matmul(
    x: jax.Array,
    weights: PackedWeights,
    gate: str = "none",
    norm: jax.Array | None = None,
    eps: float = 0.0,
    residual: jax.Array | None = None,
    rows: jax.Array | None = None,
) -> jax.Array:
    """`bitjax.ops.packed_matmul` by the active kernel.

    A row with a NaN or an infinity gives a row of NaN. Shapes are checked by the custom call.

    Raises:
      ValueError: x is neither float32 nor bfloat16; or, when the program runs, shapes or dtypes
        that do not fit, or BITJAX_KERNEL names a kernel this machine cannot run.
      ModuleNotFoundError: the extension is not installed.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"packed_matmul: x wanted float32 or bfloat16, got {x.dtype}")
    return _call(
        "bitjax_packed_matmul", x, weights, x.dtype, norm, residual, rows,
        gate=np.int64(_GATES[gate]), eps=np.float32(eps),
    )  # fmt: skip


def packed_matmul_i32(q: jax.Array, weights: PackedWeights) -> jax.Array:
    """The exact integer product of int8 `[..., K]` and packed weights: int32 `[..., N]`.

    Raises:
      ValueError: q is not int8; otherwise as `packed_matmul`.
    """
    if q.dtype != jnp.int8:
        raise ValueError(f"packed_matmul_i32: q wanted int8, got {q.dtype}")
    return _call("bitjax_packed_matmul_i32", q, weights, jnp.dtype(jnp.int32), None, None, None)


def _call(
    name: str,
    x: jax.Array,
    weights: PackedWeights,
    dtype: jnp.dtype,
    norm: jax.Array | None,
    residual: jax.Array | None,
    wanted: jax.Array | None,
    **attributes: np.generic,
) -> jax.Array:
    load()
    *lead, features = x.shape
    rows = math.prod(lead)
    multipliers = weights.multipliers
    if multipliers is None:
        multipliers = jnp.zeros((0, 0, 0), jnp.uint8)
    columns = weights.columns
    if columns is None:
        columns = jnp.zeros((0, 0, 0), jnp.uint8)
    if norm is None:
        norm = jnp.zeros((0,), jnp.float32)
    residual_dtype = x.dtype if x.dtype != jnp.int8 else jnp.float32
    if residual is None:
        residual = jnp.zeros((rows, 0), residual_dtype)
    else:
        residual = residual.reshape(rows, weights.rows)
    if wanted is None:
        wanted = jnp.zeros((0,), jnp.int32)
    call = jax.ffi.ffi_call(
        name, jax.ShapeDtypeStruct((rows, weights.rows), dtype), vmap_method="expand_dims"
    )
    y = call(
        x.reshape(rows, features), weights.codes, multipliers, weights.scale.reshape(-1), norm,
        residual, columns, wanted, layout=np.int64(LAYOUTS[weights.layout].number), **attributes,
    )  # fmt: skip
    return y.reshape(*lead, weights.rows)


def cached_attention(
    qkv_BxTxNxh: jax.Array, turn_BxTxh: jax.Array, positions_BxT: jax.Array, *cache: jax.Array
) -> tuple[jax.Array, ...]:
    """`bitjax.ops.cached_attention` by the active kernel; the cache is updated in place if donated.

    Raises:
      ValueError: when the program runs, shapes or dtypes that do not fit.
      ModuleNotFoundError: the extension is not installed.
    """
    load()
    B, T, N, h = qkv_BxTxNxh.shape
    heads = N - 2 * cache[0].shape[1]
    mixed = jax.ShapeDtypeStruct((B, T, heads * h), qkv_BxTxNxh.dtype)
    call = jax.ffi.ffi_call(
        "bitjax_attention" if len(cache) == 2 else "bitjax_attention_int8",
        (mixed, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache)),
        input_output_aliases={3 + i: 1 + i for i in range(len(cache))},
        vmap_method="sequential",
    )
    return tuple(call(qkv_BxTxNxh, turn_BxTxh, positions_BxT, *cache))


def screened_logits(
    x: jax.Array,
    parts: jax.Array,
    approximate: jax.Array,
    table_VxD: jax.Array,
    screen: Screen,
    ranks: jax.Array,
    allowed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`bitjax.ops.reference.screened_logits` that reads only the rows of the table it needs.

    With `allowed`, uint32 `[rows, ceil(V / 32)]`, ranks count the tokens alone whose bits are set.

    Raises:
      ValueError: when the program runs, shapes or dtypes that do not fit.
      ModuleNotFoundError: the extension is not installed.
    """
    load()
    *lead, D = x.shape
    rows, P, V = math.prod(lead), parts.shape[-2], table_VxD.shape[0]
    call = jax.ffi.ffi_call(
        "bitjax_screened_logits",
        (
            jax.ShapeDtypeStruct((rows, V), jnp.float32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
        ),
        vmap_method="sequential",
    )
    logits, computed = call(
        x.astype(jnp.float32).reshape(rows, D), parts.reshape(rows, *parts.shape[-2:]),
        approximate.reshape(rows, P, V), table_VxD, screen.dither, screen.weights.scale,
        screen.spreads, screen.norms, ranks.reshape(rows),
        jnp.zeros((0, 0), jnp.uint32) if allowed is None else allowed,
    )  # fmt: skip
    return logits.reshape(*lead, V), computed.reshape(lead)


def paged_attention(
    qkv_RxNxh: jax.Array,
    turn_Rxh: jax.Array,
    positions_R: jax.Array,
    sequences_R: jax.Array,
    tables_QxN: jax.Array,
    count_1: jax.Array,
    *cache: jax.Array,
) -> tuple[jax.Array, ...]:
    """`bitjax.ops.rows.paged_attention` by the active kernel; the cache in place if donated.

    Raises:
      ValueError: when the program runs, shapes or dtypes that do not fit, or numbers of rows,
        sequences or pages out of range.
      ModuleNotFoundError: the extension is not installed.
    """
    load()
    R, N, h = qkv_RxNxh.shape
    heads = N - 2 * cache[0].shape[1]
    mixed = jax.ShapeDtypeStruct((R, heads * h), qkv_RxNxh.dtype)
    call = jax.ffi.ffi_call(
        "bitjax_paged_attention" if len(cache) == 2 else "bitjax_paged_attention_int8",
        (mixed, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache)),
        input_output_aliases={6 + i: 1 + i for i in range(len(cache))},
        vmap_method="sequential",
    )
    return tuple(call(qkv_RxNxh, turn_Rxh, positions_R, sequences_R, tables_QxN, count_1, *cache))


def prepare(
    x_RxK: jax.Array, gate: str, norm: jax.Array | None, eps: float, count_1: jax.Array
) -> jax.Array:
    """`bitjax.ops.rows.prepare` by the active kernel.

    Raises:
      ValueError: when the program runs, shapes or dtypes that do not fit.
      ModuleNotFoundError: the extension is not installed.
    """
    load()
    R, width = x_RxK.shape
    shape = jax.ShapeDtypeStruct((R, width if gate == "none" else width // 2), x_RxK.dtype)
    norm = jnp.zeros((0,), jnp.float32) if norm is None else norm
    call = jax.ffi.ffi_call("bitjax_prepare", shape, vmap_method="sequential")
    return call(x_RxK, norm, count_1, gate=np.int64(_GATES[gate]), eps=np.float32(eps))


def float_matmul(x_RxK: jax.Array, table_NxK: jax.Array, count_1: jax.Array) -> jax.Array:
    """`bitjax.ops.rows.float_matmul` by the active kernel.

    Raises:
      ValueError: when the program runs, shapes or dtypes that do not fit.
      ModuleNotFoundError: the extension is not installed.
    """
    load()
    shape = jax.ShapeDtypeStruct((len(x_RxK), len(table_NxK)), jnp.float32)
    call = jax.ffi.ffi_call("bitjax_float_matmul", shape, vmap_method="sequential")
    return call(x_RxK, table_NxK, count_1)


def screen_parts(x_RxD: jax.Array, screen: Screen, count_1: jax.Array) -> jax.Array:
    """`int8_parts(screen.expand(x), 1)`, float32 `[R, 1, E]`, by the active kernel.

    Raises:
      ValueError: when the program runs, shapes or dtypes that do not fit.
      ModuleNotFoundError: the extension is not installed.
    """
    load()
    shape = jax.ShapeDtypeStruct((len(x_RxD), 1, screen.weights.cols), jnp.float32)
    call = jax.ffi.ffi_call("bitjax_screen_parts", shape, vmap_method="sequential")
    return call(x_RxD.astype(jnp.float32), screen.dither, count_1)


def sample(logits: np.ndarray, *operands: np.ndarray) -> None:
    """Draws tokens; operands as of `sample` in ffi/module.cc, the last four of them results.

    Raises:
      ValueError: sizes that do not fit, or numbers out of range.
      ModuleNotFoundError: the extension is not installed.
    """
    load().sample(logits, *operands)


def sample_rows(
    logits_RxV: jax.Array, floats_Rx3: jax.Array, integers_Rx8: jax.Array, count_1: jax.Array
) -> jax.Array:
    """`sample` in a program: tokens int32 `[R]` of the first `count` rows, as no edit changes them.

    Operands as of `bitjax_sample` in ffi/handlers_sampling.cc.

    Raises:
      ValueError: when the program runs, shapes or dtypes that do not fit.
      ModuleNotFoundError: the extension is not installed.
    """
    load()
    shape = jax.ShapeDtypeStruct((len(logits_RxV),), jnp.int32)
    call = jax.ffi.ffi_call("bitjax_sample", shape, vmap_method="sequential")
    return call(logits_RxV, floats_Rx3, integers_Rx8, count_1)


def noise(seed: int, sample: int, position: int) -> float:
    """The number in (0, 1) that decides the token of this position; see ffi/sampling.h."""
    return float(load().noise(seed, sample, position))


def training_products() -> bool:
    """Whether this machine can run the products of a training step."""
    return bool(load().training_products())
