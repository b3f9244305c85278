"""Make a plan: measure what is not measured yet, choose runs within a budget, show them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from bitjax import terminal
from bitjax.config import Group, RunConfig, StudyConfig
from bitjax.config.scaling import Design
from bitjax.scaling.arms import ARMS, configuration, non_embedding, shape
from bitjax.scaling.calibrate import Calibration
from bitjax.scaling.jobs import shares
from bitjax.scaling.plan import (
    Budget,
    Cells,
    Plan,
    Planner,
    cells_of,
    factorial,
    hours,
)
from bitjax.scaling.runs import MAX_CORRELATION, MIN_SIZES, collinearity
from bitjax.scaling.score import held_out
from bitjax.scaling.worker import start
from bitjax.train.flops import flops_per_token

# How much better a large model may use the machine than the smallest: before anything large is
# measured, cells that would not fit even so are left out.
OPTIMISM = 8.0
LEVELS = 3  # of compute, of the isoflop design


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a plan is made of.

    Attributes:
        study: its settings and groups.
        design: "ratios" takes the groups as they are; others take the first one's sizes, range of
            ratios, arms and seeds.
        budget: None: everything.
        jobs: processes that will run it.
    """

    study: StudyConfig
    design: Design = "ratios"
    budget: Budget | None = None
    jobs: int = 1


def make_plan(
    recipe: RunConfig, wanted: Wanted, data: str | None = None, known: Sequence[Calibration] = ()
) -> Plan:
    """A plan.

    Args:
        recipe: the ternary run.
        wanted: see there.
        data: path of the corpus, if not the recipe's; no path of it gets into the plan.
        known: calibrations that need not be measured again.

    Raises:
        ValueError: a budget that fits no run, or settings or data that do not fit.
    """
    base = recipe
    if data is not None:
        base = dataclasses.replace(base, data=dataclasses.replace(base.data, text=data))
    held = held_out(base)
    cores = shares(wanted.jobs)[0]
    rates = _Rates(base, wanted.study, cores, known)
    planner = Planner(base, wanted.study, len(held.tokens), rates)
    cells = _cells(base, wanted, planner, rates)
    rates.measure((size, ARMS[arm].rate_of or "float") for (size, _, _), arms in cells.items()
                  for arm in arms)  # fmt: skip
    if wanted.budget is not None and wanted.design != "isoflop":
        cells = planner.within(cells, wanted.budget)
    runs, sweeps = planner.all(cells)
    corpus = {
        "name": Path(base.data.text).name or "packaged text", "data": held.data,
        "validation": held.identity, "tokenizer": held.tokenizer,
        "train_tokens": held.train_tokens, "tokens": len(held.tokens),
    }  # fmt: skip
    return Plan(recipe, wanted.study, corpus, rates.all(), sweeps, runs)


def _cells(base: RunConfig, wanted: Wanted, planner: Planner, rates: _Rates) -> Cells:
    groups, budget = wanted.study.groups, wanted.budget
    if budget is not None:
        groups = _affordable(base, groups, budget, rates)
    if wanted.design == "ratios":
        return cells_of(base, groups)
    group = groups[0]
    if wanted.design == "factorial":
        return factorial(base, group)
    if budget is None:
        raise ValueError("the isoflop design spends a budget; give --hours, --flops or --dollars")
    rates.measure((size, ARMS[a].rate_of or "float") for size in group.sizes for a in group.arms)
    return planner.isoflop_within(group, LEVELS, budget)


def _affordable(
    base: RunConfig, groups: Sequence[Group], budget: Budget, rates: _Rates
) -> tuple[Group, ...]:
    """Without sizes whose cheapest run would not fit on a machine that they use far better than the
    smallest of all, which stays."""
    models = {size: shape(base.model, size) for group in groups for size in group.sizes}
    smallest = min(models, key=lambda size: non_embedding(models[size]))
    T, limit = base.train.seq_len, budget.limit
    if budget.unit == "seconds":
        arm = next(group.arms[0] for group in groups if smallest in group.sizes)
        speed = rates(smallest, ARMS[arm].rate_of or "float").tokens_per_second
        limit *= OPTIMISM * speed * flops_per_token(models[smallest], T)

    def fits(group: Group, size: str) -> bool:
        tokens = min(group.ratios) * non_embedding(models[size])
        return size == smallest or tokens * flops_per_token(models[size], T) <= limit

    kept = [(group, tuple(s for s in group.sizes if fits(group, s))) for group in groups]
    return tuple(dataclasses.replace(group, sizes=sizes) for group, sizes in kept if sizes)


