"""Checkpoints by orbax: parameters, optimiser state, step, and where the data and randomness stand.

The data order and the initial weights are pure functions of the seed and the step
(`bitjax.train.data`), so those two numbers are the data position and the random state. A
checkpoint also carries the run's configuration and the text's hash; resuming under others is
refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bitjax.config import RunConfig, from_json, to_json
from bitjax.train.step import Trainer, TrainState


class Checkpoints:
    """The checkpoints of one run directory; use as a context manager.

    Args:
        directory: the run's directory; checkpoints go to `directory/checkpoints/<step>`.
        config: the run's configuration.
        text_sha256: hash of the training text.

    Writes are synchronous and land under a temporary name first: a process killed at any instant
    leaves the previous checkpoint whole.
    """

    def __init__(self, directory: Path, config: RunConfig, text_sha256: str) -> None:
        self._config = config
        self._text_sha256 = text_sha256
        self._manager = _manager(directory, config.train.keep_checkpoints)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: TrainState) -> None:
        """Write the state after `state.step` steps; does nothing if that step is already there."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        about = {
            "config": to_json(self._config),
            "text_sha256": self._text_sha256,
            "data_position": {"seed": self._config.train.seed, "step": step},
        }
        # Copies: the next step donates the buffers.
        arrays = {name: np.array(x) for name, x in _named_leaves(state).items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, trainer: Trainer) -> TrainState | None:
        """The newest state, or None if the run has none.

        Raises:
            ValueError: the checkpoint is of another configuration or text, or cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        about = _read_about(self._manager, step)
        saved = from_json(RunConfig, about["config"])
        if saved != self._config:
            raise ValueError(
                f"{self._manager.directory} holds a run with other settings "
                f"({_difference(saved, self._config)}); use its settings or another directory"
            )
        if about["text_sha256"] != self._text_sha256:
            raise ValueError(
                f"{self._manager.directory} holds a run on another version of the training text; "
                "restore that text or use another directory"
            )
        return _restore(self._manager, step, jax.eval_shape(trainer.init))


def read_run(directory: Path, step: int | None = None) -> tuple[RunConfig, int, TrainState]:
    """Load a finished or interrupted run: its configuration, step and state (newest by default).

    Raises:
        ValueError: the directory holds no checkpoint, or one that cannot be read.
    """
    if not (directory / "checkpoints").is_dir():
        raise ValueError(f"{directory} is not a run: it has no checkpoints folder")
    manager = _manager(directory, keep=None)
    try:
        step = manager.latest_step() if step is None else step
        if step is None:
            raise ValueError(f"{directory} holds no finished checkpoint")
        config = from_json(RunConfig, _read_about(manager, step)["config"])
        return config, step, _restore(manager, step, jax.eval_shape(Trainer(config).init))
    finally:
        manager.close()


def _manager(directory: Path, keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=False,
        read_only=keep is None,
        create=keep is not None,
        save_interval_steps=0 if keep is None else 1,
    )
    path = (directory / "checkpoints").resolve()
    return ocp.CheckpointManager(path, options=options, item_names=("state", "about"))


def _read_about(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    try:
        restored = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        about = restored["about"]
        return {"config": about["config"], "text_sha256": about["text_sha256"]}
    except Exception as error:  # orbax raises many kinds for a damaged folder
        raise ValueError(
            f"cannot read checkpoint {manager.directory}/{step}: {_first_line(error)}"
        ) from error


def _restore(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> TrainState:
    wanted = _named_leaves(abstract)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in wanted.items()
    }
    try:
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(targets))
        )["state"]
    except Exception as error:  # as above
        raise ValueError(
            f"cannot read checkpoint {manager.directory}/{step}: {_first_line(error)}"
        ) from error
    structure = jax.tree.structure(abstract)
    return jax.tree.unflatten(structure, [restored[name] for name in wanted])


def _named_leaves(state: Any) -> dict[str, Any]:
    """Leaves by path, in tree order: a layout independent of Flax's and optax's node classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _difference(saved: RunConfig, wanted: RunConfig) -> str:
    differing = [
        f"{section}.{name}={old!r} there, {getattr(getattr(wanted, section), name)!r} here"
        for section in ("model", "data", "optimizer", "train")
        for name, old in vars(getattr(saved, section)).items()
        if old != getattr(getattr(wanted, section), name)
    ]
    return "; ".join(differing)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
