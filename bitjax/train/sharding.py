"""Where every array of a run lies on a mesh of devices: the one place that says so.

    weight                                  rows      columns
    qkv, gate_up (outputs x inputs)         tensor    fsdp
    o, down                                 fsdp      tensor
    embedding, head (vocabulary x D)        tensor    fsdp
    norms, learned scales, counters         on every device
    a batch's rows                          data x fsdp

The optimiser's moments lie as their weights do. Everything between is left to XLA's partitioner
(GSPMD, arXiv 2105.04663): it gathers what is cut over fsdp when a layer needs it, and sums over
tensor behind o and down.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bitjax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
ROWS_OF_BATCH = PartitionSpec(("data", "fsdp"))
WEIGHTS = {
    "qkv": PartitionSpec("tensor", "fsdp"),
    "gate_up": PartitionSpec("tensor", "fsdp"),
    "o": PartitionSpec("fsdp", "tensor"),
    "down": PartitionSpec("fsdp", "tensor"),
}
TABLES = {name: PartitionSpec("tensor", "fsdp") for name in ("embedding", "head")}


def make_mesh(config: MeshConfig) -> Mesh | None:
    """The mesh over the first devices there are; None for one device.

    Raises:
        ValueError: too few devices, or several processes whose devices are not all in it.
    """
    devices = jax.devices()
    if jax.process_count() > 1 and config.devices != len(devices):
        raise ValueError(
            f"the mesh {config.data} x {config.fsdp} x {config.tensor} (data, fsdp, tensor) has "
            f"{config.devices} devices; the {jax.process_count()} processes have {len(devices)}, "
            "and all must be in it"
        )
    if config.devices == 1:
        return None
    if len(devices) < config.devices:
        raise ValueError(
            f"the mesh {config.data} x {config.fsdp} x {config.tensor} (data, fsdp, tensor) needs "
            f"{config.devices} devices; there are {len(devices)}"
        )
    shape = (config.data, config.fsdp, config.tensor)
    return Mesh(np.array(devices[: config.devices]).reshape(shape), AXES)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A pytree like `state` (arrays or their shapes), of shardings.

    Raises:
        ValueError: a weight that the mesh does not divide.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = _names(path)
        spec = _spec(names) if leaf.ndim == 2 else PartitionSpec()
        for size, axis in zip(leaf.shape, spec, strict=False):
            if size % mesh.shape[axis]:
                raise ValueError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide {'.'.join(names)} of shape "
                    f"{list(leaf.shape)}: {size} is not a multiple of it"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of, state)


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Of every array of a batch.

    Args:
        mesh: of the run.
        rows: of one accumulation step.

    Raises:
        ValueError: rows that the mesh does not divide.
    """
    share = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
    if rows % share:
        raise ValueError(
            f"{rows} sequences of one step (train.batch_size / train.accumulate) are not a "
            f"multiple of mesh.data * mesh.fsdp = {share}"
        )
    return NamedSharding(mesh, ROWS_OF_BATCH)


def _spec(names: list[str]) -> PartitionSpec:
    *before, last = names
    if last == "weight" and before and before[-1] in WEIGHTS:
        return WEIGHTS[before[-1]]
    return TABLES.get(last, PartitionSpec())


def _names(path: tuple[Any, ...]) -> list[str]:
    keys = [str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", "")))) for e in path]
    return [key for key in keys if key != "value"]
