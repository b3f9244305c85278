"""Plans: which runs a study has, and how long each will take.

A cell is a size, a number of tokens and a seed, with a run of every arm: arms are always paired.
Cells come from the groups of a `StudyConfig` or from a design, and a budget keeps the cheapest:

    ratios      D = r N for every size and ratio
    factorial   the same token counts for every size, so that log N and log D are uncorrelated
    isoflop     a few levels of compute, each spent on several sizes

A plan is a JSON file. It names its corpus by checksum, not by path, and holds no result.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bitjax.config import Group, RunConfig, StudyConfig, from_dict
from bitjax.scaling.arms import ARMS, arm_named, non_embedding, shape, whole_steps
from bitjax.scaling.calibrate import Calibration
from bitjax.train.flops import flops_per_token

FORMAT = 1


@dataclass(frozen=True)
class PlannedRun:
    """One run.

    Attributes:
        run: its name.
        arm, size, seed: of the cell.
        steps: that it trains itself; 0 of a rounded run.
        tokens: D of its row.
        after: name of the float run that it rounds or starts from; empty: none.
        seconds: predicted.
        flops: of its own steps.
    """

    run: str
    arm: str
    size: str
    seed: int
    steps: int
    tokens: int
    after: str
    seconds: float
    flops: float


@dataclass(frozen=True)
class PlannedSweep:
    """Short runs for one size and arm; `seconds` and `flops` of all rates of the grid together."""

    size: str
    arm: str
    steps: int
    seconds: float
    flops: float


@dataclass(frozen=True)
class Plan:
    """A study, ready to run.

    Attributes:
        recipe: of the ternary run; its data is where `bitjax scale run` looks unless told.
        study: its settings.
        corpus: {"name", "data", "validation", "train_tokens", "tokens"}: identities and sizes.
        calibrations: what the predictions rest on.
        sweeps, runs: in the order they are done.
    """

    recipe: RunConfig
    study: StudyConfig
    corpus: dict[str, Any]
    calibrations: list[Calibration] = field(default_factory=list)
    sweeps: list[PlannedSweep] = field(default_factory=list)
    runs: list[PlannedRun] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of everything, one job at a time."""
        return sum(s.seconds for s in self.sweeps) + sum(r.seconds for r in self.runs)

    @property
    def flops(self) -> float:
        """Of all training."""
        return sum(s.flops for s in self.sweeps) + sum(r.flops for r in self.runs)


Cell = tuple[str, int, int]  # size, steps, seed
Cells = dict[Cell, list[str]]  # arms of each


def cells_of(base: RunConfig, groups: Iterable[Group]) -> Cells:
    """The union of groups; a cell has the arms of every group that it is in."""
    cells: Cells = {}
    for group in groups:
        for arm in group.arms:
            arm_named(arm)
        for size in group.sizes:
            N = non_embedding(shape(base.model, size))
            for ratio in group.ratios:
                for seed in range(group.seeds):
                    arms = cells.setdefault((size, whole_steps(base, ratio * N), seed), [])
                    arms += [arm for arm in group.arms if arm not in arms]
    return cells


def factorial(base: RunConfig, group: Group) -> Cells:
    """Token counts that run from the smallest size at the smallest ratio to the largest at the
    largest, in equal factors, one for each ratio; all sizes get all of them."""
    sizes = [non_embedding(shape(base.model, size)) for size in group.sizes]
    low, high = min(group.ratios) * min(sizes), max(group.ratios) * max(sizes)
    levels = max(2, len(group.ratios))
    counts = [low * (high / low) ** (i / (levels - 1)) for i in range(levels)]
    return {
        (size, whole_steps(base, tokens), seed): list(group.arms)
        for size in group.sizes for tokens in counts for seed in range(group.seeds)
    }  # fmt: skip


def isoflop(base: RunConfig, group: Group, levels: Sequence[float]) -> Cells:
    """Cells of equal compute: at each level the sizes whose ratio lies within the group's."""
    cells: Cells = {}
    for flops in levels:
        for size in group.sizes:
            model = shape(base.model, size)
            tokens = flops / flops_per_token(model, base.train.seq_len)
            if min(group.ratios) <= tokens / non_embedding(model) <= max(group.ratios):
                for seed in range(group.seeds):
                    cells[size, whole_steps(base, tokens), seed] = list(group.arms)
    return cells


