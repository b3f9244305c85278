"""Batches of a corpus, or of a mixture of several: a pure function of (seed, step).

A part has entries (`bitjax.corpus.rows`): windows of a text, rows of conversations, or pairs, which
are two rows. Batch s has the entries s * n to (s + 1) * n of an endless order, made by `grain`:

- each part's entries are shuffled, every epoch anew, and none comes twice in an epoch;
- parts take turns by their weights, so that any stretch has them in these proportions.

`grain` computes any entry of the order by itself (a block cipher on indices), so there is no state
to save: the step is the position, and process p of P takes the p-th of P equal shares.
It is imported when a loader is made (0.8 s), and an entry takes it about 0.03 ms.

Deliberately absent: workers that read ahead. Pages of a mapped file cost less than a step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from bitjax.corpus.rows import Batch, joined, rows_of
from bitjax.corpus.store import Part
from bitjax.corpus.streams import require_package


class Loader:
    """Reads batches.

    Args:
        parts: at least one.
        seq_len: T.
        batch_size: B, of all processes together.
        seed: of the order.
        weights: of the parts, in entries; by default each part's own number of entries.
        apart: whether batches tell documents of texts apart.
        process_index, process_count: p and P.

    Attributes:
        rows: of each part.
        windows: entries of each part.
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
        self.rows = [rows_of(part, seq_len, apart) for part in parts]
        self._per_batch, rest = divmod(batch_size, self.rows[0].per_entry * process_count)
        if rest:
            raise ValueError(
                f"batch_size={batch_size} cannot be shared by {process_count} processes in entries "
                f"of {self.rows[0].per_entry} rows"
            )
        self._mine = range(process_index * self._per_batch, (process_index + 1) * self._per_batch)
        self._per_batch *= process_count
        self.windows = [rows.count for rows in self.rows]
        shares = [float(w) for w in (self.windows if weights is None else weights)]
        grain = require_package("grain")
        # Entries of all parts in one range of numbers: part i's begin at firsts[i].
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
        if parts[0].kind != "text":
            said.append("rows 1")  # the version of how conversations are packed
        self.identity = hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """This process's rows of batch `step`.

        Raises:
            ValueError: a token beyond the vocabulary: a file was damaged.
        """
        first = step * self._per_batch
        chosen = np.array([self._order[first + entry] for entry in self._mine], np.int64)
        owners = np.searchsorted(self._firsts, chosen, side="right") - 1
        entries = chosen - self._firsts[owners]
        found = {i: self.rows[i].read(entries[owners == i]) for i in np.unique(owners)}
        if len(found) == 1:
            return next(iter(found.values()))
        per_entry = self.rows[0].per_entry
        order = np.argsort(np.argsort(np.repeat(owners, per_entry), kind="stable"))
        return joined(list(found.values()), order)


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
        if part.kind != parts[0].kind:
            raise ValueError(
                f"{part.name} is of the kind {part.kind}; {parts[0].name} is of {parts[0].kind}: "
                "a mixture has one kind"
            )
        if part.vocab_size != parts[0].vocab_size:
            raise ValueError(
                f"{part.name} has a vocabulary of {part.vocab_size}; {parts[0].name} has "
                f"{parts[0].vocab_size}: a mixture needs one tokenizer"
            )
