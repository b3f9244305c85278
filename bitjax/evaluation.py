"""The tables of `bitjax eval MODEL... --tasks ...`: scores, and what differs between two models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
from flax import nnx

from bitjax import terminal
from bitjax.api import load
from bitjax.bench.energy import PackageMeter, modelled_joules
from bitjax.evaluate.compare import bootstrap_interval, holm, mcnemar
from bitjax.evaluate.exercises import Exercises
from bitjax.evaluate.generation import (
    Complete,
    GenerationSettings,
    Prompt,
    answer_exercises,
    values_of,
)
from bitjax.evaluate.multiple_choice import Mean, Settings, groups, metrics, score_task
from bitjax.evaluate.records import Answer, Record, Records, fingerprint
from bitjax.evaluate.requests import RequestScorer
from bitjax.evaluate.tasks import Task
from bitjax.infer import Generator, SamplingParams
from bitjax.model import Transformer
from bitjax.printable import html_table

SCORES = ("task", "items", "metric", "value")  # headings of the tables
DIFFERENCES = ("task", "metric", "A", "B", "B - A", "95 % interval", "p")


@dataclass(frozen=True)
class Run:
    """One model's results.

    Attributes:
        name: of the model.
        results: of each task, in the tasks' order: by group ("" for all), the items' values of each
            metric by its name.
        cost: rows of memory, speed and energy.
        tasks: their names.
    """

    name: str
    results: list[dict[str, dict[str, list[float]]]]
    cost: tuple[str, ...]
    tasks: tuple[str, ...]

    def _repr_html_(self) -> str:
        return html_table(SCORES, _scores(self), self.name)


@dataclass(frozen=True)
class Comparison:
    """Two models' results on the same items; shows itself in notebooks."""

    a: Run
    b: Run

    @property
    def title(self) -> str:
        """Names the models, and the tests of the table."""
        return f"A: {self.a.name}, B: {self.b.name}; p: McNemar, Holm over the table"

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, of `DIFFERENCES`."""
        return _differences((self.a, self.b))

    def _repr_html_(self) -> str:
        return html_table(DIFFERENCES, self.rows, self.title)


@dataclass(frozen=True)
class Choices:
    """What is evaluated, and how.

    Attributes:
        questions: settings of multiple choice.
        exercises: settings of generation.
        limit: items of each part; all if None.
        folder: of records; none are kept if None.
        run_code: whether programs that the model writes are run.
    """

    questions: Settings = field(default_factory=Settings)
    exercises: GenerationSettings = field(default_factory=GenerationSettings)
    limit: int | None = None
    folder: Path | None = None
    run_code: bool = False


def evaluate_tasks(
    models: Sequence[str], tasks: Sequence[Task | Exercises], choices: Choices
) -> list[Run]:
    """Score models one after the other and print their tables.

    Raises:
        ValueError: more than two models, a limit below 1, or see `score_task` and
            `answer_exercises`.
    """
    if len(models) > 2:
        raise ValueError(f"{len(models)} models; one is scored, and two are compared")
    if choices.limit is not None and choices.limit < 1:
        raise ValueError(f"--limit {choices.limit} is below 1")
    runs = [run_tasks(load(model), model, tasks, choices) for model in models]
    for run in runs:
        terminal.table(SCORES, _scores(run), run.name)
    if len(runs) == 2:
        both = Comparison(*runs)
        terminal.table(DIFFERENCES, both.rows, both.title)
    terminal.table(
        ("model", "parameters in memory", "tokens/s scored", "J/token measured",
         "J/token of the arithmetic, modelled"),
        [run.cost for run in runs],
    )  # fmt: skip
    return runs


def run_tasks(
    model: Transformer, name: str, tasks: Sequence[Task | Exercises], choices: Choices
) -> Run:
    """Score a model.

    Raises:
        ValueError: see `score_task` and `answer_exercises`.
    """
    digest = fingerprint(model) if choices.folder is not None else ""
    scorer, complete = RequestScorer(model), completer(model)
    meter, start, made = PackageMeter(), time.perf_counter(), []
    for task in tasks:
        header = {"task": task.name, "model": digest}
        if isinstance(task, Exercises):
            header |= asdict(choices.exercises)
            answers = answer_exercises(
                complete, task, choices.exercises, choices.limit,
                Records(choices.folder, header, Answer) if choices.folder is not None else None,
                choices.run_code,
            )  # fmt: skip
            made.append({"": values_of(answers)})
            continue
        header |= asdict(choices.questions)
        records = Records(choices.folder, header, Record) if choices.folder is not None else None
        found = score_task(scorer, model.tokenizer, task, choices.questions, choices.limit, records)
        made.append({group: metrics(members) for group, members in groups(found).items()})
    seconds = time.perf_counter() - start
    joules = "-"
    if meter.readable and scorer.tokens:
        joules = f"{meter.joules() / scorer.tokens:.3g}"
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    speed = f"{scorer.tokens / seconds:,.0f}" if scorer.tokens else "-"
    modelled = f"{sum(modelled_joules(model, 1).values()):.3g}"
    cost = name, terminal.size(size), speed, joules, modelled
    return Run(name, made, cost, tuple(task.name for task in tasks))


def completer(model: Transformer) -> Complete:
    """What completes prompts with a model; nothing is compiled before the first."""
    generators: list[Generator] = []

    def complete(prompts: Sequence[Prompt]) -> list[str]:
        if not generators:
            generators.append(Generator(model))
        params = [
            SamplingParams(p.max_new_tokens, p.temperature, seed=p.seed, stop=p.stop)
            for p in prompts
        ]
        return [made.text for made in generators[0].generate([p.text for p in prompts], params)]

    return complete


def _scores(run: Run) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for task, results in zip(run.tasks, run.results, strict=True):
        for group, columns in results.items():
            for name, values in columns.items():
                mean = Mean.of(values)
                label = f"{task} {group}".strip()
                rows.append(
                    (label, f"{mean.items:,}", name, f"{mean.value:.4f} ± {mean.error:.4f}")
                )
    return rows


def _differences(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    rows, tested = [], []
    for task, first, second in zip(runs[0].tasks, runs[0].results, runs[1].results, strict=True):
        ours, theirs = first[""], second[""]
        for name, a in ours.items():
            b = theirs[name]
            low, high = bootstrap_interval(a, b)
            means = Mean.of(a).value, Mean.of(b).value
            shown = f"{means[0]:.4f}", f"{means[1]:.4f}", f"{means[1] - means[0]:+.4f}"
            rows.append([task, name, *shown, f"{low:+.4f} to {high:+.4f}", "-"])
            if {*a, *b} <= {0.0, 1.0}:  # right or wrong
                tested.append((rows[-1], mcnemar(a, b)))
    for (row, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        row[-1] = f"{p:.2g}"
    return [tuple(row) for row in rows]
