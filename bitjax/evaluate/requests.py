"""Log-likelihoods of continuations: many short sequences through few compiled shapes.

A request is a context and a continuation; its score is

    log p(continuation | context) = sum over its tokens of log p(token | all before it)    [nats]

What shares its inputs, such as one-token answers to one question, is run once. What begins alike,
such as the choices of an item behind its context, becomes one row: the beginning once, then every
ending in a segment of its own, which sees the beginning and itself. Scores are those of separate
rows, but for the order of float sums in attention and in products of other shapes.

Rows are sorted by length and padded on the right (attention is causal, so padding changes nothing)
to a few lengths, chosen so that padding plus compilations cost least. The head runs only where a
token is scored: logits of whole sequences never exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax.model import Transformer
from bitjax.ops.reference import SHARED
from bitjax.text import TextTokenizer
from bitjax.tokenizer import Tokenizer

BATCH_TOKENS = 2048  # padded tokens in a batch: larger ones are no faster on a processor
HEAD_ROWS = 128  # positions whose logits exist together: 78 MB for a vocabulary of 152 k
LEAST_SAVED = 1 / 8  # of a request's tokens: rows that share less only lengthen attention
LENGTH_STEP = 16  # sequences are padded to multiples of this
COMPILATION = 20_000  # tokens that could be scored while a shape compiles; its order counts only


@dataclass(frozen=True)
class Request:
    """Tokens of which the last are scored.

    Attributes:
        tokens: int32 `[T]`, of a context of at least one token and a continuation.
        scored: tokens in the continuation, 1..T - 1.
    """

    tokens: np.ndarray
    scored: int


@dataclass(frozen=True)
class Score:
    """What a model says to a request.

    Attributes:
        log_likelihood: of the continuation, in nats.
        greedy: every token of the continuation is the most likely one.
    """

    log_likelihood: float
    greedy: bool


def beginning(tokenizer: Tokenizer) -> int:
    """The token that stands before a text without a context.

    It is the one that begins every text, or else one that ends a text, or else a line's end.
    """
    if isinstance(tokenizer, TextTokenizer) and tokenizer.special.bos is not None:
        return tokenizer.special.bos
    return tokenizer.stop[0] if tokenizer.stop else int(tokenizer.encode("\n")[-1])


def encode_request(
    tokenizer: Tokenizer, context: str, continuation: str, longest: int, truncate: bool = False
) -> Request:
    """Tokens of a context and its continuation, encoded together and divided.

    Spaces at the end of the context belong to the continuation, as most tokenizers have them.

    Args:
        tokenizer: of the model.
        context: may be empty; then `beginning` stands for it.
        continuation: what is scored, not empty.
        longest: tokens that the model reads, the last of the continuation not counted.
        truncate: leave out the beginning of what is too long.

    Raises:
        ValueError: an empty continuation, or a request that is too long.
    """
    stripped = context.rstrip()
    if stripped:
        context, continuation = stripped, context[len(stripped) :] + continuation
        tokens = tokenizer.encode(context + continuation)
        start = len(tokenizer.encode(context))
    else:
        tokens, start = tokenizer.encode(context + continuation), 1
        first = beginning(tokenizer)
        if not len(tokens) or tokens[0] != first:
            tokens = np.concatenate([[first], tokens])
    scored = len(tokens) - start
    if scored < 1:
        raise ValueError("its continuation is no token")
    if len(tokens) > longest + 1:
        if scored > longest or not truncate:
            raise ValueError(
                f"it has {len(tokens) - 1:,} tokens, and the model's context is {longest:,}"
                + ("" if scored > longest else "; --truncate leaves out what is farthest back")
            )
        tokens = tokens[-longest - 1 :]
    return Request(np.asarray(tokens, np.int32), scored)


def padded_lengths(lengths: Sequence[int], longest: int) -> list[int]:
    """Lengths to pad to: the set of least padded tokens plus `COMPILATION` for each.

    Args:
        lengths: of the inputs, not empty.
        longest: the model's context; no padded length is above it.

    Returns:
        Ascending; the last is at least the longest of `lengths`.
    """
    rounded = [min(longest, -(-length // LENGTH_STEP) * LENGTH_STEP) for length in lengths]
    sizes, counts = np.unique(rounded, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    # best[i]: (cost, where the last group began) of the i shortest sizes
    best: list[tuple[float, int]] = [(0, 0)]
    for i in range(1, len(sizes) + 1):
        costs = [
            (best[j][0] + float(before[i] - before[j]) * int(sizes[i - 1]) + COMPILATION, j)
            for j in range(i)
        ]
        best.append(min(costs))
    chosen, i = [], len(sizes)
    while i:
        chosen.append(int(sizes[i - 1]))
        i = best[i][1]
    return chosen[::-1]


@dataclass(frozen=True)
class _Row:
    """Inputs that are run together.

    Attributes:
        shared: tokens that all of them begin with, run once; 0 of one input alone.
        inputs: int32 `[T]` each.
        owners: of each, the indices of its requests.
    """

    shared: int
    inputs: tuple[np.ndarray, ...]
    owners: tuple[list[int], ...]

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return self.shared + sum(len(tokens) - self.shared for tokens in self.inputs)

    def starts(self) -> list[int]:
        """Where each input's own tokens begin."""
        own = [len(tokens) - self.shared for tokens in self.inputs]
        return [self.shared + before for before in np.cumsum([0, *own[:-1]]).tolist()]

    def with_input(self, tokens: np.ndarray, owners: list[int]) -> _Row:
        """The row with a further input, of which all begin with as much as they can."""
        alike = self.inputs[0][: len(tokens)] == tokens[: len(self.inputs[0])]
        common = len(alike) if alike.all() else int(np.argmin(alike))
        shared = min(common, self.shared) if len(self.inputs) > 1 else common
        return _Row(shared, (*self.inputs, tokens), (*self.owners, owners))


