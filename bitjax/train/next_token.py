"""The objective of pretraining and of tuning on answers: every token from those before it.

    loss = mean over what is predicted of -log p(token | tokens before it, of its document)

Predicted are all tokens but a document's first, or of conversations the answers' alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from bitjax.config import TrainConfig
from bitjax.corpus.rows import Batch, Rows


def predicted(batch: Batch) -> jax.Array | None:
    """Bool `[B, T]`, which next tokens are to be predicted; None if all are."""
    found = None
    if batch.segments is not None:
        segments = jnp.asarray(batch.segments)
        found = segments[:, 1:] == segments[:, :-1]
    if batch.counted is not None:
        counted = jnp.asarray(batch.counted)[:, 1:]
        found = counted if found is None else found & counted
    return found


class NextToken:
    """See the module, and `bitjax.train.objective.Objective`."""

    kinds: tuple[str, ...] = ("text", "chat")
    measures: tuple[str, ...] = ("loss",)

    def __init__(self, config: TrainConfig) -> None:
        pass

    def items(self, batch: Batch) -> jax.Array | int:
        """Tokens that are predicted."""
        counted = predicted(batch)
        return batch.tokens[:, 1:].size if counted is None else counted.sum()

    def sums(self, losses_BxT: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """See `Objective`."""
        counted = predicted(batch)
        return {"loss": losses_BxT.sum() if counted is None else losses_BxT.sum(where=counted)}

    def prepare(
        self, rows: Sequence[Rows], identity: str, directory: Path,
        likelihoods: Callable[[Batch], jax.Array],
    ) -> None:  # fmt: skip
        """Nothing is needed."""
