"""What the processes of one run do together; of a single process nothing is asked.

Processes, one on each host or more, become one run by `jax.distributed`: each has the whole
configuration and takes every step, XLA carries sums and weights between their devices (gloo on
CPUs), and the first alone writes files. All see the same directory.

Source: https://docs.jax.dev/en/latest/multi_process.html
"""

from __future__ import annotations

import atexit
import os

import jax
import numpy as np
from jax.experimental import multihost_utils


def join(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Become one of the processes of a run; before anything else is asked of JAX.

    Args:
        coordinator: `host:port` of the first process; None, with the others, where the cluster's
            manager (Slurm, Open MPI, ...) says it all.
        count: of processes.
        index: of this one, 0 for the first.

    Raises:
        ValueError: settings that make no sense, or no cluster's manager.
        RuntimeError: the others cannot be reached.
    """
    if coordinator is not None and (
        count is None or index is None or not 0 <= index < count or ":" not in coordinator
    ):
        raise ValueError(
            f"process {index} of {count} at {coordinator!r}: give HOST:PORT of the first, how many "
            "there are, and which of 0, 1, ... this one is"
        )
    try:
        jax.distributed.initialize(coordinator, count, index)
    except ValueError as error:
        raise ValueError(f"no cluster's manager says which process this is ({error})") from None


def leave_alone() -> None:
    """Make this process, which failed, end without waiting for the others to come to their end.

    They are told by JAX's coordinator that one is gone, and end too.
    """
    if jax.process_count() > 1:
        atexit.register(os._exit, 1)  # before jax's own, which would wait for minutes


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait for the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_of(flag: bool) -> bool:
    """Whether the flag of any process is set; all have to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def of_first(flag: bool) -> bool:
    """The flag of the first process; all have to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))


def whole(x: jax.Array) -> np.ndarray:
    """A copy of an array on this host, wherever its parts are; all have to ask."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.array(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def spread(x: jax.Array | np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process holds whole, on the devices of all of them."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    held = np.asarray(x)
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])
