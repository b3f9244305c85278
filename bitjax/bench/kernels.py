"""Time the packed product, kernel by kernel, against the limits of the machine.

The limits are measured in the same run: reading memory bounds one row, where every weight is read
once for one multiply-add; integer dot products bound many. Weights are cycled through copies that
together exceed the last-level cache, as the layers of a large model are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitjax import terminal
from bitjax.bench.ceilings import dot_peak, read_bandwidth, threads
from bitjax.bench.machine import machine
from bitjax.ops import ffi, packed_matmul
from bitjax.packing import LAYOUTS, LayoutName, PackedWeights, multiplier_shape, pack

CYCLED_BYTES = 200 * 2**20  # of weights, several times a last-level cache
REPEATS = 7  # timed passes over the cycle; the median is reported


def bench_kernels(
    rows: int,
    cols: int,
    batch_sizes: Sequence[int],
    layouts: Sequence[LayoutName],
    workers: int | None = None,
) -> dict[str, Any]:
    """Print one table row per layout, kernel and batch size; the same as one line of JSON.

    Args:
        rows, cols: output and input features.
        batch_sizes: rows of activations.
        layouts: of the weights.
        workers: threads; all that this process may use if None.

    Raises:
        ValueError: a size below 1.
        ModuleNotFoundError: the extension is not installed.
    """
    if min(rows, cols, *batch_sizes) < 1:
        raise ValueError(f"sizes must be 1 or more; got {rows} x {cols}, rows {batch_sizes}")
    results = []
    with contextlib.ExitStack() as stack:
        stack.callback(ffi.set_threads, ffi.set_threads(workers))
        stack.callback(ffi.force_kernel, None)
        workers = workers or threads()
        bandwidth = read_bandwidth(workers)
        for kernel in ffi.kernels():
            ffi.force_kernel(kernel)
            peak = dot_peak(workers)
            for layout in layouts:
                weights = _weights(rows, cols, layout)
                results += [
                    _measure(kernel, weights, m, bandwidth, peak)
                    for m in batch_sizes
                    if kernel != "scalar" or m <= SCALAR_ROWS
                ]
    terminal.table(
        ("kernel", "layout", "rows", "us", "GB/s", "GOP/s"),
        [
            (
                r["kernel"],
                r["layout"],
                r["rows"],
                f"{r['microseconds']:.0f} ({r['fastest']:.0f}-{r['slowest']:.0f})",
                f"{r['gb_per_s']:.1f} ({r['of_read']:.0%})",
                f"{r['gop_per_s']:.0f} ({r['of_peak']:.0%})",
            )
            for r in results
        ],
        title=f"{rows} x {cols} weights, {workers} threads; "
        f"memory reads {bandwidth / 1e9:.1f} GB/s",
    )
    document = {
        **machine(),
        "threads": workers,
        "shape": [rows, cols],
        "read_gb_per_s": bandwidth / 1e9,
        "results": results,
    }
    print(json.dumps(document))
    return document


SCALAR_ROWS = 8  # more would take minutes


def _measure(
    kernel: str, weights: list[PackedWeights], m: int, bandwidth: float, peak: float
) -> dict[str, Any]:
    rows, cols = weights[0].shape
    nbytes = weights[0].codes.nbytes
    used = weights if m <= 8 and kernel != "scalar" else weights[:4]
    x = jax.random.normal(jax.random.key(0), (m, cols))

    @jax.jit
    def cycle(x: jax.Array, weights: list[PackedWeights]) -> jax.Array:
        y = jnp.zeros((m, rows))
        for w in weights:  # each product waits for the one before, as layers do
            y = packed_matmul(x + 0 * y[:, :1], w, impl="ffi")
        return y

    seconds = [t / len(used) for t in _timings(lambda: cycle(x, used), REPEATS)]
    median = statistics.median(seconds)
    return {
        "kernel": kernel,
        "layout": weights[0].layout,
        "rows": m,
        "microseconds": median * 1e6,
        "fastest": min(seconds) * 1e6,
        "slowest": max(seconds) * 1e6,
        "gb_per_s": nbytes / median / 1e9,
        "of_read": nbytes / median / bandwidth,
        "gop_per_s": 2 * m * rows * cols / median / 1e9,
        "of_peak": 2 * m * rows * cols / median / peak,
    }


def _weights(rows: int, cols: int, layout: LayoutName) -> list[PackedWeights]:
    """Copies of one random matrix, in distinct memory, that exceed the caches."""
    generator = np.random.default_rng(0)
    about = LAYOUTS[layout]
    multipliers = None
    if about.group_blocks:
        multipliers = np.full((rows, multiplier_shape(rows, cols)[1]), 7, np.uint8)
    w = generator.integers(about.low, about.high + 1, (rows, cols), np.int8)
    packed = pack(w, 1.0, layout, multipliers)
    copies = max(4, min(256, CYCLED_BYTES // packed.codes.nbytes))
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
