"""The training loop: resume, step, log, evaluate, checkpoint; no user interface of its own.

A run directory holds

    config.json          the whole configuration
    tokenizer.json       of a corpus, unless its tokens are bytes
    reference.npz        of a run by preference (`bitjax.train.dpo`)
    metrics.jsonl        one JSON object per report (`bitjax.train.metrics`; losses in nats)
    tensorboard/         the same numbers, with `train.tensorboard`; and with `train.wandb`:
    wandb/, wandb-id     what it keeps, and the run's name there
    checkpoints/<step>/  by orbax
    damaged-<step>/      a checkpoint that could not be read when the run was resumed

An interrupted run resumes from its newest whole checkpoint and repeats the lost steps exactly.
"""

from __future__ import annotations

import errno
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from bitjax.config import RunConfig, to_json
from bitjax.corpus.rows import Batch
from bitjax.replacing import replace_text
from bitjax.train import flops, processes
from bitjax.train.boards import boards_of
from bitjax.train.checkpoint import Checkpoints, Position
from bitjax.train.layers import LayerWatch, flip_rate, layer_sizes
from bitjax.train.metrics import MetricsWriter, Report
from bitjax.train.signals import SignalFlag
from bitjax.train.source import TOKENIZER, Source, open_source, tokenizer_file
from bitjax.train.start import started
from bitjax.train.step import Metrics, Params, Trainer, TrainState

VALID_WINDOWS = 64  # rows of the quick validation loss during training


class Interrupted(Exception):
    """Raised after a signal, once the state is saved; the run can be resumed."""


class Diverged(Exception):
    """Raised when the loss is NaN or jumps and the run may not go on; the last checkpoint is from
    before."""


def train(
    config: RunConfig,
    directory: Path,
    on_report: Callable[[Report], None] = lambda report: None,
) -> TrainState:
    """Train, or go on training, the run in `directory`.

    Args:
        config: of the run; must equal the directory's own if it has one.
        directory: created if missing.
        on_report: called every `log_every` steps and at the end, in the first process.

    Returns:
        The final state; `Trainer(config).model(state.params)` is the model.

    Raises:
        ValueError: data too short, a vocabulary without all its tokens, or a directory that holds
            another run, or checkpoints of which none is whole.
        OSError: the disk is full; every finished checkpoint is whole.
        Interrupted: SIGINT or SIGTERM arrived; the state was saved.
        Diverged: the loss is no longer finite, or jumped, and `train.on_spike` says to stop.
    """
    source = open_source(config)
    trainer = Trainer(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {directory}: {error.strerror}") from None
    try:
        with Checkpoints(directory, config, source.identity) as checkpoints, SignalFlag() as stop:
            state, position = checkpoints.restore(trainer) or (
                _first_state(trainer, source),
                Position(),
            )
            trainer.objective.prepare(
                source.rows, source.identity, directory, _Reference(trainer, source)
            )
            if not processes.is_first():
                return _Run(trainer, source, checkpoints, None, on_report).go(state, position, stop)
            replace_text(directory / "config.json", to_json(config) + "\n")
            if (tokenizer := tokenizer_file(source.tokenizer)) is not None:
                replace_text(directory / TOKENIZER, tokenizer)
            step = int(state.step)
            with MetricsWriter(directory, step, boards_of(directory, config)) as writer:
                run = _Run(trainer, source, checkpoints, writer, on_report)
                return run.go(state, position, stop)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"cannot write to {directory}: {os.strerror(errno.ENOSPC).lower()}; finished "
            "checkpoints are whole, and the run can go on from the newest"
        ) from error


