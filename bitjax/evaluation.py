"""The tables of `bitjax eval MODEL... --tasks ...`: scores, and what differs between two models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
from flax import nnx

from bitjax import terminal
from bitjax.api import load
from bitjax.bench.energy import PackageMeter, modelled_joules
from bitjax.evaluate.compare import bootstrap_interval, holm, mcnemar
from bitjax.evaluate.multiple_choice import Mean, Settings, groups, metrics, score_task
from bitjax.evaluate.records import Record, Records, fingerprint
from bitjax.evaluate.requests import RequestScorer
from bitjax.evaluate.tasks import Task


@dataclass(frozen=True)
class Run:
    """One model's results.

    Attributes:
        name: of the model.
        records: of each task, in the tasks' order.
        cost: rows of memory, speed and energy.
    """

    name: str
    records: list[list[Record]]
    cost: tuple[str, ...]


def evaluate_tasks(
    models: Sequence[str], tasks: Sequence[Task], settings: Settings, limit: int | None,
    folder: Path | None,
) -> None:  # fmt: skip
    """Score models one after the other and print their tables.

    Raises:
        ValueError: more than two models, a limit below 1, or see `score_task`.
    """
    if len(models) > 2:
        raise ValueError(f"{len(models)} models; one is scored, and two are compared")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} is below 1")
    runs = [_run(model, tasks, settings, limit, folder) for model in models]
    for run in runs:
        terminal.table(("task", "items", "metric", "value"), _scores(run, tasks), run.name)
    if len(runs) == 2:
        terminal.table(
            ("task", "metric", "A", "B", "B - A", "95 % interval", "p"), _differences(runs, tasks),
            f"A: {runs[0].name}, B: {runs[1].name}; p: McNemar, Holm over the table",
        )  # fmt: skip
    terminal.table(
        ("model", "parameters in memory", "tokens/s scored", "J/token measured",
         "J/token of the arithmetic, modelled"),
        [run.cost for run in runs],
    )  # fmt: skip


def _run(
    path: str, tasks: Sequence[Task], settings: Settings, limit: int | None, folder: Path | None
) -> Run:
    model = load(path)
    digest = fingerprint(model) if folder is not None else ""
    scorer = RequestScorer(model)
    meter, start, made = PackageMeter(), time.perf_counter(), []
    for task in tasks:
        header = {"task": task.name, "model": digest, **asdict(settings)}
        records = Records(folder, header) if folder is not None else None
        made.append(score_task(scorer, model.tokenizer, task, settings, limit, records))
    seconds = time.perf_counter() - start
    joules = "-"
    if meter.readable and scorer.tokens:
        joules = f"{meter.joules() / scorer.tokens:.3g}"
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    speed = f"{scorer.tokens / seconds:,.0f}" if scorer.tokens else "-"
    modelled = f"{sum(modelled_joules(model, 1).values()):.3g}"
    return Run(path, made, (path, terminal.size(size), speed, joules, modelled))


def _scores(run: Run, tasks: Sequence[Task]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for task, records in zip(tasks, run.records, strict=True):
        for group, members in groups(records).items():
            for name, values in metrics(members).items():
                mean = Mean.of(values)
                label = f"{task.name} {group}".strip()
                rows.append(
                    (label, f"{mean.items:,}", name, f"{mean.value:.4f} ± {mean.error:.4f}")
                )
    return rows


def _differences(runs: Sequence[Run], tasks: Sequence[Task]) -> list[tuple[str, ...]]:
    rows, tested = [], []
    for task, first, second in zip(tasks, runs[0].records, runs[1].records, strict=True):
        ours, theirs = metrics(first), metrics(second)
        for name, a in ours.items():
            b = theirs[name]
            low, high = bootstrap_interval(a, b)
            means = Mean.of(a).value, Mean.of(b).value
            shown = f"{means[0]:.4f}", f"{means[1]:.4f}", f"{means[1] - means[0]:+.4f}"
            rows.append([task.name, name, *shown, f"{low:+.4f} to {high:+.4f}", "-"])
            if name != "bits/byte":
                tested.append((rows[-1], mcnemar(a, b)))
    for (row, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        row[-1] = f"{p:.2g}"
    return [tuple(row) for row in rows]
