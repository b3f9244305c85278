"""Processes at work on a plan: their cores, how far they are, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bitjax.scaling.plan import PlannedRun, PlannedSweep
from bitjax.scaling.worker import LOST
from bitjax.train import read_metrics

POLL = 0.2  # seconds between looks at processes


@dataclass
class Job:
    """A process at work.

    Attributes:
        what: for a person.
        weight: predicted seconds.
        process: of `bitjax.scaling.worker`.
        folder: of its files.
        slot: whose cores it has.
        trained: folders of the runs it trains or reads.
        run, sweep: what it is for, one of them.
    """

    what: str
    weight: float
    process: subprocess.Popen[bytes]
    folder: Path
    slot: int
    trained: list[Path]
    run: PlannedRun | None = None
    sweep: PlannedSweep | None = None

    def progress(self) -> float:
        """Fraction of its steps, from what its runs report."""
        done = 0.0
        for folder in self.trained:
            records, config = read_metrics(folder), folder / "config.json"
            if records and config.exists():
                steps = json.loads(config.read_text(encoding="utf-8"))["train"]["steps"]
                done += records[-1]["step"] / steps
        return min(1.0, done / max(1, len(self.trained)))

    def complaint(self) -> str:
        """What a process said last that failed."""
        code = self.process.returncode
        if code == LOST:
            return "another process works in its folder"
        log = self.folder / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"its process ended with code {code}"


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


def end(active: Sequence[Job], signals: Sequence[int]) -> None:
    """Tell processes to save their state, and wait; after a second signal no longer."""
    for job in active:
        job.process.terminate()
    while any(job.process.poll() is None for job in active) and len(signals) < 2:
        time.sleep(POLL)
    for job in active:
        job.process.kill()
        job.process.wait()


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM put their numbers in."""
    seen: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        seen.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
