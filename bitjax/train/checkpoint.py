"""Checkpoints by orbax: parameters, optimiser state, step, and where the data and randomness stand.

The data order and the initial weights are pure functions of the seed and the step
(`bitjax.train.data`), so those two numbers, and how far rewinds have moved the data on, are the
data position and the random state. A checkpoint also carries the run's configuration and the
text's hash, for resuming under others is refused, and size and CRC-32 of its every file: of a
damaged checkpoint no value is used, and orbax does not get to see it.

A checkpoint is written by a thread while the training goes on, under a temporary name that is
changed when it is whole. Older ones are deleted only after that.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bitjax.config import WATCHING, MeshConfig, RunConfig, from_json, to_json
from bitjax.train import processes
from bitjax.train.step import Trainer, TrainState

UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that are no whole checkpoints
SEAL = "crc32.json"  # in a checkpoint: path of every other file in it -> [bytes, CRC-32]


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read, or whose arrays are not those that were written."""


@dataclass(frozen=True)
class Position:
    """What a run knows besides its arrays.

    Attributes:
        moved: batches that rewinds have passed over.
        best_step, best_loss: of the lowest validation loss so far, nats per token.
    """

    moved: int = 0
    best_step: int | None = None
    best_loss: float | None = None


class Checkpoints:
    """The checkpoints of one run directory; use as a context manager.

    Args:
        directory: the run's directory; checkpoints go to `directory/checkpoints/<step>`.
        config: the run's configuration.
        text_sha256: hash of the training text.

    Leaving the context waits for the checkpoint being written. A process killed at any instant
    leaves the previous checkpoint whole.
    """

    def __init__(self, directory: Path, config: RunConfig, text_sha256: str) -> None:
        self._config = config
        self._text_sha256 = text_sha256
        self.folder = (directory / "checkpoints").resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        if processes.is_first():
            for leftover in _leftovers(self.folder):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except OSError as failure:
            if error is None:
                raise
            warnings.warn(str(failure), stacklevel=2)  # the error under way goes first
        finally:
            self._thread.shutdown()

    def save(self, state: TrainState, position: Position) -> None:
        """Begin to write the state after `state.step` steps, if that step is not there already.

        Raises:
            OSError: the write before this failed.
        """
        self.wait()
        step = int(state.step)
        if processes.of_first(step in _steps(self.folder)):
            return
        about = {
            "config": to_json(self._config),
            "text_sha256": self._text_sha256,
            "data_position": {"seed": self._config.train.seed, "step": step},
            "position": vars(position),
        }
        # Copies: the next step donates the buffers.
        arrays = {name: processes.whole(x) for name, x in _named_leaves(state).items()}
        kept = {position.best_step} if self._config.train.keep_best else set()
        if processes.is_first():
            self._pending = self._thread.submit(self._write, step, arrays, about, kept)

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            OSError: the checkpoint could not be written; the one before is whole.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise what `wait` would if the write has failed by now; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def restore(self, trainer: Trainer) -> tuple[TrainState, Position] | None:
        """The newest state that is whole, or None if the run has none.

        Damaged newer ones are put aside as `directory/damaged-<step>`, with a warning.

        Raises:
            ValueError: the checkpoint is of another configuration or text, or all are damaged.
        """
        self.wait()
        processes.barrier("restore")
        damaged: list[DamagedCheckpoint] = []
        found = _steps(self.folder)
        for step in reversed(found):
            try:
                restored = self._restore(step, trainer)
            except DamagedCheckpoint as error:
                damaged.append(error)
                continue
            processes.barrier("restored")
            for reason, bad in zip(damaged, reversed(found), strict=False):
                if not processes.is_first():
                    break
                aside = self._put_aside(bad)
                warnings.warn(
                    f"{reason}; going on from step {step}, the damaged one is kept as {aside}",
                    stacklevel=2,
                )
            return restored
        if damaged:
            raise damaged[0]
        return None

    def _restore(self, step: int, trainer: Trainer) -> tuple[TrainState, Position]:
        about = _read_about(self.folder, step)
        saved = from_json(RunConfig, about["config"])
        differing = _difference(saved, self._config)
        if differing:
            raise ValueError(
                f"{self.folder} holds a run with other settings ({differing}); use its settings "
                "or another directory"
            )
        if about["text_sha256"] != self._text_sha256:
            raise ValueError(
                f"{self.folder} holds a run on another version of the training text; "
                "restore that text or use another directory"
            )
        state = trainer.place(_read_state(self.folder, step, jax.eval_shape(trainer.init)))
        return state, Position(**about.get("position", {}))

    def _put_aside(self, step: int) -> Path:
        aside = self.folder.parent / f"damaged-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self.folder / str(step), aside)
        return aside

    def _write(
        self, step: int, arrays: dict[str, np.ndarray], about: dict[str, Any], kept: set[int | None]
    ) -> None:
        """In the thread: write, then delete what is neither new nor kept."""
        unsealed = self.folder / f"{step}.unsealed{UNFINISHED}"
        before = _steps(self.folder)
        try:
            # Asked first: what orbax begins and has to give up leaves complaints on the terminal.
            if shutil.disk_usage(self.folder).free < sum(x.nbytes for x in arrays.values()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with _orbax() as writer:
                writer.save(
                    unsealed,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
                    ),
                )
            (unsealed / SEAL).write_text(json.dumps(_files(unsealed)))
            os.rename(unsealed, self.folder / str(step))
        except Exception as error:  # orbax and tensorstore raise many kinds
            for leftover in _leftovers(self.folder):
                shutil.rmtree(leftover, ignore_errors=True)
            whole = f"checkpoint {before[-1]} is whole" if before else "there is none before it"
            raise OSError(
                f"cannot write checkpoint {self.folder}/{step}: {_reason(error)}; {whole}, and "
                "the run can go on from there"
            ) from error
        for old in _steps(self.folder)[: -self._config.train.keep_checkpoints]:
            if old not in kept:
                # Renamed first: a half-deleted folder must not look like a checkpoint.
                doomed = self.folder / f"{old}.deleted{UNFINISHED}"
                os.rename(self.folder / str(old), doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def read_run(directory: Path, step: int | None = None) -> tuple[RunConfig, int, TrainState]:
    """Load a finished or interrupted run: its configuration, step and state (newest by default).

    All on one device, which is what the configuration then says: the mesh of a run is not needed to
    read it.

    Raises:
        ValueError: the directory holds no checkpoint, or one that cannot be read.
    """
    folder = (directory / "checkpoints").resolve()
    if not folder.is_dir():
        raise ValueError(f"{directory} is not a run: it has no checkpoints folder")
    steps = _steps(folder)
    if not steps:
        raise ValueError(f"{directory} holds no finished checkpoint")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(f"{directory} has no checkpoint {step}; it has {steps}")
    about = _read_about(folder, step)
    config = replace(from_json(RunConfig, about["config"]), mesh=MeshConfig())
    return config, step, _read_state(folder, step, jax.eval_shape(Trainer(config).init))


def _steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints, ascending."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _leftovers(folder: Path) -> Iterable[Path]:
    return folder.glob(f"*{UNFINISHED}*")


def _read_about(folder: Path, step: int) -> dict[str, Any]:
    _verify(folder, step)
    about = _read(folder, step, about=ocp.args.JsonRestore())
    for key in ("config", "text_sha256"):
        if not isinstance(about, dict) or not isinstance(about.get(key), str):
            raise DamagedCheckpoint(f"cannot read checkpoint {folder}/{step}: it has no {key}")
    return about


def _read_state(folder: Path, step: int, abstract: TrainState) -> TrainState:
    wanted = _named_leaves(abstract)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in wanted.items()
    }
    restored = _read(folder, step, state=ocp.args.StandardRestore(targets))
    # Copied to arrays that are bound to no device, as a fresh state's: its programs serve them.
    leaves = [jnp.array(np.asarray(restored.pop(name))) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _orbax() -> ocp.Checkpointer:
    """Reads or writes in this process alone: where there are several, they agree by our rules."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    handlers = {
        "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        "about": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    together = ocp.CompositeCheckpointHandler(composite_options=options, **handlers)
    return ocp.Checkpointer(together, multiprocessing_options=alone)


def _read(folder: Path, step: int, **item: Any) -> Any:
    """One item of a checkpoint.

    Raises:
        DamagedCheckpoint: whatever orbax raised, of which there are many kinds.
    """
    (name,) = item
    try:
        with _orbax() as reader:
            return reader.restore(folder / str(step), args=ocp.args.Composite(**item))[name]
    except Exception as error:
        raise DamagedCheckpoint(
            f"cannot read checkpoint {folder}/{step}: {_first_line(error)}"
        ) from error


def _verify(folder: Path, step: int) -> None:
    """Compare a checkpoint's files with its seal; those of early runs have none.

    Raises:
        DamagedCheckpoint: naming a file that is not as it was written.
    """
    checkpoint = folder / str(step)
    try:
        sealed = json.loads((checkpoint / SEAL).read_bytes())
        found = _files(checkpoint)
        for name, size_and_crc in sealed.items():
            if name not in found:
                raise ValueError(f"{name} is missing")
            if found[name] != size_and_crc:
                raise ValueError(f"{name} is not as it was written")
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"cannot read checkpoint {checkpoint}: {_first_line(error)}"
        ) from None


def _files(checkpoint: Path) -> dict[str, list[int]]:
    """Path -> [bytes, CRC-32] of every file but the seal."""
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL:
            crc, length = 0, 0
            with path.open("rb") as file:
                while part := file.read(2**24):
                    crc, length = zlib.crc32(part, crc), length + len(part)
            found[str(path.relative_to(checkpoint))] = [length, crc]
    return found


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
        and not (section == "train" and name in WATCHING)
    ]
    return "; ".join(differing)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _reason(error: Exception) -> str:
    """One line; a full disk by its name, wherever in tensorstore's sentence it is."""
    full = os.strerror(errno.ENOSPC)
    known = getattr(error, "errno", None) == errno.ENOSPC or full in str(error)
    return full.lower() if known else _first_line(error)