@dataclass(frozen=True)
class Budget:
    """What a plan may cost.

    Attributes:
        limit: in `unit`.
        unit: "seconds" of one job at a time, or "flops" of training.
        said: the budget as it was given.
    """

    limit: float
    unit: Literal["seconds", "flops"]
    said: str

    def amount(self, value: float) -> str:
        """For a person."""
        return hours(value) if self.unit == "seconds" else f"{value:.3g} FLOPs"


class Planner:
    """Turns cells into runs and sweeps with predicted times.

    Args:
        base: the recipe's run.
        study: its settings.
        scored: held-out tokens.
        calibrated: (size, arm) -> what was measured, for trained arms.
    """

    def __init__(
        self, base: RunConfig, study: StudyConfig, scored: int,
        calibrated: Callable[[str, str], Calibration],
    ) -> None:  # fmt: skip
        self._base, self._study, self._scored = base, study, scored
        self._calibrated = calibrated
        self._of_step = base.train.batch_size * base.train.seq_len

    def runs(self, cell: Cell, arms: Sequence[str]) -> list[PlannedRun]:
        """The runs of a cell, and the float runs that they need, those first."""
        size, steps, seed = cell
        made: dict[str, PlannedRun] = {}

        def add(arm: str, all_steps: int, own: int, after: str = "") -> str:
            tokens = all_steps * self._of_step
            name = f"{size}-{tokens}-s{seed}-{arm}"
            rates = self._calibrated(size, ARMS[arm].rate_of or "float")
            seconds = rates.seconds(own * self._of_step, self._scored)
            made.setdefault(name, PlannedRun(
                name, arm, size, seed, own, tokens, after, seconds, own * self._flops(size)
            ))  # fmt: skip
            return name

        for arm in sorted(arms, key=list(ARMS).index):
            if ARMS[arm].rounded:
                add(arm, steps, 0, add("float", steps, steps))
            elif ARMS[arm].continued:
                first = max(1, round(self._study.continual_fraction * steps))
                add(arm, steps, max(2, steps - first), add("float", first, first))
            else:
                add(arm, steps, steps)
        return list(made.values())

    def sweeps(self, runs: Iterable[PlannedRun]) -> list[PlannedSweep]:
        """The sweeps that runs need."""
        wanted = dict.fromkeys((r.size, ARMS[r.arm].rate_of) for r in runs if ARMS[r.arm].rate_of)
        return [self._sweep(size, arm) for size, arm in wanted]

    def _sweep(self, size: str, arm: str) -> PlannedSweep:
        study = self._study
        N = non_embedding(shape(self._base.model, size))
        steps = whole_steps(self._base, min(study.sweep_ratio * N, study.sweep_tokens))
        rates = self._calibrated(size, arm)
        each = rates.seconds(steps * self._of_step, self._scored)
        count = len(study.rates)
        return PlannedSweep(size, arm, steps, count * each, count * steps * self._flops(size))

    def _flops(self, size: str) -> float:
        """Of a step."""
        model = shape(self._base.model, size)
        return self._of_step * flops_per_token(model, self._base.train.seq_len)

    def cost(self, cells: Cells, unit: str = "seconds") -> float:
        """Of all runs and sweeps."""
        runs, sweeps = self.all(cells)
        return float(sum(getattr(x, unit) for x in (*runs, *sweeps)))

    def all(self, cells: Cells) -> tuple[list[PlannedRun], list[PlannedSweep]]:
        """Every run once, cheapest cells first, and the sweeps."""
        by_cell = sorted(
            (self.runs(cell, arms) for cell, arms in cells.items()),
            key=lambda runs: (sum(r.seconds for r in runs), runs[0].run),
        )
        runs = {r.run: r for found in by_cell for r in found}
        return list(runs.values()), self.sweeps(runs.values())

    def within(self, cells: Cells, budget: Budget) -> Cells:
        """The cheapest cells that fit, each whole.

        Raises:
            ValueError: not one fits.
        """
        kept: Cells = {}
        for cell in self._by_cost(cells, budget):
            if self.cost(kept | {cell: cells[cell]}, budget.unit) > budget.limit:
                break
            kept[cell] = cells[cell]
        if not kept:
            self._refuse(cells, budget)
        return kept

    def _by_cost(self, cells: Cells, budget: Budget) -> list[Cell]:
        return sorted(cells, key=lambda cell: (self.cost({cell: cells[cell]}, budget.unit), cell))

    def _refuse(self, cells: Cells, budget: Budget) -> None:
        cell = self._by_cost(cells, budget)[0]
        size, steps, _ = cell
        needed = self.cost({cell: cells[cell]}, budget.unit)
        raise ValueError(
            f"the budget of {budget.said} fits no run: the cheapest cell, {size} with "
            f"{steps * self._of_step:,} tokens ({', '.join(cells[cell])}, and their learning-rate "
            f"sweeps), takes {budget.amount(needed)}"
        )

    def isoflop_within(self, group: Group, levels: int, budget: Budget) -> Cells:
        """The most compute whose levels, each a third of the one above, fit.

        Raises:
            ValueError: not even the cheapest cell of the group fits.
        """
        shapes = [shape(self._base.model, size) for size in group.sizes]
        T = self._base.train.seq_len
        each = [flops_per_token(model, T) * non_embedding(model) for model in shapes]
        low = math.log(min(each) * min(group.ratios))
        high = math.log(max(each) * max(group.ratios) * 3.0**levels)

        def made(log_flops: float) -> Cells:
            top = math.exp(log_flops)
            return isoflop(self._base, group, [top / 3**i for i in range(levels)])

        for _ in range(40):  # halvings: more than enough for a step of a run
            middle = (low + high) / 2
            fits = self.cost(made(middle), budget.unit) <= budget.limit
            low, high = (middle, high) if fits else (low, middle)
        cells = made(low)
        if not cells or self.cost(cells, budget.unit) > budget.limit:
            self._refuse(cells_of(self._base, [group]), budget)
        return cells


