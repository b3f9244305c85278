"""The training loop: resume, step, log, evaluate, checkpoint; no user interface of its own.

A run directory holds

    config.json          the whole configuration
    metrics.jsonl        one JSON object per report: step, loss, learning_rate, gradient_norm,
                         tokens_per_second, and valid_loss where it was measured (losses in nats)
    checkpoints/<step>/  by orbax

An interrupted run resumes from its newest checkpoint and repeats the lost steps exactly.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from bitjax.config import RunConfig, to_json
from bitjax.train import data
from bitjax.train.checkpoint import Checkpoints
from bitjax.train.step import Metrics, Trainer, TrainState

VALID_WINDOWS = 64  # windows of the quick validation loss during training


@dataclass(frozen=True)
class Report:
    """What the loop tells its caller every `log_every` steps.

    Attributes:
        step, steps: done, and in all.
        loss: mean training loss since the last report, nats per token.
        learning_rate, gradient_norm: of the last step.
        tokens_per_second: since the last report; trained tokens.
        seconds_left: at the current rate.
        valid_loss: nats per token on a sample of the held-out part, where measured.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    seconds_left: float
    valid_loss: float | None


class Interrupted(Exception):
    """Raised after a signal, once the state is saved; the run can be resumed."""


class Diverged(Exception):
    """Raised when the loss is NaN or infinite; the last checkpoint is from before."""


def train(
    config: RunConfig,
    directory: Path,
    on_report: Callable[[Report], None] = lambda report: None,
) -> TrainState:
    """Train, or go on training, the run in `directory`.

    Args:
        config: of the run; must equal the directory's own if it has one.
        directory: created if missing.
        on_report: called every `log_every` steps and at the end.

    Returns:
        The final state; `Trainer(config).model(state.params)` is the model.

    Raises:
        ValueError: a text too short, a vocabulary without all bytes, or a directory that holds
            another run.
        Interrupted: SIGINT or SIGTERM arrived; the state was saved.
        Diverged: the loss is no longer finite.
    """
    text = data.load_text(config.data)
    data.require_length(text, config.train.seq_len)
    if config.model.vocab_size < 256:
        raise ValueError(f"model.vocab_size={config.model.vocab_size}; byte tokens need 256")
    trainer = Trainer(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {directory}: {error.strerror}") from None
    with Checkpoints(directory, config, text.sha256) as checkpoints, _SignalFlag() as stop:
        state = checkpoints.restore(trainer) or trainer.init()
        _write_atomically(directory / "config.json", to_json(config) + "\n")
        metrics_path = directory / "metrics.jsonl"
        _forget_after(metrics_path, int(state.step))
        with metrics_path.open("a") as metrics_file:

            def report(found: Report) -> None:
                metrics_file.write(json.dumps(_logged(found)) + "\n")
                metrics_file.flush()
                on_report(found)

            return _run(trainer, state, text, checkpoints, stop, report)


def _run(
    trainer: Trainer,
    state: TrainState,
    text: data.Text,
    checkpoints: Checkpoints,
    stop: _SignalFlag,
    report: Callable[[Report], None],
) -> TrainState:
    """Steps from `state.step` to the last one."""
    config = trainer.config.train
    valid = data.windows(text.valid, config.seq_len, VALID_WINDOWS)
    pending: list[Metrics] = []  # device scalars, fetched only when reported
    clock = time.perf_counter()
    for step in range(int(state.step), config.steps):
        tokens = data.batch(text.train, step, config.seed, config.batch_size, config.seq_len)
        state, metrics = trainer.step(state, tokens)
        pending.append(metrics)
        done, last = step + 1, step + 1 == config.steps
        evaluate = last or (config.eval_every and done % config.eval_every == 0)
        stopping = stop.is_set()  # read once: a signal after this waits for the next step
        save = last or stopping or done % config.checkpoint_every == 0
        # Reporting whenever saving keeps a diverged state out of the checkpoints, and gives a
        # resumed run the same reports as an unbroken one.
        if evaluate or save or done % config.log_every == 0:
            losses = _finite_losses(pending, done)
            seconds = time.perf_counter() - clock
            report(
                Report(
                    step=done,
                    steps=config.steps,
                    loss=sum(losses) / len(losses),
                    learning_rate=float(metrics["learning_rate"]),
                    gradient_norm=float(metrics["gradient_norm"]),
                    tokens_per_second=len(losses) * config.batch_size * config.seq_len / seconds,
                    seconds_left=(config.steps - done) * seconds / len(losses),
                    valid_loss=validation_loss(trainer, state, valid) if evaluate else None,
                )
            )
            pending, clock = [], time.perf_counter()
        if save:
            checkpoints.save(state)
        if stopping and not last:
            raise Interrupted(f"stopped after step {done}; the state is saved")
    return state


def _finite_losses(pending: list[Metrics], step: int) -> list[float]:
    losses = [float(metrics["loss"]) for metrics in pending]
    if not all(map(math.isfinite, losses)):
        raise Diverged(
            f"the loss became {losses[-1]} at about step {step}; lower "
            "optimizer.learning_rate, or resume from the last checkpoint"
        )
    return losses


def validation_loss(trainer: Trainer, state: TrainState, windows: np.ndarray) -> float:
    """Mean loss in nats per token over int32 windows `[n, T + 1]`."""
    size = trainer.config.train.batch_size
    losses = [
        float(trainer.loss(state.params, windows[i : i + size])) * len(windows[i : i + size])
        for i in range(0, len(windows), size)
    ]
    return sum(losses) / len(windows)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The reports of a run, oldest first; a last line cut short by a crash is left out."""
    path = directory / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _logged(report: Report) -> dict[str, Any]:
    skipped = ("steps", "seconds_left")
    return {k: v for k, v in vars(report).items() if k not in skipped and v is not None}


def _forget_after(path: Path, step: int) -> None:
    """Drop reports of steps that will be repeated."""
    kept = [json.dumps(r) + "\n" for r in read_metrics(path.parent) if r["step"] <= step]
    _write_atomically(path, "".join(kept))


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


class _SignalFlag:
    """Set by SIGINT and SIGTERM while active; a second signal acts as usual."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._previous: dict[int, Any] = {}

    def is_set(self) -> bool:
        return self._event.is_set()

    def __enter__(self) -> _SignalFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._event.set()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