def shared_rows(inputs: Sequence[tuple[np.ndarray, list[int]]], longest: int) -> list[_Row]:
    """Rows of neighbours that begin alike, where that saves `LEAST_SAVED` of the later one.

    Args:
        inputs: tokens, and indices of their requests.
        longest: tokens of a row.
    """
    rows: list[_Row] = []
    for tokens, owners in inputs:
        new = _Row(0, (tokens,), (owners,))
        if rows:
            both = rows[-1].with_input(tokens, owners)
            saved = rows[-1].length + new.length - both.length
            if saved >= LEAST_SAVED * new.length and both.length <= longest:
                rows[-1] = both
                continue
        rows.append(new)
    return rows


class RequestScorer:
    """Scores requests with a float or packed model.

    Args:
        model: any.
        batch_tokens: padded tokens in a batch.
        share: run what requests begin with once.

    Attributes:
        tokens: run so far, without padding.
        shapes: of the batches run so far, `(sequences, length)`: one compilation each.
    """

    def __init__(
        self, model: Transformer, batch_tokens: int = BATCH_TOKENS, share: bool = True
    ) -> None:
        graph, self._params = nnx.split(model)
        self.longest, self._vocab_size = model.config.max_seq_len, model.config.vocab_size
        self.batch_tokens, self._share = batch_tokens, share
        self.tokens = 0
        self.shapes: set[tuple[int, int]] = set()

        @jax.jit
        def hidden(
            params: nnx.State, tokens_BxT: jax.Array, positions_BxT: jax.Array,
            segments_BxT: jax.Array,
        ) -> jax.Array:  # fmt: skip
            model = nnx.merge(graph, params)
            return model.extend(tokens_BxT, positions_BxT, None, segments_BxT)[0]

        @jax.jit
        def losses(
            params: nnx.State, hidden_PxD: jax.Array, targets_P: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            logits_PxV = nnx.merge(graph, params).logits(hidden_PxD)
            picked_P = jnp.take_along_axis(logits_PxV, targets_P[:, None], axis=-1)[:, 0]
            greedy_P = jnp.argmax(logits_PxV, axis=-1) == targets_P
            return picked_P - jax.nn.logsumexp(logits_PxV, axis=-1), greedy_P

        self._hidden, self._losses = hidden, losses

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Scores in the order of the requests."""
        found: dict[int, Score] = {}
        for part in self.stream(requests):
            found.update(part)
        return [found[i] for i in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[dict[int, Score]]:
        """Scores by the requests' indices, a batch at a time, the longest rows first.

        Raises:
            ValueError: a token that the model does not have.
        """
        for request in requests:
            low, high = int(request.tokens.min()), int(request.tokens.max())
            if low < 0 or high >= self._vocab_size:
                raise ValueError(
                    f"a request holds token {low if low < 0 else high}; the model has "
                    f"{self._vocab_size}"
                )
        alike: dict[bytes, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(request.tokens[:-1].tobytes(), []).append(i)
        inputs = [(requests[same[0]].tokens[:-1], same) for same in alike.values()]
        if not inputs:
            return
        rows = shared_rows(inputs, self.longest if self._share else 0)
        rows.sort(key=lambda row: -row.length)  # stable: equal lengths stay in their order
        sizes = padded_lengths([row.length for row in rows], self.longest)
        for shorter, size in reversed(list(pairwise([0, *sizes]))):
            members = [row for row in rows if shorter < row.length <= size]
            count = max(1, self.batch_tokens // size)
            for start in range(0, len(members), count):
                yield self._batch(requests, members[start : start + count], (count, size))

    def _batch(
        self, requests: Sequence[Request], members: list[_Row], shape: tuple[int, int]
    ) -> dict[int, Score]:
        """Scores of the requests of some rows."""
        tokens_BxT, positions_BxT, segments_BxT = (np.zeros(shape, np.int32) for _ in range(3))
        owners, rows, places, targets = [], [], [], []
        for number, row in enumerate(members):
            self.tokens += row.length
            shared = slice(0, row.shared)
            tokens_BxT[number, shared] = row.inputs[0][shared]
            positions_BxT[number, shared] = np.arange(row.shared)
            segments_BxT[number, shared] = SHARED
            parts = zip(row.inputs, row.owners, row.starts(), strict=True)
            for segment, (read, indices, start) in enumerate(parts, 1):
                own = slice(start, start + len(read) - row.shared)
                tokens_BxT[number, own] = read[row.shared :]
                positions_BxT[number, own] = np.arange(row.shared, len(read))
                segments_BxT[number, own] = segment
                for i in indices:
                    for place in range(len(read) - requests[i].scored, len(read)):
                        owners.append(i)
                        rows.append(number)
                        places.append(place if place < row.shared else start + place - row.shared)
                        targets.append(requests[i].tokens[place + 1])
        self.shapes.add(shape)
        hidden_BxTxD = self._hidden(self._params, tokens_BxT, positions_BxT, segments_BxT)
        hidden_PxD = np.asarray(hidden_BxTxD)[rows, places]
        sums = dict.fromkeys(owners, 0.0)
        greedy = dict.fromkeys(owners, True)
        for start in range(0, len(owners), HEAD_ROWS):
            chunk = hidden_PxD[start : start + HEAD_ROWS]
            empty = HEAD_ROWS - len(chunk)
            log_p, best = self._losses(
                self._params,
                np.pad(chunk, ((0, empty), (0, 0))),
                np.pad(np.array(targets[start : start + HEAD_ROWS], np.int32), (0, empty)),
            )
            for owner, value, hit in zip(
                owners[start : start + HEAD_ROWS], np.asarray(log_p), np.asarray(best), strict=False
            ):
                sums[owner] += float(value)
                greedy[owner] &= bool(hit)
        return {i: Score(sums[i], greedy[i]) for i in sums}
