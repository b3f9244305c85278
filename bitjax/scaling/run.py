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
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bitjax.config import RunConfig
from bitjax.scaling.arms import ARMS, configuration, embedding, non_embedding, shape
from bitjax.scaling.plan import Plan, PlannedRun, PlannedSweep, hours
from bitjax.scaling.score import HeldOut, held_out
from bitjax.scaling.sweep import Trial, best_rate, next_rates, read_sweeps, write_sweeps
from bitjax.scaling.table import Row, append_row, card, locked, read_table, replace_file
from bitjax.scaling.worker import DIVERGED, LOST, start
from bitjax.train import Interrupted, read_metrics
from bitjax.train.flops import flops_per_token

POLL = 0.2  # seconds
Say = Callable[[str], None]


@dataclass
class Job:
    """A process at work."""

    what: str
    weight: float  # predicted seconds
    process: subprocess.Popen[bytes]
    log: Path
    slot: int
    folders: list[Path]  # where it trains
    run: PlannedRun | None = None
    sweep: PlannedSweep | None = None


def shares(jobs: int) -> list[list[int]]:
    """Cores of each of so many jobs: equal and disjoint.

    Raises:
        ValueError: more jobs than cores.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = cores or list(range(os.cpu_count() or 1))
    if not 1 <= jobs <= len(cores):
        raise ValueError(f"--jobs {jobs}: there are {len(cores)} cores, and a job needs one")
    each = len(cores) // jobs
    return [cores[i * each : (i + 1) * each] for i in range(jobs)]


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
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with locked(directory / "run.lock", wait=False), _interruptible() as stopped:
            _Study(plan, data, directory, say, retry).go(slots, stopped)
    except BlockingIOError:
        raise ValueError(f"another `bitjax scale run` is at work in {directory}") from None


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM put their number in."""
    seen: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        seen.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Study:
    """A plan under way in one directory."""

    def __init__(self, plan: Plan, data: str, directory: Path, say: Say, retry: bool) -> None:
        self._plan, self._directory, self._say = plan, directory, say
        self._base = dataclasses.replace(
            plan.recipe, data=dataclasses.replace(plan.recipe.data, text=data)
        )
        self._held = held_out(self._base)
        _require_same_data(plan, self._held, data)
        self._table = directory / "table.csv"
        self._rows = read_table(self._table) if self._table.exists() else []
        self._done = {row.run for row in self._rows}
        self._trials = read_sweeps(directory / "sweeps.csv")
        self._failed: dict[str, str] = {}
        self._retry = retry
        self._by_name = {run.run: run for run in plan.runs}
        self._spent, self._predicted = 0.0, 0.0  # seconds of finished jobs
        self._commit = _commit()
        for row in self._rows:
            if row.run in self._by_name:
                _require_same_settings(
                    row, self._settings(self._by_name[row.run], row.learning_rate)
                )

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
                    raise Interrupted(
                        f"stopped; {len(self._done)} of {len(self._plan.runs)} runs are in "
                        f"{self._table}"
                    )
                for job in [job for job in active if job.process.poll() is not None]:
                    active.remove(job)
                    self._finished(job)
                if time.monotonic() - said > 60:
                    said = time.monotonic()
                    self._say(self._under_way(active, len(slots)))
        finally:
            _end(active)
        if self._failed:
            name, why = next(iter(self._failed.items()))
            raise ValueError(
                f"{len(self._failed)} of {len(self._plan.runs)} runs failed, {name} first: {why}"
            )

    # What to do next.

    def _next(self, active: Sequence[Job], slot: int, cores: list[int]) -> Job | None:
        busy = {job.run.run for job in active if job.run} | {
            (job.sweep.size, job.sweep.arm) for job in active if job.sweep
        }
        for run in self._plan.runs:
            if run.run in busy or run.run in self._failed or run.run in self._done:
                continue
            if run.after:
                first = self._by_name[run.after]
                if first.run in self._failed:
                    self._fail(run.run, f"{first.run} failed, which it needs")
                    continue
                if not self._has_weights(first):
                    if first.run not in busy and (job := self._start(first, busy, slot, cores)):
                        return job
                    continue
            if job := self._start(run, busy, slot, cores):
                return job
        return None

    def _start(self, run: PlannedRun, busy: set[Any], slot: int, cores: list[int]) -> Job | None:
        """The run, or first the sweep that it needs; None if that is under way, or has failed."""
        if ARMS[run.arm].rate_of:
            sweep = next(
                s for s in self._plan.sweeps if (s.size, s.arm) == (run.size, ARMS[run.arm].rate_of)
            )
            if (sweep.size, sweep.arm) in busy:
                return None
            try:
                rates = next_rates(
                    self._tried(sweep), self._plan.study.rates, self._plan.study.extensions
                )
            except ValueError as error:
                self._fail(run.run, str(error))
                return None
            if rates:
                return self._start_sweep(sweep, rates, slot, cores)
        folder = self._folder(run)
        why = folder / "failed.txt"
        if why.exists() and not self._retry:
            self._fail(run.run, why.read_text(encoding="utf-8"))
            return None
        if ARMS[run.arm].rounded:
            first = self._by_name[run.after]
            task = {
                "kind": "round", "to": ARMS[run.arm].rounded,
                "directory": str(self._folder(first)),
                "config": dataclasses.asdict(self._config(first, self._rate(first))),
            }  # fmt: skip
        else:
            config = self._config(run, self._rate(run))
            task = {
                "kind": "train", "directory": str(folder), "config": dataclasses.asdict(config),
            }  # fmt: skip
        result = folder / "result.json"
        if run.run in self._done:  # only its weights are wanted again
            result = folder / "again.json"
            result.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        return self._job(run.run, run.seconds, [task | {"result": str(result)}], folder, slot,
                         cores, run=run)  # fmt: skip

    def _start_sweep(
        self, sweep: PlannedSweep, rates: Sequence[float], slot: int, cores: list[int]
    ) -> Job:
        tasks = []
        for rate in rates:
            config = configuration(
                self._base, self._plan.study, sweep.arm, sweep.size, sweep.steps, 0, rate
            )
            folder = self._trial(sweep, rate)
            tasks.append({
                "kind": "train", "directory": str(folder), "config": dataclasses.asdict(config),
                "result": str(folder / "result.json"),
            })  # fmt: skip
        name = f"{sweep.size}-{sweep.arm}"
        folder = self._directory / "sweeps" / name
        folder.mkdir(parents=True, exist_ok=True)
        weight = sweep.seconds * len(rates) / len(self._plan.study.rates)
        return self._job(f"sweep {name}", weight, tasks, folder, slot, cores, sweep=sweep)

    def _job(
        self, what: str, weight: float, tasks: list[dict[str, Any]], folder: Path, slot: int,
        cores: list[int], run: PlannedRun | None = None, sweep: PlannedSweep | None = None,
    ) -> Job:  # fmt: skip
        process = start(folder, cores, tasks, self._commit)
        folders = [Path(task["directory"]) for task in tasks]
        return Job(what, weight, process, folder / "log.txt", slot, folders, run, sweep)

    # What a run is.

    def _folder(self, run: PlannedRun) -> Path:
        return (self._directory / "runs" / run.run).resolve()

    def _trial(self, sweep: PlannedSweep, rate: float) -> Path:
        name = f"{sweep.size}-{sweep.arm}"
        return (self._directory / "sweeps" / name / f"{rate:g}").resolve()

    def _has_weights(self, run: PlannedRun) -> bool:
        return (self._folder(run) / "checkpoints" / str(run.steps)).is_dir()

    def _tried(self, sweep: PlannedSweep) -> dict[float, float]:
        of = (sweep.size, sweep.arm)
        return {t.learning_rate: t.loss for t in self._trials if (t.size, t.arm) == of}

    def _rate(self, run: PlannedRun) -> float:
        """As its sweep says; of a run that is done, and of a rounded one, what its row says."""
        for row in self._rows:
            if row.run == run.run:
                return row.learning_rate
        if ARMS[run.arm].rounded:
            return self._rate(self._by_name[run.after])
        of = (run.size, ARMS[run.arm].rate_of)
        return best_rate({t.learning_rate: t.loss for t in self._trials if (t.size, t.arm) == of})

    def _config(self, run: PlannedRun, rate: float) -> RunConfig:
        start = str(self._folder(self._by_name[run.after])) if run.after else ""
        return configuration(
            self._base, self._plan.study, run.arm, run.size, run.steps, run.seed, rate, start
        )

    def _settings(self, run: PlannedRun, rate: float) -> dict[str, Any]:
        """What a row says of its run: no path of this machine."""
        arm = ARMS[run.arm]
        of = self._by_name[run.after] if arm.rounded else run
        held = dataclasses.asdict(self._config(of, rate))
        held["data"]["text"] = self._plan.corpus["name"]
        held["train"]["start_from"] = "" if arm.rounded else run.after
        if arm.rounded:
            held["rounded"] = {"run": run.after, "to": arm.rounded}
        found: dict[str, Any] = json.loads(json.dumps(held))  # lists for tuples, as in a row
        return found

    # What comes back.

    def _finished(self, job: Job) -> None:
        code = job.process.returncode
        if job.sweep is not None:
            self._sweep_finished(job, job.sweep)
        elif job.run is not None:
            if code == 0:
                self._run_finished(job.run, job.log.parent)
            else:
                self._fail(job.run.run, _last_line(job.log, code))
        self._predicted += job.weight

    def _sweep_finished(self, job: Job, sweep: PlannedSweep) -> None:
        known = self._tried(sweep)
        of_step = self._base.train.batch_size * self._base.train.seq_len
        added = []
        for folder in job.folders:
            path, rate = folder / "result.json", float(folder.name)
            if rate in known or not path.exists():
                continue
            made = json.loads(path.read_text(encoding="utf-8"))
            failed = made["status"] == DIVERGED
            self._spent += 0.0 if failed else made["seconds"]
            added.append(Trial(
                sweep.size, sweep.arm, sweep.steps * of_step, rate,
                math.inf if failed else made["loss"], 0.0 if failed else made["error"],
                0.0 if failed else round(made["seconds"], 1),
            ))  # fmt: skip
        if not added:
            for run in self._plan.runs:
                if (run.size, ARMS[run.arm].rate_of) == (sweep.size, sweep.arm):
                    self._fail(run.run, _last_line(job.log, job.process.returncode))
            return
        self._trials += added
        self._trials.sort(key=lambda t: (*_numbers(t.size), t.arm, t.learning_rate))
        write_sweeps(self._directory / "sweeps.csv", self._trials)
        shown = ", ".join(f"{t.learning_rate:g}: {t.loss:.4f}" for t in added)
        self._say(f"learning rates of {sweep.size} {sweep.arm}: {shown}")

    def _run_finished(self, run: PlannedRun, folder: Path) -> None:
        if run.run in self._done:
            return
        made = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if made["status"] == DIVERGED:
            (folder / "failed.txt").write_text(made["why"], encoding="utf-8")
            (folder / "result.json").unlink()
            self._fail(run.run, made["why"])
            return
        row = self._row(run, made)
        curves = self._directory / "curves"
        curves.mkdir(exist_ok=True)
        replace_file(self._directory / row.curve, _curve(made))
        append_row(self._table, row)
        self._rows.append(row)
        self._done.add(run.run)
        replace_file(self._directory / "table.md", card(self._rows))
        self._spent += made["seconds"]
        self._say(
            f"[{len(self._done)}/{len(self._plan.runs)}] {run.run}: loss {row.loss:.4f} ± "
            f"{row.loss_se:.4f}, learning rate {row.learning_rate:g}, {hours(row.seconds)}"
        )

    def _row(self, run: PlannedRun, made: Mapping[str, Any]) -> Row:
        rate = self._rate(run)
        model = shape(self._base.model, run.size)
        T = self._base.train.seq_len
        return Row(
            run=run.run, arm=run.arm, hidden_size=model.hidden_size, num_layers=model.num_layers,
            N=non_embedding(model), embedding_parameters=embedding(model), D=run.tokens,
            flops=flops_per_token(model, T) * run.tokens, seed=run.seed, learning_rate=rate,
            loss=made["loss"], loss_se=made["error"], bits_per_byte=made["bits_per_byte"],
            tokenizer=self._held.tokenizer, data=self._held.data,
            validation=self._held.identity, ended=True, status="finished",
            seconds=round(made["seconds"], 1), commit=made["commit"],
            config=json.dumps(self._settings(run, rate), separators=(",", ":")),
            curve=f"curves/{run.run}.json",
        )  # fmt: skip

    def _fail(self, name: str, why: str) -> None:
        if name not in self._failed:
            self._failed[name] = why.strip()
            self._say(f"{name} failed: {why.strip()}")

    def _under_way(self, active: Sequence[Job], slots: int) -> str:
        """What runs now, how far it is, and when all will be done."""
        parts, advanced = [], 0.0
        for job in active:
            share = _progress(job)
            advanced += job.weight * share
            parts.append(f"{job.what} {100 * share:.0f} %")
        left = self._left(active) - advanced
        slower = self._spent / self._predicted if self._predicted else 1.0
        return f"{', '.join(parts)}; about {hours(max(0.0, left) * max(slower, 0.1) / slots)} left"

    def _left(self, active: Sequence[Job]) -> float:
        runs = sum(r.seconds for r in self._plan.runs
                   if r.run not in self._done and r.run not in self._failed)  # fmt: skip
        grid = self._plan.study.rates
        sweeps = sum(
            s.seconds * sum(rate not in self._tried(s) for rate in grid) / len(grid)
            for s in self._plan.sweeps
        )
        return runs + sweeps


