"""Batches of a corpus, or of a mixture of several: a pure function of (seed, step).

A part of n tokens has (n - 1) // T windows of T inputs and the token after each, one behind the
other. Row r of batch s is entry s * B + r of an endless order of windows, made by `grain`:

- each part's windows are shuffled, every epoch anew, and none comes twice in an epoch;
- parts take turns by their weights, so that any stretch has them in these proportions.

`grain` computes any entry of the order by itself (a block cipher on indices), so there is no state
to save: the step is the position, and process p of P takes the rows p * B / P to (p + 1) * B / P.
It is imported when a loader is made (0.8 s), and an entry takes it about 0.03 ms.

Deliberately absent: workers that read ahead. Pages of a mapped file cost less than a step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bitjax.corpus.store import Part
from bitjax.corpus.streams import require_package


class Batch(NamedTuple):
    """Rows of one process; a pytree.

    Attributes:
        tokens: int32 `[B / P, T + 1]`, inputs and next tokens.
        segments: int32, of the same shape, the document of each token counted from 1 in its row,
            where documents are kept apart: a token then attends to its own document only, and no
            document's first token is predicted. None where they are not.
    """

    tokens: np.ndarray
    segments: np.ndarray | None = None


class Loader:
    """Reads batches.

    Args:
        parts: at least one.
        seq_len: T.
        batch_size: B, of all processes together.
        seed: of the order.
        weights: of the parts, in windows; by default each part's own number of windows.
        apart: whether batches tell documents apart.
        process_index, process_count: p and P.

    Attributes:
        identity: a resumed run is the same only if this is: it changes with the tokens, the
            settings (processes excepted), and the order that `grain` gives.

    Raises:
        ValueError: settings that do not fit, or a part shorter than one window.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        seq_len: int,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        apart: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        _check(parts, seq_len, batch_size, weights, process_index, process_count)
        self._parts, self._seq_len, self._apart = tuple(parts), seq_len, apart
        self._batch_size = batch_size
        rows = batch_size // process_count
        self._rows = range(process_index * rows, (process_index + 1) * rows)
        self.windows = [(part.tokens - 1) // seq_len for part in parts]
        shares = [float(w) for w in (self.windows if weights is None else weights)]
        grain = require_package("grain")
        # Windows of all parts in one range of numbers: part i's begin at firsts[i].
        self._firsts = np.concatenate([[0], np.cumsum(self.windows)])
        orders = [
            grain.MapDataset.range(int(first), int(first) + count).shuffle(seed=seed + i).repeat()
            for i, (first, count) in enumerate(zip(self._firsts, self.windows, strict=False))
            if shares[i] > 0
        ]
        used = [share for share in shares if share > 0]
        self._order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights=used)
        said = [[part.identity for part in parts], shares, seq_len, batch_size, seed, apart,
                [int(self._order[i]) for i in range(16)]]  # fmt: skip
        self.identity = hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """This process's rows of batch `step`.

        Raises:
            ValueError: a token beyond the vocabulary: a file was damaged.
        """
        first = step * self._batch_size
        chosen = np.array([self._order[first + row] for row in self._rows], np.int64)
        owners = np.searchsorted(self._firsts, chosen, side="right") - 1
        starts = (chosen - self._firsts[owners]) * self._seq_len
        length = self._seq_len + 1
        tokens = np.empty((len(chosen), length), np.int32)
        segments = np.empty_like(tokens) if self._apart else None
        for i in np.unique(owners):
            mine = owners == i
            tokens[mine] = self._parts[i].windows(starts[mine], length)
            if segments is not None:
                segments[mine] = self._parts[i].segments(starts[mine], length)
        return Batch(tokens, segments)


def spread(part: Part, seq_len: int, limit: int, apart: bool = False) -> Batch:
    """Up to `limit` windows spread evenly over a part: `[n, seq_len + 1]`."""
    count = min(limit, (part.tokens - 1) // seq_len)
    starts = np.linspace(0, part.tokens - seq_len - 1, count).astype(np.int64)
    segments = part.segments(starts, seq_len + 1) if apart else None
    return Batch(part.windows(starts, seq_len + 1), segments)


def _check(
    parts: Sequence[Part], seq_len: int, batch_size: int, weights: Sequence[float] | None,
    process_index: int, process_count: int,
) -> None:  # fmt: skip
    if not parts or seq_len < 1 or batch_size < 1:
        raise ValueError(f"{len(parts)} parts, seq_len={seq_len}, batch_size={batch_size}")
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {process_count} processes, or "
            f"{process_index} is not one of them"
        )
    if weights is not None and (
        len(weights) != len(parts)
        or not all(0 <= weight < float("inf") for weight in weights)
        or not sum(weights)
    ):
        raise ValueError(
            f"weights {tuple(weights)} are not one number of 0 or more for each of the "
            f"{len(parts)} corpora, one above 0"
        )
    for part in parts:
        if part.tokens < seq_len + 1:
            raise ValueError(
                f"{part.name} has {part.tokens} tokens; sequences of {seq_len} need {seq_len + 1}"
            )
        if part.vocab_size != parts[0].vocab_size:
            raise ValueError(
                f"{part.name} has a vocabulary of {part.vocab_size}; {parts[0].name} has "
                f"{parts[0].vocab_size}: a mixture needs one tokenizer"
            )
