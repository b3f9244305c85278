"""Rows of a part: what a batch is made of, by the kind of its corpus.

    text     windows of T inputs and the token after each, one behind the other
    chat     whole conversations, several in a row where they fit
    pairs    two rows for each pair, the chosen conversation's and under it the rejected one's

A conversation longer than a row is cut at its end, and left out, with its partner in a pair, if no
token of an answer remains. Rows of conversations are filled up with zeros that nothing attends to
and nobody learns.

Packing is best-fit decreasing: the longest conversation first, each into the row that it fills
best. That wastes little, and rows are shuffled later. Source of the idea for sequences, which then
must not attend to each other: Krell et al., arXiv 2107.02027.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from bitjax.corpus.store import Part


class Batch(NamedTuple):
    """Rows of one process; a pytree.

    Attributes:
        tokens: int32 `[B / P, T + 1]`, inputs and next tokens.
        segments: int32, of the same shape, the document of each token counted from 1 in its row,
            where documents are kept apart: a token then attends to its own document only, and no
            document's first token is predicted. None where they are not. 0 is no document.
        counted: bool, of the same shape, which tokens are to be predicted; None: all.
        reference: float32 `[B / P, 1]`, the log-likelihood of a row's counted tokens under the
            reference model, for objectives that have one.
    """

    tokens: np.ndarray
    segments: np.ndarray | None = None
    counted: np.ndarray | None = None
    reference: np.ndarray | None = None


def joined(batches: Sequence[Batch], order: np.ndarray | slice = slice(None)) -> Batch:
    """The rows of several batches of one form, in another order."""
    tokens, *rest = zip(*batches, strict=True)
    others = [None if x[0] is None else np.concatenate(x)[order] for x in rest]
    return Batch(np.concatenate(tokens)[order], *others)


class Rows(Protocol):
    """Entries of a part, each of one row or of `per_entry`.

    Attributes:
        part: whose they are.
        count: of entries.
        per_entry: rows of an entry.
        cut, left_out: conversations that were too long, and those of which no answer remained.
    """

    part: Part
    count: int
    per_entry: int
    cut: int
    left_out: int

    def read(self, entries: np.ndarray) -> Batch:
        """The rows of some entries: `[n * per_entry, seq_len + 1]`.

        Raises:
            ValueError: a file was damaged.
        """

    def spread(self, limit: int) -> Batch:
        """Up to `limit` rows spread evenly over all."""


class Windows:
    """Windows of a text; see `Rows`.

    Args:
        part: of a text.
        seq_len: T.
        apart: whether batches tell documents apart.
    """

    per_entry, cut, left_out = 1, 0, 0

    def __init__(self, part: Part, seq_len: int, apart: bool) -> None:
        if part.tokens < seq_len + 1:
            raise ValueError(
                f"{part.name} has {part.tokens} tokens; sequences of {seq_len} need {seq_len + 1}"
            )
        self.part, self._seq_len, self._apart = part, seq_len, apart
        self.count = (part.tokens - 1) // seq_len

    def read(self, entries: np.ndarray) -> Batch:
        """See `Rows`."""
        return self._at(entries * self._seq_len)

    def spread(self, limit: int) -> Batch:
        """See `Rows`; the last window ends with the text."""
        count = min(limit, self.count)
        starts = np.linspace(0, self.part.tokens - self._seq_len - 1, count).astype(np.int64)
        return self._at(starts)

    def _at(self, starts: np.ndarray) -> Batch:
        length = self._seq_len + 1
        segments = self.part.segments(starts, length) if self._apart else None
        return Batch(self.part.windows(starts, length), segments)


class _Conversations:
    """What rows of chats and of pairs share: lengths after the cut, and filling of rows."""

    def __init__(self, part: Part, seq_len: int) -> None:
        self.part, self._room = part, seq_len + 1
        lengths = np.diff(part.starts)
        long = np.flatnonzero(lengths > self._room)
        self._lengths = np.minimum(lengths, self._room)
        learned = [part.counted(part.starts[i : i + 1], self._room).any() for i in long]
        self._empty = long[~np.array(learned, bool)]
        self.cut = len(long)

    def _rows(self, documents: Sequence[Sequence[int]], apart: bool) -> Batch:
        shape = len(documents), self._room
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        counted = np.zeros(shape, bool)
        for row, inside in enumerate(documents):
            done = 0
            for number, document in enumerate(inside, 1):
                start, length = self.part.starts[document : document + 1], self._lengths[document]
                place = slice(done, done + length)
                tokens[row, place] = self.part.windows(start, length)[0]
                counted[row, place] = self.part.counted(start, length)[0]
                segments[row, place] = number
                done += length
        return Batch(tokens, segments if apart else None, counted)


class Conversations(_Conversations):
    """Rows of whole conversations; see `Rows`."""

    per_entry = 1

    def __init__(self, part: Part, seq_len: int) -> None:
        super().__init__(part, seq_len)
        kept = np.setdiff1d(np.arange(part.documents), self._empty)
        self._inside = [kept[row] for row in pack(self._lengths[kept], self._room)]
        self.count, self.left_out = len(self._inside), len(self._empty)
        _require_some(self, seq_len)

    def read(self, entries: np.ndarray) -> Batch:
        """See `Rows`."""
        return self._rows([self._inside[i].tolist() for i in entries], apart=True)

    def spread(self, limit: int) -> Batch:
        """See `Rows`."""
        return self.read(np.linspace(0, self.count - 1, min(limit, self.count)).astype(int))


class Pairs(_Conversations):
    """Rows of the chosen and the rejected, by turns; see `Rows`.

    Attributes:
        reference: float32 `[count, 2]`, set by the objective; see `Batch`.
    """

    per_entry = 2

    def __init__(self, part: Part, seq_len: int) -> None:
        super().__init__(part, seq_len)
        kept = np.setdiff1d(np.arange(part.documents // 2), self._empty // 2)
        self._pairs = np.stack([2 * kept, 2 * kept + 1], axis=1)
        self.count, self.left_out = len(kept), part.documents - 2 * len(kept)
        self.reference: np.ndarray | None = None
        _require_some(self, seq_len)

    def read(self, entries: np.ndarray) -> Batch:
        """See `Rows`."""
        chosen = self._pairs[entries].reshape(-1, 1)
        batch = self._rows(chosen.tolist(), apart=False)
        if self.reference is None:
            return batch
        return batch._replace(reference=self.reference[entries].reshape(-1, 1))

    def spread(self, limit: int) -> Batch:
        """See `Rows`."""
        count = min(limit // 2, self.count)
        return self.read(np.linspace(0, self.count - 1, count).astype(int))


def rows_of(part: Part, seq_len: int, apart: bool) -> Rows:
    """The rows of a part.

    Args:
        part: of a corpus of any kind.
        seq_len: T.
        apart: whether documents of a text are told apart; conversations always are.

    Raises:
        ValueError: not enough for one row.
    """
    if part.kind == "text":
        return Windows(part, seq_len, apart)
    return Conversations(part, seq_len) if part.kind == "chat" else Pairs(part, seq_len)


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Numbers of the sequences in each row of `room` tokens, by best-fit decreasing.

    Args:
        lengths: integers of 1..room.
        room: tokens of a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []  # ascending: the tokens free in some row
    having: dict[int, list[int]] = {}  # tokens free -> rows
    for sequence in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sequence])
        at = bisect.bisect_left(free, length)
        if at == len(free):
            row, left = len(rows), room - length
            rows.append([])
        else:
            best = free[at]
            row, left = having[best].pop(), best - length
            if not having[best]:
                del having[best], free[at]
        rows[row].append(sequence)
        if left and left not in having:
            bisect.insort(free, left)
        if left:
            having.setdefault(left, []).append(row)
    return rows


def _require_some(rows: Conversations | Pairs, seq_len: int) -> None:
    if not rows.count:
        raise ValueError(
            f"{rows.part.name} has {rows.part.documents} conversations, of which none has a token "
            f"of an answer among its first {seq_len + 1}"
        )