class _Run:
    """The steps of one call of `train`."""

    def __init__(
        self,
        trainer: Trainer,
        source: Source,
        checkpoints: Checkpoints,
        writer: MetricsWriter | None,
        on_report: Callable[[Report], None],
    ) -> None:
        self._trainer = trainer
        self._config = trainer.config.train
        self._source = source
        self._valid = source.valid(VALID_WINDOWS)
        self._checkpoints = checkpoints
        self._writer = writer
        self._on_report = on_report
        self._layers: LayerWatch | None = None
        self._rewinds = 0  # in all, of this process
        self._rewinds_in_a_row = 0  # since the last checkpoint
        # Of the steps since the last report: device scalars, fetched only when reported.
        self._pending: list[Metrics] = []
        self._clock = 0.0

    def go(self, state: TrainState, position: Position, stop: SignalFlag) -> TrainState:
        """Steps from `state.step` to the last one."""
        config = self._config
        step = int(state.step)
        if config.log_codes and step < config.steps:
            self._layers = LayerWatch(self._trainer, state.params, self._valid)
        self._clock = time.perf_counter()
        while step < config.steps:
            batch = self._source.batch(step + position.moved)
            state, metrics = self._trainer.step(state, self._trainer.place_batch(batch))
            self._pending.append(metrics)
            step, last = step + 1, step + 1 == config.steps
            evaluate = last or bool(config.eval_every and step % config.eval_every == 0)
            # Read once: a signal after this waits for the next step, or, as asking all processes
            # takes time, their next report.
            ask = jax.process_count() == 1 or step % config.log_every == 0
            stopping = ask and processes.any_of(stop.is_set())
            save = last or stopping or step % config.checkpoint_every == 0
            self._checkpoints.check()
            # Reporting whenever saving keeps a diverged state out of the checkpoints, and gives a
            # resumed run the same reports as an unbroken one.
            if evaluate or save or step % config.log_every == 0:
                if self._must_rewind(step):
                    state, position = self._rewind(step, position)
                    step = int(state.step)
                    continue
                report = self._report(state, step, evaluate)
                loss = report.valid_loss
                if loss is not None and loss < (position.best_loss or math.inf):
                    position = replace(position, best_step=step, best_loss=loss)
                    save = save or config.keep_best
            if save:
                self._checkpoints.save(state, position)
                self._rewinds_in_a_row = 0
            if stopping and not last:
                self._finish()
                raise Interrupted(f"stopped after step {step}; the state is saved")
        self._finish()
        return state

    def _finish(self) -> None:
        self._checkpoints.wait()
        processes.barrier("end")

    def _must_rewind(self, step: int) -> bool:
        """Whether the steps since the last report end in going back.

        Raises:
            Diverged: they end the run.
        """
        config, spikes = self._config, _spikes(self._pending)
        if config.on_spike == "stop":
            _require_finite(self._pending, step)
            if spikes:
                raise Diverged(
                    f"the loss or gradient norm jumped above {config.spike_factor} times its "
                    f"median at about step {step}; resume from the last checkpoint with "
                    "train.on_spike=skip or rewind, or lower optimizer.learning_rate"
                )
            return False
        if config.on_spike == "skip":
            in_a_row = max(int(m["spikes_in_a_row"]) for m in self._pending)
            if in_a_row >= config.spike_limit:
                raise Diverged(
                    f"{in_a_row} steps in a row were skipped up to step {step} "
                    f"(train.spike_limit={config.spike_limit}); lower optimizer.learning_rate"
                )
            if spikes:
                warnings.warn(f"{spikes} steps skipped before step {step}", stacklevel=2)
            return False
        return spikes > 0

    def _rewind(self, step: int, position: Position) -> tuple[TrainState, Position]:
        """The state of the last checkpoint, and a position whose next data follow those of `step`.

        Until the next checkpoint nothing of this is on disk: a process killed meanwhile comes to
        the same spike again, and goes back again.
        """
        self._rewinds += 1
        self._rewinds_in_a_row += 1
        if self._rewinds_in_a_row >= self._config.spike_limit:
            raise Diverged(
                f"the run went back {self._rewinds_in_a_row} times without reaching the next "
                f"checkpoint, the last time from step {step} "
                f"(train.spike_limit={self._config.spike_limit}); lower optimizer.learning_rate"
            )
        restored = self._checkpoints.restore(self._trainer)
        state, _ = restored or (_first_state(self._trainer, self._source), position)
        back_to = int(state.step)
        warnings.warn(
            f"the loss jumped before step {step}; back to step {back_to}, with other data",
            stacklevel=2,
        )
        if self._writer is not None:
            self._writer.rewind(back_to)
        if self._layers is not None:
            self._layers.restart(state.params)
        self._pending, self._clock = [], time.perf_counter()
        return state, replace(position, moved=position.moved + step - back_to)

    def _report(self, state: TrainState, step: int, evaluate: bool) -> Report:
        config, model, pending = self._config, self._trainer.config.model, self._pending
        seconds = time.perf_counter() - self._clock
        # A skipped step's loss may be NaN, or out of all proportion.
        losses = [float(m["loss"]) for m in pending if not int(m.get("spikes_in_a_row", 0))] or [
            float(pending[-1]["loss"])
        ]
        rate = len(pending) * config.batch_size * config.seq_len / seconds
        peak = 1e9 * (config.peak_gflops or 0) or flops.measured_peak(config.compute_dtype)
        layers = self._layers.report(state.params) if self._layers else {}
        valid = validate(self._trainer, state, self._valid) if evaluate else {}
        *_, last = pending
        measures = {name: float(last[name]) for name in self._trainer.objective.measures}
        measures |= {f"valid_{name}": value for name, value in valid.items()}
        measures.pop("loss")
        report = Report(
            step=step,
            steps=config.steps,
            loss=sum(losses) / len(losses),
            learning_rate=float(pending[-1]["learning_rate"]),
            gradient_norm=float(pending[-1]["gradient_norm"]),
            update_norm=float(pending[-1]["update_norm"]),
            tokens_per_second=rate,
            mfu=rate * flops.flops_per_token(model, config.seq_len) / peak,
            peak_gflops=peak / 1e9,
            seconds_left=(config.steps - step) * seconds / len(pending),
            valid_loss=measures.pop("valid_loss", None),
            measures=measures or None,
            spikes=_spikes(pending) or None,
            rewinds=self._rewinds or None,
            flip_rate=flip_rate(layers, layer_sizes(self._trainer.model(state.params))),
            layers=layers or None,
        )
        if self._writer is not None:
            self._writer.write(report)
            self._on_report(report)
        self._pending, self._clock = [], time.perf_counter()
        return report


