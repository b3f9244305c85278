"""What a run descends: one of these, by `train.objective`.

An objective sees the negative log-likelihood of every next token, and says what is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax

from bitjax.config import TrainConfig
from bitjax.corpus.rows import Batch, Rows
from bitjax.train.dpo import Dpo
from bitjax.train.next_token import NextToken

_OBJECTIVES: dict[str, type[NextToken | Dpo]] = {"next_token": NextToken, "dpo": Dpo}


class Objective(Protocol):
    """Losses of items: tokens, or pairs.

    Attributes:
        kinds: of corpora that it takes.
        measures: names in `sums`, "loss" first.
    """

    kinds: tuple[str, ...]
    measures: tuple[str, ...]

    def items(self, batch: Batch) -> jax.Array | int:
        """How many items a batch has."""

    def sums(self, losses_BxT: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """The sums over items of the loss, and of whatever else is reported.

        Args:
            losses_BxT: float32, negative log-likelihoods of `batch.tokens[:, 1:]`, nats.
            batch: what they are of.
        """

    def prepare(
        self, rows: Sequence[Rows], identity: str, directory: Path,
        likelihoods: Callable[[Batch], jax.Array],
    ) -> None:  # fmt: skip
        """Make ready the rows of a run that begins or goes on.

        Args:
            rows: of training and validation.
            identity: of the data.
            directory: of the run.
            likelihoods: float32 `[B]`, of a batch's counted tokens under the model that the run
                starts from.
        """


def make_objective(config: TrainConfig) -> Objective:
    """The objective that a configuration names."""
    return _OBJECTIVES[config.objective](config)