class _Rates:
    """Calibrations, measured when first asked for; call it with a size and an arm."""

    def __init__(
        self, base: RunConfig, study: StudyConfig, cores: list[int], known: Iterable[Calibration]
    ) -> None:
        self._base, self._study, self._cores = base, study, cores
        self._known = {(c.size, c.arm): c for c in known if c.cores == len(cores)}

    def __call__(self, size: str, arm: str) -> Calibration:
        if (size, arm) not in self._known:
            self.measure([(size, arm)])
        return self._known[size, arm]

    def all(self) -> list[Calibration]:
        return list(self._known.values())

    def measure(self, wanted: Iterable[tuple[str, str]]) -> None:
        """All that is not known, in one process with the cores of a job."""
        missing = [key for key in dict.fromkeys(wanted) if key not in self._known]
        if not missing:
            return
        with tempfile.TemporaryDirectory() as name:
            folder, tasks = Path(name), []
            for i, (size, arm) in enumerate(missing):
                config = configuration(self._base, self._study, arm, size, 1000, 0, 1e-3)
                tasks.append({
                    "kind": "calibrate", "config": dataclasses.asdict(config),
                    "result": str(folder / f"{i}.json"),
                })  # fmt: skip
            process = start(folder, self._cores, tasks)
            try:
                self._wait(process, folder, missing)
            finally:
                process.terminate()
                process.wait()
            for i, (size, arm) in enumerate(missing):
                path = folder / f"{i}.json"
                if not path.exists():
                    said = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
                    raise ValueError(f"cannot measure {size}, {arm}: {said[-1] if said else ''}")
                made = json.loads(path.read_text(encoding="utf-8"))
                self._known[size, arm] = Calibration(
                    size, arm, len(self._cores), made["tokens_per_second"],
                    made["scored_per_second"], made["startup"] + made["imports"],
                )  # fmt: skip

    def _wait(
        self, process: subprocess.Popen[bytes], folder: Path, missing: Sequence[tuple[str, str]]
    ) -> None:
        done = 0
        while process.poll() is None:
            while done < len(missing) and (folder / f"{done}.json").exists():
                size, arm = missing[done]
                terminal.console.print(f"measured {size}, {arm}", soft_wrap=True)
                done += 1
            time.sleep(0.1)


def show_plan(plan: Plan, jobs: int) -> None:
    """Print the table of a plan."""
    rows = []
    by_cell: dict[tuple[str, int], list[str]] = {}
    seconds: dict[tuple[str, int], float] = {}
    for run in plan.runs:
        key = run.size, run.tokens
        by_cell.setdefault(key, []).append(run.run)
        seconds[key] = seconds.get(key, 0.0) + run.seconds
    runs = {run.run: run for run in plan.runs}
    for (size, tokens), names in sorted(
        by_cell.items(), key=lambda x: (non_embedding(shape(plan.recipe.model, x[0][0])), x[0][1])
    ):
        N = non_embedding(shape(plan.recipe.model, size))
        counts: dict[str, int] = {}
        for name in names:
            counts[runs[name].arm] = counts.get(runs[name].arm, 0) + 1
        arms = ", ".join(f"{n} {arm}" if n > 1 else arm for arm, n in counts.items())
        rows.append((
            size, f"{N:,}", f"{tokens:,}", f"{tokens / N:.0f}", len(names), arms,
            hours(seconds[size, tokens]),
        ))  # fmt: skip
    columns = ("size", "N", "D", "D/N", "runs", "arms and seeds", "predicted")
    terminal.table(columns, rows, f"{len(plan.runs)} runs on {plan.corpus['name']}")
    sweeps = sum(sweep.seconds for sweep in plan.sweeps)
    wall = f", {hours(plan.seconds / jobs)} with {jobs} jobs at once" if jobs > 1 else ""
    said = (
        f"learning rates: {len(plan.sweeps)} sweeps of {len(plan.study.rates)} runs, "
        f"{hours(sweeps)}\npredicted in all: {hours(plan.seconds)}{wall}; "
        f"{plan.flops:.2e} FLOPs"
    )
    terminal.console.print(said, soft_wrap=True)


def remarks(plan: Plan) -> list[str]:
    """What a fit to the plan's runs will suffer from."""
    model = plan.recipe.model
    cells = {(non_embedding(shape(model, run.size)), run.tokens) for run in plan.runs}
    found = []
    sizes = {n for n, _ in cells}
    if len(sizes) < MIN_SIZES:
        found.append(f"{len(sizes)} sizes: a law of N and D needs {MIN_SIZES} or more")
    correlation = collinearity(*zip(*cells, strict=True))
    if correlation is not None and abs(correlation) > MAX_CORRELATION:
        found.append(
            f"log N and log D are correlated by {correlation:.2f}: a fit cannot tell parameters "
            "from tokens; use more ratios, or --design factorial"
        )
    longest = max(run.tokens for run in plan.runs)
    if longest > plan.corpus["train_tokens"]:
        found.append(
            f"the longest run has {longest:,} tokens and the corpus "
            f"{plan.corpus['train_tokens']:,}: it sees text again"
        )
    return found
