"""Run a plan: one process a job, any number at once, and a row of the table for each finished run.

    DIR/table.csv        finished runs (`bitjax.scaling.table`)
    DIR/table.md         what its columns mean
    DIR/sweeps.csv       the learning rates that were tried, and those chosen
    DIR/curves/RUN.json  training loss over steps, and held-out nats of each document
    DIR/runs, sweeps     working folders: checkpoints, logs, results

The tables alone say what is done. A process killed at any instant loses the steps since a
checkpoint, and no run: a run is trained by its own folder's checkpoints (`bitjax.train`), scored,
written as a result, and added to the table, each step of which is done again if it was not whole.
Working folders may be deleted: what needs a float run's weights then trains it again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitjax.replacing import replace_text
from bitjax.scaling.arms import ARMS, configuration
from bitjax.scaling.jobs import POLL, Job, end, interruptible, shares
from bitjax.scaling.plan import Plan, PlannedRun, PlannedSweep, hours
from bitjax.scaling.records import Recorder, code_commit, curve
from bitjax.scaling.sweep import Trial, best_rate, next_rates, read_sweeps, write_sweeps
from bitjax.scaling.table import append_row, card, locked, read_table
from bitjax.scaling.worker import DIVERGED, start
from bitjax.train import Interrupted

TELL = 60.0  # seconds between lines on what is under way
Say = Callable[[str], None]
Busy = set[Any]  # names of runs, and (size, arm) of sweeps


def run_plan(
    plan: Plan, data: str, directory: Path, jobs: int, say: Say, retry: bool = False
) -> None:
    """Do what is left of a plan.

    Args:
        plan: of `bitjax scale plan`.
        data: path of the corpus or text; its identity must be the plan's.
        directory: of the tables.
        jobs: processes at once.
        say: told each finished run, and now and then what is under way.
        retry: whether runs that failed before are tried again.

    Raises:
        ValueError: another corpus, rows of other settings, another process at work there, or runs
            that failed; the others are done.
        Interrupted: SIGINT or SIGTERM; everything is saved.
    """
    slots = shares(jobs)
    recorder = Recorder(plan, data, directory)  # before anything is written
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with locked(directory / "run.lock", wait=False), interruptible() as stopped:
            _Study(plan, recorder, directory, say, retry).go(slots, stopped)
    except BlockingIOError:
        raise ValueError(f"another `bitjax scale run` is at work in {directory}") from None


class _Study:
    """A plan under way in one directory."""

    def __init__(
        self, plan: Plan, recorder: Recorder, directory: Path, say: Say, retry: bool
    ) -> None:
        self._plan, self._directory, self._say, self._retry = plan, directory, say, retry
        self._recorder = recorder
        self._by_name = {run.run: run for run in plan.runs}
        self._table = directory / "table.csv"
        self._rows = read_table(self._table) if self._table.exists() else []
        for row in self._rows:
            if row.run in self._by_name:
                self._recorder.require_same_settings(row)
        self._done = {row.run for row in self._rows}
        self._trials = read_sweeps(directory / "sweeps.csv")
        self._failed: dict[str, str] = {}
        self._spent, self._predicted = 0.0, 0.0  # seconds of the jobs that have ended
        self._commit = code_commit()

    def go(self, slots: list[list[int]], stopped: list[int]) -> None:
        """Keep every slot busy until nothing is left."""
        active: list[Job] = []
        said = time.monotonic()
        try:
            while True:
                for slot in sorted({*range(len(slots))} - {job.slot for job in active}):
                    job = self._next(active, slot, slots[slot])
                    if job is not None:
                        active.append(job)
                if not active:
                    break
                time.sleep(POLL)
                if stopped:
                    raise Interrupted(f"stopped; {self._count()} runs are in {self._table}")
                for job in [job for job in active if job.process.poll() is not None]:
                    active.remove(job)
                    self._finished(job)
                if time.monotonic() - said > TELL:
                    said = time.monotonic()
                    self._say(self._under_way(active, len(slots)))
        finally:
            end(active, stopped)
        if self._failed:
            name, why = next(iter(self._failed.items()))
            raise ValueError(
                f"{len(self._failed)} of {len(self._plan.runs)} runs failed, {name} first: {why}"
            )

    def _count(self) -> str:
        return f"{len(self._done & {*self._by_name})} of {len(self._by_name)}"

    # What to do next.

    def _next(self, active: Sequence[Job], slot: int, cores: list[int]) -> Job | None:
        """The first job in the plan's order that can begin."""
        busy: Busy = {job.run.run for job in active if job.run}
        busy |= {(job.sweep.size, job.sweep.arm) for job in active if job.sweep}
        for run in self._plan.runs:
            if run.run in busy or run.run in self._failed or run.run in self._done:
                continue
            first = self._by_name.get(run.after)
            wanted = run
            if first is not None and not self._has_weights(first):
                if first.run in self._failed:
                    self._fail(run.run, f"{first.run} failed, which it needs")
                if first.run in busy or first.run in self._failed:
                    continue
                wanted = first
            if job := self._start(wanted, busy, slot, cores):
                return job
        return None

    def _start(self, run: PlannedRun, busy: Busy, slot: int, cores: list[int]) -> Job | None:
        """The run, or first the sweep that it needs; None if that is under way, or has failed."""
        rate_of = ARMS[run.arm].rate_of
        if rate_of:
            sweep = next(s for s in self._plan.sweeps if (s.size, s.arm) == (run.size, rate_of))
            if (sweep.size, sweep.arm) in busy:
                return None
            study = self._plan.study
            try:
                rates = next_rates(self._tried(sweep.size, rate_of), study.rates, study.extensions)
            except ValueError as error:
                self._fail(run.run, str(error))
                return None
            if rates:
                return self._start_sweep(sweep, rates, slot, cores)
        folder = self._recorder.folder(run)
        why = folder / "failed.txt"
        if why.exists() and not self._retry:
            self._fail(run.run, why.read_text(encoding="utf-8"))
            return None
        folder.mkdir(parents=True, exist_ok=True)
        task = self._task(run, folder)
        process = start(folder, cores, [task], self._commit)
        return Job(run.run, run.seconds, process, folder, slot, [folder], run=run)

    def _task(self, run: PlannedRun, folder: Path) -> dict[str, Any]:
        """What a worker is told of a run."""
        result = folder / "result.json"
        if run.run in self._done:  # only its weights are wanted again
            result = folder / "again.json"
            result.unlink(missing_ok=True)
        rounded, trained = ARMS[run.arm].rounded, run
        if rounded:
            trained = self._by_name[run.after]
        config = self._recorder.config(trained, self._rate(trained))
        task = {
            "kind": "train", "directory": str(self._recorder.folder(trained)),
            "config": dataclasses.asdict(config), "result": str(result),
        }  # fmt: skip
        return task | {"kind": "round", "to": rounded} if rounded else task

    def _start_sweep(
        self, sweep: PlannedSweep, rates: Sequence[float], slot: int, cores: list[int]
    ) -> Job:
        name = f"{sweep.size}-{sweep.arm}"
        folder = (self._directory / "sweeps" / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        tasks = []
        for rate in rates:
            config = configuration(
                self._recorder.base, self._plan.study, sweep.arm, sweep.size, sweep.steps, 0, rate
            )
            tasks.append({
                "kind": "train", "directory": str(folder / str(rate)),
                "config": dataclasses.asdict(config),
                "result": str(folder / str(rate) / "result.json"),
            })  # fmt: skip
        process = start(folder, cores, tasks, self._commit)
        weight = sweep.seconds * len(rates) / len(self._plan.study.rates)
        trained = [folder / str(rate) for rate in rates]  # every digit: it is read back
        return Job(f"sweep {name}", weight, process, folder, slot, trained, sweep=sweep)

    def _has_weights(self, run: PlannedRun) -> bool:
        done = run.run in self._done
        return done and (self._recorder.folder(run) / "checkpoints" / str(run.steps)).is_dir()

    def _tried(self, size: str, arm: str) -> dict[float, float]:
        return {t.learning_rate: t.loss for t in self._trials if (t.size, t.arm) == (size, arm)}

    def _rate(self, run: PlannedRun) -> float:
        """As its sweep says; of a run that is done, as its row says."""
        for row in self._rows:
            if row.run == run.run:
                return row.learning_rate
        if ARMS[run.arm].rounded:
            return self._rate(self._by_name[run.after])
        return best_rate(self._tried(run.size, ARMS[run.arm].rate_of))

    # What comes back.

    def _finished(self, job: Job) -> None:
        if job.sweep is not None:
            self._sweep_finished(job, job.sweep)
        elif job.run is not None and job.process.returncode == 0:
            self._run_finished(job.run)
        elif job.run is not None:
            self._fail(job.run.run, job.complaint())
        self._predicted += job.weight

    def _sweep_finished(self, job: Job, sweep: PlannedSweep) -> None:
        known = self._tried(sweep.size, sweep.arm)
        train = self._recorder.base.train
        added = []
        for folder in job.trained:
            path, rate = folder / "result.json", float(folder.name)
            if rate in known or not path.exists():
                continue
            made = json.loads(path.read_text(encoding="utf-8"))
            failed = made["status"] == DIVERGED
            self._spent += 0.0 if failed else made["seconds"]
            added.append(Trial(
                sweep.size, sweep.arm, sweep.steps * train.batch_size * train.seq_len, rate,
                math.inf if failed else made["loss"], 0.0 if failed else made["error"],
                0.0 if failed else round(made["seconds"], 1),
            ))  # fmt: skip
        if not added:
            for run in self._plan.runs:
                if (run.size, ARMS[run.arm].rate_of) == (sweep.size, sweep.arm):
                    self._fail(run.run, f"its sweep failed: {job.complaint()}")
            return
        self._trials = sorted(
            [*self._trials, *added],
            key=lambda t: (*map(int, t.size.split("x")), t.arm, t.learning_rate),
        )
        write_sweeps(self._directory / "sweeps.csv", self._trials)
        shown = ", ".join(f"{t.learning_rate:g}: {t.loss:.4f}" for t in added)
        self._say(f"learning rates of {sweep.size} {sweep.arm}: {shown}")

    def _run_finished(self, run: PlannedRun) -> None:
        if run.run in self._done:
            return
        folder = self._recorder.folder(run)
        result = folder / "result.json"
        made = json.loads(result.read_text(encoding="utf-8"))
        if made["status"] == DIVERGED:
            replace_text(folder / "failed.txt", made["why"])
            result.unlink()
            self._fail(run.run, made["why"])
            return
        row = self._recorder.row(run, self._rate(run), made)
        (self._directory / "curves").mkdir(exist_ok=True)
        replace_text(self._directory / row.curve, curve(made))
        append_row(self._table, row)
        self._rows.append(row)
        self._done.add(run.run)
        replace_text(self._directory / "table.md", card(self._rows))
        self._spent += made["seconds"]
        self._say(
            f"[{self._count()}] {run.run}: loss {row.loss:.4f} ± {row.loss_se:.4f}, learning rate "
            f"{row.learning_rate:g}, {hours(row.seconds)}"
        )

    def _fail(self, name: str, why: str) -> None:
        if name not in self._failed:
            self._failed[name] = why.strip()
            self._say(f"{name} failed: {why.strip()}")

    # What a person is told meanwhile.

    def _under_way(self, active: Sequence[Job], slots: int) -> str:
        """What runs now, how far it is, and when all will be done."""
        shares_done = [(job, job.progress()) for job in active]
        parts = ", ".join(f"{job.what} {100 * share:.0f} %" for job, share in shares_done)
        left = self._left() - sum(job.weight * share for job, share in shares_done)
        slower = self._spent / self._predicted if self._spent and self._predicted else 1.0
        return f"{parts}; about {hours(max(0.0, left) * slower / slots)} left"

    def _left(self) -> float:
        """Predicted seconds of what has not ended."""
        over = self._done | {*self._failed}
        runs = sum(run.seconds for run in self._plan.runs if run.run not in over)
        grid = self._plan.study.rates
        return runs + sum(
            s.seconds * sum(rate not in self._tried(s.size, s.arm) for rate in grid) / len(grid)
            for s in self._plan.sweeps
        )
