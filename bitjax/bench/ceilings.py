"""What the machine can do at this moment: memory reads and integer dot products.

Both are measured with the instructions of the active kernel, but without its work: a plain read of
an array several times as large as the caches, and dot products whose operands stay in registers.
"""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Callable

import numpy as np

from bitjax.ops import ffi

READ_BYTES = 2**28  # several times a last-level cache
DOT_ROUNDS = 2_000_000  # some ms
REPEATS = 5


def threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth(workers: int) -> float:
    """Bytes per second that `workers` threads together read from memory; best of several."""
    data = np.ones(READ_BYTES, np.uint8)
    parts = np.array_split(data, workers)
    return READ_BYTES / _best(workers, lambda i: ffi.read_all(parts[i]))


def dot_peak(workers: int) -> float:
    """Integer operations (two a multiply-add) per second that `workers` threads reach together."""
    rounds = DOT_ROUNDS if ffi.active_kernel() != "scalar" else DOT_ROUNDS // 10
    done = ffi.dot_rounds(1) * rounds * workers
    return 2 * done / _best(workers, lambda _: ffi.dot_rounds(rounds))


def _best(workers: int, work: Callable[[int], object]) -> float:
    """Seconds that all workers take together, the fewest of several tries."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        seconds = []
        for _ in range(REPEATS + 1):  # the first starts the threads
            started = time.perf_counter()
            list(pool.map(work, range(workers)))
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
