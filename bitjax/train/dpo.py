"""Direct preference optimisation: tuning by which of two answers is preferred.

With log p(y) the sum over an answer's tokens, under the model and under the frozen reference, which
is the model that the run started from,

    reward(y) = beta * (log p(y) - log p_ref(y))
    loss      = mean over pairs of -log sigmoid(reward(chosen) - reward(rejected))

Source: Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, equation 7.

The reference is never trained, so its log-likelihoods are computed once, before the first step, and
kept in the run's directory; the model itself need not stay in memory.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bitjax.config import TrainConfig
from bitjax.corpus.rows import Batch, Pairs, Rows
from bitjax.replacing import replacing
from bitjax.train import processes
from bitjax.train.next_token import predicted

REFERENCE = "reference.npz"  # in a run's directory: `identity` of the data, then an array for each
# part of each corpus, float32 [pairs, 2]: chosen and rejected
_BATCH = 8  # pairs at once


class Dpo:
    """See the module, and `bitjax.train.objective.Objective`. Rows are pairs: chosen, rejected."""

    kinds: tuple[str, ...] = ("pairs",)
    measures: tuple[str, ...] = ("loss", "reward_margin", "reward_accuracy")

    def __init__(self, config: TrainConfig) -> None:
        self._beta = config.dpo_beta

    def items(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch.tokens) // 2

    def sums(self, losses_BxT: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """See `Objective`; `reward_margin` is reward(chosen) - reward(rejected), and
        `reward_accuracy` is 1 where that is above 0."""
        likelihoods_B = -losses_BxT.sum(axis=1, where=predicted(batch))
        reference = jnp.zeros(()) if batch.reference is None else jnp.asarray(batch.reference)[:, 0]
        rewards_B = self._beta * (likelihoods_B - reference)
        margins = rewards_B[::2] - rewards_B[1::2]
        return {
            "loss": -jax.nn.log_sigmoid(margins).sum(),
            "reward_margin": margins.sum(),
            "reward_accuracy": (margins > 0).sum().astype(jnp.float32),
        }

    def prepare(
        self, rows: Sequence[Rows], identity: str, directory: Path,
        likelihoods: Callable[[Batch], jax.Array],
    ) -> None:  # fmt: skip
        """Give the pairs their reference, read from the directory or else computed and kept there.

        A file that is damaged, or of other data, is made anew.
        """
        pairs = [part for part in rows if isinstance(part, Pairs)]
        path = directory / REFERENCE
        held = _read(path, identity, pairs)
        if not processes.of_first(held is not None):
            held = [_computed(part, likelihoods) for part in pairs]
            if processes.is_first():
                _write(path, identity, held)
        processes.barrier("reference")
        for part, values in zip(pairs, held or _read(path, identity, pairs) or [], strict=True):
            part.reference = values


def _computed(part: Pairs, likelihoods: Callable[[Batch], jax.Array]) -> np.ndarray:
    made = np.empty((part.count, 2), np.float32)
    for first in range(0, part.count, _BATCH):
        # The last batch is filled up with its last pair, so that one program serves all.
        entries = np.minimum(np.arange(first, first + _BATCH), part.count - 1)
        found = np.asarray(likelihoods(part.read(entries))).reshape(-1, 2)
        made[first : first + _BATCH] = found[: part.count - first]
    return made


def _write(path: Path, identity: str, arrays: list[np.ndarray]) -> None:
    with replacing(path) as file:
        np.savez(file, np.array(identity), *arrays)


def _read(path: Path, identity: str, pairs: list[Pairs]) -> list[np.ndarray] | None:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            said, *found = (file[f"arr_{i}"] for i in range(len(pairs) + 1))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    shapes = [(part.count, 2) for part in pairs]
    fits = str(said) == identity and [array.shape for array in found] == shapes
    return [array.astype(np.float32) for array in found] if fits else None
