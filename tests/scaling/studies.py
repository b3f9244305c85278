"""A tiny study, and processes that only pretend to train."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from bitjax.config import (
    DataConfig,
    Group,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StudyConfig,
    TrainConfig,
)
from bitjax.scaling.calibrate import Calibration
from bitjax.scaling.plan import Plan, Planner, cells_of
from bitjax.scaling.score import held_out

BASE = RunConfig(
    ModelConfig(
        hidden_size=16, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=2,
        head_dim=8, max_seq_len=8, init_std=0.3,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, stage_two_learning_rate=2e-3),
    train=TrainConfig(batch_size=2, seq_len=8, checkpoint_every=4),
)  # fmt: skip


def text_file(folder: Path) -> str:
    """A text of 2,000 bytes to train on and 200 held out."""
    path = folder / "text.txt"
    letters = np.random.default_rng(0).integers(97, 110, 2222, dtype=np.uint8)
    path.write_bytes(bytes(letters))
    return str(path)


def rates(size, arm):
    """A machine that trains 1,000 tokens and scores 10,000 a second, and starts in 1 s."""
    return Calibration(size, arm, 1, 1000.0, 10_000.0, 1.0)


def plan_of(data: str, *groups: Group, **study) -> Plan:
    """A plan of groups on a text, for the machine of `rates`."""
    settings = StudyConfig(groups=groups, **study)
    held = held_out(dataclasses.replace(BASE, data=DataConfig(text=data)))
    planner = Planner(BASE, settings, len(held.tokens), rates)
    runs, sweeps = planner.all(cells_of(BASE, groups))
    corpus = {
        "name": "letters", "data": held.data, "validation": held.identity,
        "tokenizer": held.tokenizer, "train_tokens": held.train_tokens, "tokens": len(held.tokens),
    }  # fmt: skip
    return Plan(BASE, settings, corpus, [], sweeps, runs)


class Pretended:
    """In the place of `bitjax.scaling.worker.start`: results at once, losses of a made-up law.

    Args:
        best: learning rate of the lowest loss.
        diverging: arms whose runs diverge, or learning rates.

    Attributes:
        jobs: the tasks of each process that was started.
    """

    def __init__(self, best=4e-3, diverging=()):
        self.best, self.diverging, self.jobs = best, diverging, []

    def __call__(self, folder, cores, tasks, commit=""):
        self.jobs.append(tasks)
        assert len(self.jobs) < 50, "the same job again and again"
        for task in tasks:
            config, result = task["config"], Path(task["result"])
            if result.exists():
                continue
            rate = config["optimizer"]["learning_rate"]
            weights = config["model"]["weights"]
            made = {
                "status": "finished", "loss": 2.0 + math.log(rate / self.best) ** 2, "error": 0.01,
                "bits_per_byte": 3.0, "seconds": 1.5, "tokens": [3], "nats": [6.0], "curve": {},
                "commit": "abc",
            }  # fmt: skip
            if rate in self.diverging or weights in self.diverging:
                made = {"status": "diverged", "why": "the loss became nan", "commit": "abc"}
            elif task["kind"] == "train":
                steps = str(config["train"]["steps"])
                (Path(task["directory"]) / "checkpoints" / steps).mkdir(parents=True, exist_ok=True)
            elif task["kind"] == "calibrate":
                made = {"tokens_per_second": 1e3, "scored_per_second": 1e4, "startup": 1.0,
                        "imports": 0.5}  # fmt: skip
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text(json.dumps(made))
        return Ended()


class Ended:
    """A process that has come to its end."""

    returncode = 0

    def poll(self):
        return 0

    def terminate(self):
        pass

    def wait(self):
        return 0
