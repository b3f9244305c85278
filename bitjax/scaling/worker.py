"""The process of one job: `python -m bitjax.scaling.worker JOB.json`.

A job is a list of tasks, done one after the other:

    {"cores": [0], "commit": ..., "tasks": [
      {"kind": "calibrate", "config": CONFIG, "result": PATH},
      {"kind": "train", "config": CONFIG, "directory": DIR, "result": PATH},
      {"kind": "round", "config": CONFIG, "directory": DIR of the float run, "to": "int4",
       "result": PATH}]}

A task whose result exists is done. A result is written when it is whole. The process dies with the
one that started it (Linux), after saving the state of what it trains; and no two work in a folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2)
LOST = 3  # exit code: the folder is another process's
DIVERGED = "diverged"


def start(
    folder: Path, cores: list[int], tasks: list[dict[str, Any]], commit: str = ""
) -> subprocess.Popen[bytes]:
    """A process that does these tasks and writes `folder/log.txt`.

    Args:
        folder: of the job's own files.
        cores: that the process may use, where the system can limit it.
        tasks: see the module.
        commit: of the code, noted in results.
    """
    from bitjax.replacing import replace_text

    job = folder / "job.json"
    about = {"cores": cores, "parent": os.getpid(), "commit": commit, "tasks": tasks}
    replace_text(job, json.dumps(about))
    with (folder / "log.txt").open("ab") as log:
        # A session of its own: Ctrl-C comes to us alone, and we tell it.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "bitjax.scaling.worker", str(job)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def main(path: str) -> int:
    """Do the tasks of a job; returns the exit code."""
    started = time.time()
    job: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    _die_with(job["parent"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job["cores"])  # before XLA counts the threads of its pool
    from bitjax.allocator import reuse_freed_memory
    from bitjax.replacing import replace_text
    from bitjax.train import Interrupted

    reuse_freed_memory()
    imports = time.time() - started
    for task in job["tasks"]:
        result = Path(task["result"])
        if result.exists():
            continue
        try:
            found = _TASKS[task["kind"]](task)
        except Interrupted:
            return 130
        except BlockingIOError:
            print(f"another process works in {task['directory']}", file=sys.stderr)
            return LOST
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
        replace_text(result, json.dumps(found | {"imports": imports, "commit": job["commit"]}))
    return 0


def _die_with(parent: int) -> None:
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (AttributeError, OSError):  # not Linux
        return
    if os.getppid() != parent:  # it has died already
        sys.exit(1)


def _calibrate(task: dict[str, Any]) -> dict[str, Any]:
    from bitjax.config import RunConfig, from_dict
    from bitjax.scaling.calibrate import measure

    return measure(from_dict(RunConfig, task["config"]))


def _train(task: dict[str, Any]) -> dict[str, Any]:
    """Train, or go on training; then score."""
    from bitjax.config import RunConfig, from_dict
    from bitjax.scaling.score import held_out, score
    from bitjax.scaling.table import locked
    from bitjax.train import Diverged, Trainer, read_metrics, train

    config = from_dict(RunConfig, task["config"])
    directory = Path(task["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / "lock", wait=False):
        try:
            state = train(config, directory)
        except Diverged as error:
            return {"status": DIVERGED, "why": str(error)}
        records = read_metrics(directory)
        made = score(Trainer(config).model(state.params), held_out(config))
    of_step = config.train.batch_size * config.train.seq_len
    steps = [0, *(int(r["step"]) for r in records)]
    seconds = sum(
        (step - before) * of_step / r["tokens_per_second"]
        for before, step, r in zip(steps, steps[1:], records, strict=False)
    )
    curve = {name: [r.get(name) for r in records] for name in ("step", "loss", "flip_rate")}
    return {"status": "finished", "seconds": seconds, "curve": curve, **vars(made)}


def _round(task: dict[str, Any]) -> dict[str, Any]:
    """Score a float run after rounding."""
    from bitjax.config import RunConfig, from_dict
    from bitjax.scaling.rounding import rounded_model
    from bitjax.scaling.score import held_out, score
    from bitjax.train.checkpoint import read_run

    config = from_dict(RunConfig, task["config"])
    _, step, state = read_run(Path(task["directory"]))
    if step != config.train.steps:
        raise ValueError(f"{task['directory']} is at step {step} of {config.train.steps}")
    made = score(rounded_model(config, state.params, task["to"]), held_out(config))
    return {"status": "finished", "seconds": 0.0, "curve": {}, **vars(made)}


_TASKS = {"calibrate": _calibrate, "train": _train, "round": _round}

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
