"""Time the packed ternary product, kernel by kernel, against the limits of the machine.

The limits are measured in the same run: reading memory (a float32 sum over a large array) bounds
one row, where every weight is read once for one multiply-add. Weights are cycled through copies
that together exceed the last-level cache, as the layers of a large model are.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitjax import __version__, terminal
from bitjax.ops import ffi, packed_matmul
from bitjax.packing import PackedWeights, pack

CYCLED_BYTES = 256 * 2**20  # of weights, several times a last-level cache
REPEATS = 7  # timed passes over the cycle; the median is reported


def bench(rows: int, cols: int, batch_sizes: Sequence[int]) -> None:
    """Print one table row per kernel and batch size, then the same as one line of JSON.

    Raises:
        ValueError: a size below 1.
        ModuleNotFoundError: the extension is not installed.
    """
    if min(rows, cols, *batch_sizes) < 1:
        raise ValueError(f"sizes must be 1 or more; got {rows} x {cols}, rows {batch_sizes}")
    bandwidth = read_bandwidth()
    results = [
        _measure(kernel, rows, cols, m, bandwidth)
        for m in batch_sizes
        for kernel in (*ffi.kernels(), "reference")
    ]
    terminal.table(
        ("kernel", "rows", "us a product", "spread", "weights GB/s", "of read limit", "GOP/s"),
        [
            (
                r["kernel"], r["rows"], f"{r['microseconds']:.1f}",
                f"{r['fastest']:.1f}-{r['slowest']:.1f}", f"{r['weight_gb_per_s']:.1f}",
                f"{r['of_read_bandwidth']:.0%}", f"{r['gop_per_s']:.0f}",
            )
            for r in results
        ],
        title=f"{rows} x {cols} ternary weights; memory read {bandwidth / 1e9:.1f} GB/s",
    )  # fmt: skip
    document = {
        "version": __version__,
        "machine": platform.processor() or platform.machine(),
        "shape": [rows, cols],
        "read_gb_per_s": bandwidth / 1e9,
        "results": results,
    }
    print(json.dumps(document))


def read_bandwidth() -> float:
    """Bytes per second that XLA reads from memory with all its threads; best of several."""
    array = jnp.ones((CYCLED_BYTES // 4096, 1024), jnp.float32)
    total = jax.jit(lambda x: jnp.max(x, axis=1))
    return array.nbytes / min(_timings(lambda: total(array), 8))


def _measure(kernel: str, rows: int, cols: int, m: int, bandwidth: float) -> dict[str, Any]:
    weights = _weights(rows, cols, 8 if kernel == "reference" else None)
    x = jax.random.normal(jax.random.key(0), (m, cols))
    impl = "reference" if kernel == "reference" else "ffi"

    @jax.jit
    def cycle(x: jax.Array, weights: list[PackedWeights]) -> jax.Array:
        y = jnp.zeros((m, rows))
        for w in weights:  # each product waits for the one before, as layers do
            y = packed_matmul(x + 0 * y[:, :1], w, impl=impl)  # type: ignore[arg-type]
        return y

    ffi.force_kernel(None if kernel == "reference" else kernel)
    try:
        seconds = [t / len(weights) for t in _timings(lambda: cycle(x, weights), REPEATS)]
    finally:
        ffi.force_kernel(None)
    median = statistics.median(seconds)
    nbytes = weights[0].codes.nbytes
    return {
        "kernel": kernel,
        "rows": m,
        "microseconds": median * 1e6,
        "fastest": min(seconds) * 1e6,
        "slowest": max(seconds) * 1e6,
        "weight_gb_per_s": nbytes / median / 1e9,
        "of_read_bandwidth": nbytes / median / bandwidth,
        "gop_per_s": 2 * m * rows * cols / median / 1e9,
    }


def _weights(rows: int, cols: int, copies: int | None) -> list[PackedWeights]:
    """Copies of one random matrix, in distinct memory, that exceed the caches (or `copies`)."""
    generator = np.random.default_rng(0)
    packed = pack(generator.integers(-1, 2, (rows, cols), np.int8), 1.0)
    copies = copies or max(2, min(256, CYCLED_BYTES // packed.codes.nbytes))
    return [
        dataclasses.replace(packed, codes=jnp.array(packed.codes, copy=True)) for _ in range(copies)
    ]


def _timings(call: Callable[[], jax.Array], repeats: int) -> list[float]:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return seconds