def _end(active: Sequence[Job]) -> None:
    """Tell processes to save their state, and wait."""
    for job in active:
        job.process.terminate()
    for job in active:
        job.process.wait()


def _progress(job: Job) -> float:
    """Fraction of a job's steps, from what its runs report."""
    done = 0.0
    for folder in job.folders:
        records = read_metrics(folder)
        config = folder / "config.json"
        if records and config.exists():
            steps = json.loads(config.read_text(encoding="utf-8"))["train"]["steps"]
            done += records[-1]["step"] / steps
    return min(1.0, done / max(1, len(job.folders)))


def _curve(made: Mapping[str, Any]) -> str:
    """Five digits are more than a curve's noise."""
    curve = {
        name: [float(f"{x:.5g}") if isinstance(x, float) else x for x in values]
        for name, values in made["curve"].items()
        if any(x is not None for x in values)
    }
    documents = {"tokens": made["tokens"], "nats": [round(x, 2) for x in made["nats"]]}
    return json.dumps({**curve, "documents": documents}, separators=(",", ":")) + "\n"


def _numbers(size: str) -> tuple[int, ...]:
    return tuple(map(int, size.split("x")))


def _last_line(log: Path, code: int) -> str:
    if code == LOST:
        return "another process works in its folder"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"its process ended with code {code}"


def _require_same_data(plan: Plan, held: HeldOut, data: str) -> None:
    for name, found in (("data", held.data), ("validation", held.identity)):
        if plan.corpus[name] != found:
            raise ValueError(
                f"{data or 'the packaged text'} is not the plan's corpus "
                f"{plan.corpus['name']!r}: its {name} identity is {found[:12]}, the plan's "
                f"{plan.corpus[name][:12]}"
            )


def _require_same_settings(row: Row, wanted: dict[str, Any]) -> None:
    differing = [
        f"{section}.{name}"
        for section, values in wanted.items()
        for name, value in values.items()
        if row.settings.get(section, {}).get(name) != value
    ]
    if differing:
        raise ValueError(
            f"the table's run {row.run} was made with other settings than the plan has "
            f"({', '.join(differing[:5])}); use its plan or another directory"
        )


def _commit() -> str:
    """Of the code that runs; + if it was changed since. "unknown" outside a repository."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            made = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return made.stdout.strip() if made.returncode == 0 else None

    if not (found := git("rev-parse", "--short=10", "HEAD")):
        return "unknown"
    return found + ("+" if git("status", "--porcelain", "--", str(folder.parent)) else "")
