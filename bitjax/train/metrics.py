"""What a run reports, and where it is written: metrics.jsonl, and boards if asked for.

`metrics.jsonl` holds one JSON object per report: the fields of `Report` that have a value, without
`steps` and `seconds_left`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitjax.replacing import replace_text
from bitjax.train.boards import Board


@dataclass(frozen=True)
class Report:
    """What the loop tells its caller every `log_every` steps.

    Attributes:
        step, steps: done, and in all.
        loss: mean training loss since the last report, nats per token; of the steps that were no
            spikes.
        learning_rate, gradient_norm, update_norm: of the last step; the gradient before clipping,
            the update with the learning rate in it.
        tokens_per_second: since the last report; trained tokens.
        seconds_left: at the current rate.
        valid_loss: nats per token on a sample of the held-out part, where measured.
        mfu: model FLOP/s (`bitjax.train.flops`) as a fraction of `peak_gflops`.
        peak_gflops: as configured, or this machine's dense product, measured.
        spikes: steps since the last report whose update was not applied.
        rewinds: since the run began, where there were any.
        flip_rate: fraction of all quantised weights whose code differs from the last report's.
        measures: what the objective reports besides its loss, of the last step, and with `valid_`
            before the name of the held-out rows: `reward_margin`, `valid_reward_margin`, ...
        layers: layer -> fractions of codes and flips, and the absmax of its inputs
            (`bitjax.train.layers`).
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    seconds_left: float
    valid_loss: float | None
    update_norm: float | None = None
    mfu: float | None = None
    peak_gflops: float | None = None
    spikes: int | None = None
    rewinds: int | None = None
    flip_rate: float | None = None
    measures: dict[str, float] | None = None
    layers: dict[str, dict[str, float]] | None = None

    def record(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        skipped = ("steps", "seconds_left", "measures")
        found = {k: v for k, v in vars(self).items() if k not in skipped and v is not None}
        return found | (self.measures or {})


class MetricsWriter:
    """Writes a run's reports; use as a context manager.

    Args:
        directory: of the run.
        step: reports of later steps are forgotten, because those steps will be repeated.
        boards: that show the numbers too (`bitjax.train.boards`).

    Raises:
        ModuleNotFoundError: what a board needs is not installed.
        ValueError: a board that cannot begin.
    """

    def __init__(self, directory: Path, step: int, boards: Sequence[Board] = ()) -> None:
        self._path = directory / "metrics.jsonl"
        self._boards = boards
        self._open(step)

    def _open(self, step: int) -> None:
        _forget_after(self._path, step)
        for board in self._boards:
            board.begin(step)
        self._file = self._path.open("a")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        for board in self._boards:
            board.end()

    def write(self, report: Report) -> None:
        record = report.record()
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for board in self._boards:
            board.add(report.step, dict(scalars(record)))

    def rewind(self, step: int) -> None:
        """Forget the reports after `step`."""
        self._file.close()
        self._open(step)


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a record but the step, those of layers as `zero/blocks.0.ffn.down`.

    The field comes before the layer's name, so that one group shows one field of all layers.
    """
    for name, value in record.items():
        if name == "layers":
            for layer, fields in value.items():
                yield from ((f"{field}/{layer}", x) for field, x in fields.items())
        elif name != "step":
            yield name, value


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


def _forget_after(path: Path, step: int) -> None:
    kept = [json.dumps(r) + "\n" for r in read_metrics(path.parent) if r["step"] <= step]
    replace_text(path, "".join(kept))