class _Reference:
    """Log-likelihoods under the model that a run starts from, which is read when asked first."""

    def __init__(self, trainer: Trainer, source: Source) -> None:
        self._trainer, self._source = trainer, source
        self._params: Params | None = None

    def __call__(self, batch: Batch) -> jax.Array:
        """Float32 `[B]`, of the counted tokens of each row."""
        if self._params is None:
            self._params = _first_state(self._trainer, self._source).params
        placed = self._trainer.place_batch(batch, cut=False)
        return self._trainer.likelihoods(self._params, placed)


def _first_state(trainer: Trainer, source: Source) -> TrainState:
    path = trainer.config.train.start_from
    return started(trainer, Path(path), source.tokenizer) if path else trainer.init()


def _spikes(pending: list[Metrics]) -> int:
    """Steps that were not applied."""
    return sum(int(metrics.get("spikes_in_a_row", 0)) > 0 for metrics in pending)


def _require_finite(pending: list[Metrics], step: int) -> None:
    for name, shown in (
        ("loss", "loss"), ("gradient_norm", "gradient norm"), ("update_norm", "update's norm"),
    ):  # fmt: skip
        values = [float(metrics[name]) for metrics in pending]
        if not all(map(math.isfinite, values)):
            raise Diverged(
                f"the {shown} became {values[-1]} at about step {step}; lower "
                "optimizer.learning_rate, or resume from the last checkpoint"
            )


def validate(trainer: Trainer, state: TrainState, rows: Batch) -> dict[str, float]:
    """The objective's measures, each its mean over the items of all rows `[n, T + 1]`."""
    size, objective = trainer.config.train.batch_size, trainer.objective
    totals, count = dict.fromkeys(objective.measures, 0.0), 0
    for first in range(0, len(rows.tokens), size):
        part = jax.tree.map(lambda x, first=first: x[first : first + size], rows)
        items = int(objective.items(part))
        means = trainer.means(state.params, trainer.place_batch(part, cut=False))
        totals = {name: total + float(means[name]) * items for name, total in totals.items()}
        count += items
    return {name: total / max(count, 1) for name, total in totals.items()}
