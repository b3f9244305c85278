"""How often the chosen answer is the likelier one, among held-out pairs, under each of some runs.

Unlike the accuracy that a run by preference reports, this asks no reference: it says what the model
itself prefers, before and after.

Command:   python experiments/tuning/preferred.py tuning/pairs runs/sft runs/dpo
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from bitjax.config import DataConfig, RunConfig
from bitjax.train import Trainer
from bitjax.train.checkpoint import read_run
from bitjax.train.source import open_source

ROWS_AT_ONCE = 16  # two for each pair


def differences(run: Path, pairs: str) -> np.ndarray:
    """Float32 `[pairs]`: log p(chosen) - log p(rejected), nats."""
    config, _, state = read_run(run)
    train = dataclasses.replace(config.train, objective="dpo", start_from=str(run))
    config = RunConfig(config.model, DataConfig(text=pairs), config.optimizer, train)
    trainer, rows = Trainer(config), open_source(config).valid(1 << 30)
    found = []
    for first in range(0, len(rows.tokens), ROWS_AT_ONCE):
        # The last rows come with some before them, so that one program serves all.
        start = max(0, min(first, len(rows.tokens) - ROWS_AT_ONCE))
        part = jax.tree.map(lambda x, s=start: x[s : s + ROWS_AT_ONCE], rows)
        found.append(np.asarray(trainer.likelihoods(state.params, part))[first - start :])
    likelihoods = np.concatenate(found)
    return likelihoods[::2] - likelihoods[1::2]


def main(pairs: str, *runs: str) -> None:
    """A line for each run."""
    for run in runs:
        found = differences(Path(run), pairs)
        share, error = np.mean(found > 0), np.std(found > 0, ddof=1) / np.sqrt(len(found))
        print(
            f"{run}: chosen is likelier in {share:.3f} +- {error:.3f} of {len(found)} pairs, "
            f"by {found.mean():.2f} nats on average"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
