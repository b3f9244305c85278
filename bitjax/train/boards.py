"""Where a run's numbers are shown besides metrics.jsonl: TensorBoard, and Weights & Biases.

Both get the same scalars (`bitjax.train.metrics.scalars`) through one interface, and neither is
imported unless asked for. Steps after a checkpoint are repeated when a run goes on or goes back;
what each board makes of that is said there.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from bitjax.config import RunConfig

WANDB_ID = "wandb-id"  # in a run's directory: what the run is called there, so that it goes on


class Board(Protocol):
    """Shows numbers while a run goes on."""

    def begin(self, step: int) -> None:
        """Open, or go back to `step`: points of later steps will come again."""

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Show the numbers of a step."""

    def end(self) -> None:
        """Nothing more will come."""


def boards_of(directory: Path, config: RunConfig) -> list[Board]:
    """The boards that a run asks for, not yet open."""
    found: list[Board] = []
    if config.train.tensorboard:
        found.append(TensorBoard(directory / "tensorboard"))
    if config.train.wandb:
        found.append(WeightsAndBiases(directory, config))
    return found


class TensorBoard:
    """Event files in a folder; TensorBoard drops what was written of steps that are repeated."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def begin(self, step: int) -> None:
        """See `Board`.

        Raises:
            ModuleNotFoundError: TensorBoard's writer is not installed.
        """
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "train.tensorboard=True needs tensorboardX; pip install 'bitjax[tensorboard]'"
            ) from None
        self.end()
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """See `Board`."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self) -> None:
        """See `Board`."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of the project `train.wandb`, named as its directory, with the whole configuration.

    Its own variables hold: WANDB_MODE=offline writes to DIR/wandb alone, for `wandb sync` later.
    Steps are a metric, `train_step`, over which all others are drawn, because its own count cannot
    go back: points of a repeated step are there twice, with the same values.
    """

    def __init__(self, directory: Path, config: RunConfig) -> None:
        self._directory, self._config = directory, config
        self._run: Any = None

    def begin(self, step: int) -> None:
        """See `Board`.

        Raises:
            ModuleNotFoundError: wandb is not installed.
            ValueError: it cannot begin a run, for example without a key.
        """
        if self._run is not None:
            return
        project = self._config.train.wandb
        try:
            import wandb
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"train.wandb={project!r} needs wandb; pip install 'bitjax[wandb]'"
            ) from None
        try:
            self._run = wandb.init(
                project=project, dir=str(self._directory), id=self._id(), resume="allow",
                name=self._directory.name, config=asdict(self._config),
                # The terminal stays the run's own.
                settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.Error as error:
            raise ValueError(
                f"train.wandb={project!r}: {str(error).strip().splitlines()[0]} "
                "WANDB_MODE=offline keeps the numbers in the run's directory"
            ) from None
        self._run.define_metric("train_step", hidden=True)
        self._run.define_metric("*", step_metric="train_step")

    def _id(self) -> str:
        path = self._directory / WANDB_ID
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n")
        return path.read_text().strip()

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """See `Board`."""
        self._run.log({"train_step": step, **scalars})

    def end(self) -> None:
        """See `Board`."""
        if self._run is not None:
            self._run.finish()