def hours(seconds: float) -> str:
    """For a person: `2.5 h`, `12.0 min` or `30 s`."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def to_json(plan: Plan) -> str:
    """The file of a plan, an entry a line."""
    held = dataclasses.asdict(plan)
    lists = {name: held.pop(name) for name in ("calibrations", "sweeps", "runs")}
    text = json.dumps({"format": FORMAT, **held}, indent=1).removesuffix("\n}")
    for name, entries in lists.items():
        lines = ",\n".join(f"  {json.dumps(_rounded(entry))}" for entry in entries)
        text += f',\n "{name}": [\n{lines}\n ]'
    return text + "\n}\n"


def _rounded(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in entry.items()}


def read_plan(path: Path) -> Plan:
    """A plan's file.

    Raises:
        ValueError: no plan, or a damaged one; naming it.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the plan {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no plan: {error}") from None
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise ValueError(f"{path} is no plan of format {FORMAT}; make one with bitjax scale plan")
    try:
        study = dict(held["study"])
        groups = [
            Group(**{k: _tuple(v) for k, v in group.items()}) for group in study.pop("groups")
        ]
        plan = Plan(
            from_dict(RunConfig, held["recipe"]),
            StudyConfig(groups=tuple(groups), **{k: _tuple(v) for k, v in study.items()}),
            dict(held["corpus"]),
            [Calibration(**entry) for entry in held["calibrations"]],
            [PlannedSweep(**entry) for entry in held["sweeps"]],
            [PlannedRun(**entry) for entry in held["runs"]],
        )
        _check(plan)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is a damaged plan: {error}") from None
    return plan


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(plan: Plan) -> None:
    names = [run.run for run in plan.runs]
    if len(set(names)) != len(names):
        raise ValueError("a run is there twice")
    swept = {(sweep.size, sweep.arm) for sweep in plan.sweeps}
    for i, run in enumerate(plan.runs):
        if "/" in run.run or run.run.startswith("."):
            raise ValueError(f"the run {run.run!r} has a name that is no file name")
        arm = arm_named(run.arm)
        if arm.rate_of and (run.size, arm.rate_of) not in swept:
            raise ValueError(f"the run {run.run} has no sweep of {run.size}, {arm.rate_of}")
        if (arm.rounded or arm.continued) and not run.after:
            raise ValueError(f"the run {run.run} names no float run that it comes after")
        if run.after and run.after not in names[:i]:
            raise ValueError(f"the run {run.run} comes after {run.after!r}, which is not before it")
    for wanted in ("name", "data", "validation", "train_tokens", "tokens"):
        if wanted not in plan.corpus:
            raise ValueError(f"its corpus has no {wanted}")
