"""How long runs take here: a few steps of every size and arm, and some scoring."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitjax.config import RunConfig
from bitjax.corpus.rows import Batch
from bitjax.evaluate import model_scorer
from bitjax.scaling.score import BATCH
from bitjax.train import Trainer

FEWEST, LONGEST = 5, 1.5  # steps, and seconds spent on more of them


@dataclass(frozen=True)
class Calibration:
    """Of one size and trained arm, on so many cores.

    Attributes:
        size, arm, cores: what was measured.
        tokens_per_second: trained; of the median step.
        scored_per_second: held-out tokens.
        startup: seconds before the first step and scoring: imports and compilation.
    """

    size: str
    arm: str
    cores: int
    tokens_per_second: float
    scored_per_second: float
    startup: float

    def __post_init__(self) -> None:
        for name in ("tokens_per_second", "scored_per_second"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"a calibration of {self.size}, {self.arm} has {name}={value!r}")

    def seconds(self, trained: float, scored: float) -> float:
        """Of a run over so many tokens."""
        return self.startup + trained / self.tokens_per_second + scored / self.scored_per_second


def measure(config: RunConfig) -> dict[str, Any]:
    """Rates of a run, as `Calibration` names them; `startup` without imports."""
    train = config.train
    B, T = train.batch_size, train.seq_len
    draw = np.random.default_rng(0).integers
    tokens = draw(0, config.model.vocab_size, (B, T + 1)).astype(np.int32)
    start = time.perf_counter()
    trainer = Trainer(config)
    state, metrics = trainer.step(trainer.init(), Batch(tokens))
    float(metrics["loss"])
    compiled = time.perf_counter() - start
    each: list[float] = []
    while len(each) < FEWEST or sum(each) < LONGEST:
        start = time.perf_counter()
        state, metrics = trainer.step(state, Batch(tokens))
        float(metrics["loss"])
        each.append(time.perf_counter() - start)
    scorer = model_scorer(trainer.model(state.params))
    windows = draw(0, config.model.vocab_size, (BATCH, T + 1)).astype(np.int32)
    start = time.perf_counter()
    scorer(windows)
    compiled += time.perf_counter() - start
    start = time.perf_counter()
    scorer(windows)
    scoring = time.perf_counter() - start
    return {
        "tokens_per_second": B * T / float(np.median(each)),
        "scored_per_second": BATCH * T / scoring,
        "startup": compiled,
    }
