"""Text generation: one prefill, then one compiled decode step reused for every token.

Prompts are padded on the right to one of a few lengths, so that few prefill programs are ever
compiled, and run together with others of that length; a long one is run in pieces, one behind the
other. Equal prompts of a batch are run once and their cache is copied. Each sequence has its own
length and position. The KV cache is allocated once and donated from step to step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as IteratorToClose
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax.config import CacheDType
from bitjax.infer.memory import available_memory, require_memory
from bitjax.infer.programs import Program
from bitjax.infer.sampling import SamplingArrays, SamplingParams, exact_ranks, sample
from bitjax.infer.writer import TextWriter
from bitjax.model import Cache, KVCache, Transformer

Filled = tuple[Cache, jax.Array]  # of prompts: their cache, and their last hidden states [U, D]
TokenStream = IteratorToClose[np.ndarray, None, None]  # int32 [B] a step
SMALLEST_BUCKET = 16  # tokens; shorter prompts are padded to it
PREFILL_TOKENS = 1024  # run at once, at most: enough to hide reading the weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a decode step reads and replaces: a pytree, donated.

    Attributes:
        cache: keys and values of all positions before `positions_B`.
        positions_B: int32, of the last token drawn, which is not yet in the cache.
        seen_BxV: bool, tokens of the prompt and the text so far.
    """

    cache: Cache
    positions_B: jax.Array
    seen_BxV: jax.Array


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated text.

    Attributes:
        prompt, text: the text does not repeat the prompt, nor hold the stop string.
        tokens: generated, those that stopped it included.
        finish_reason: "stop" (a stop string, or a token that ends texts) or "length".
        prefill_seconds, decode_seconds: of the batch it was generated in.
        tokens_per_second: of this sequence while decoding; the first token belongs to the prefill.
    """

    prompt: str
    text: str
    tokens: int
    finish_reason: str
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate of this sequence; 0 when only the prefill's token was generated."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 else 0.0


class Generator:
    """Generates text from a float or packed model.

    Args:
        model: any Transformer; its parameters are passed to the compiled functions as arguments,
            so packed weights are used in place.
        cache_dtype: of the KV cache; the model's if None. Attention reads half of float32's bytes
            with "bfloat16", and with "int8" (absmax codes, a scale for each key and value of a
            head) a quarter.

    Attributes:
        tokenizer: the model's.
        leaves, tree: the model, as `jax.tree.flatten` takes it apart.
        empty, extend, first, decode: compiled programs, which sessions use too.

    Raises:
        ValueError: a vocabulary without all of the tokenizer's tokens.
    """

    def __init__(self, model: Transformer, cache_dtype: CacheDType | None = None) -> None:
        self.tokenizer = model.tokenizer
        self.config = model.config
        if self.config.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"the model has {self.config.vocab_size} tokens; the tokenizer has "
                f"{self.tokenizer.vocab_size}"
            )
        # Leaves alone: to flatten the tree of a large model anew takes 0.3 ms a token.
        self.leaves, tree = jax.tree.flatten(nnx.split(model))
        self.tree = tree
        self.empty = Program(functools.partial(_empty, model, cache_dtype), static=2)
        self._fill = Program(functools.partial(_fill, tree, cache_dtype), donate=0)
        self.extend = Program(functools.partial(_extend, tree), donate=1)
        self._place = Program(_place, donate=0)
        self._spread = Program(_spread)
        self.first = Program(functools.partial(_first, tree))
        self.decode = Program(functools.partial(_decode, tree), donate=1)

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Stream:
        """Generate from one prompt, piece by piece.

        Raises:
            ValueError: an empty prompt, or one that leaves no room in the context.
        """
        params = params or SamplingParams()
        tokens = self.tokenizer.encode(prompt).tolist()
        return Stream(prompt, self.writer(tokens, params), self.tokens([tokens], [params]))

    def compile(self, prompt: str, params: SamplingParams | None = None) -> None:
        """Compile for one such sequence, before anything is timed."""
        params = params or SamplingParams()
        batch = [self.tokenizer.encode(prompt).tolist()]
        self.writer(batch[0], params)
        self._compile(batch, [params])

    def _compile(self, batch: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
        drawn_B, state, settings = self._start(batch, params, Program.shapes)
        self.decode.compiled(self.leaves, state, drawn_B, settings)

    def generate(
        self,
        prompts: Sequence[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete several prompts together.

        Args:
            prompts: one or more.
            params: for all of them, or one for each.

        Raises:
            ValueError: as `stream`; or numbers of prompts and params that differ.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} sampling parameters")
        if not prompts:
            return []
        batch = [self.tokenizer.encode(prompt).tolist() for prompt in prompts]
        writers = [self.writer(t, p) for t, p in zip(batch, params, strict=True)]
        self._compile(batch, params)  # before anything is timed
        started = first = time.perf_counter()
        for tokens_B in self.tokens(batch, params):
            if first == started:
                first = time.perf_counter()
            for writer, token in zip(writers, tokens_B.tolist(), strict=True):
                writer.feed(token)
            if all(writer.finish_reason for writer in writers):
                break
        ended = time.perf_counter()
        return [
            Completion(prompt, w.text, w.tokens, w.finish_reason, first - started, ended - first)
            for prompt, w in zip(prompts, writers, strict=True)
        ]

    def writer(self, prompt: Sequence[int], params: SamplingParams) -> TextWriter:
        """What turns the tokens after a token prompt into text, and ends it.

        Raises:
            ValueError: an empty prompt, or one that leaves no room in the context.
        """
        length, limit = len(prompt), self.config.max_seq_len
        if length == 0:
            raise ValueError("the prompt is empty; give at least one character")
        if length >= limit:
            raise ValueError(
                f"the prompt has {length} tokens; the model's context of {limit} leaves no room "
                "for an answer"
            )
        return TextWriter(self.tokenizer, params, min(params.max_new_tokens, limit - length))

    def tokens(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> TokenStream:
        """Tokens that follow token prompts: int32 `[B]` a step, as many steps as any may take.

        Each step is started before the caller sees the token it continues, so that the machine
        computes while the caller works. What follows a sequence's own `max_new_tokens`, or a
        position beyond the context, means nothing.

        Args:
            prompts: token ids of each sequence, one or more, within the context.
            params: of each sequence.
        """
        drawn_B, state, settings = self._start(prompts, params, Program.__call__)
        yield np.asarray(drawn_B)  # before the decode step compiles
        steps = max(p.max_new_tokens for p in params) - 1
        if steps > 0:
            decode = self.decode.compiled(self.leaves, state, drawn_B, settings)
            drawn_B, state = decode(self.leaves, state, drawn_B, settings)
        for _ in range(steps - 1):
            known_B = drawn_B
            drawn_B, state = decode(self.leaves, state, drawn_B, settings)
            yield np.asarray(known_B)
        if steps > 0:
            yield np.asarray(drawn_B)

    def memory(self, sequences: int, prompts: int, slots: int, bucket: int) -> int:
        """Bytes of caches and seen tokens, and about those of a prefill's activations."""
        config = self.config
        filled = sum(math.prod(x.shape) * x.dtype.itemsize
                     for x in jax.tree.leaves(self.empty.shapes(prompts, slots)))  # fmt: skip
        together = min(prompts * bucket, PREFILL_TOKENS)
        # A token's widest moment: gate and up, and the residual stream beside them; float32.
        activations = 4 * together * (2 * config.intermediate_size + 2 * config.hidden_size)
        copies = sequences / prompts if sequences > prompts else 0  # of the cache, see _spread
        if prompts > 1 and bucket > PREFILL_TOKENS:
            copies = max(copies, 1 / prompts)  # of one prompt's, see _place
        seen = sequences * config.vocab_size
        return int(filled * (1 + copies)) + seen + activations

    def _start(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        run: Callable[..., Any],
    ) -> tuple[jax.Array, DecodeState, SamplingArrays]:
        """Run the prompts and draw the first tokens; or, with `Program.shapes`, only compile."""
        limit = self.config.max_seq_len
        longest = max(len(t) + p.max_new_tokens for t, p in zip(prompts, params, strict=True))
        # Every prompt once, the short ones first.
        unique = sorted(dict.fromkeys(map(tuple, prompts)), key=lambda t: padded_length(len(t)))
        slots = min(limit, padded_length(longest))
        require_memory(
            f"generation of {len(prompts)} sequences of up to {min(limit, longest)} tokens",
            self.memory(
                len(prompts), len(unique), slots, min(limit, padded_length(len(unique[-1])))
            ),
            available_memory(),
        )
        filled = run(self.empty, len(unique), slots)
        short = sum(len(tokens) <= PREFILL_TOKENS for tokens in unique)
        for row, tokens_NxT, lengths_N in _prefills(unique[:short], limit):
            filled = run(self._fill, filled, self.leaves, tokens_NxT, lengths_N, np.int32(row))
        alone = len(unique) == 1
        for row in range(short, len(unique)):
            cache = filled[0] if alone else run(self.empty, 1, slots)[0]
            one = self.extended(cache, unique[row], 0, run)
            filled = one if alone else run(self._place, filled, one, np.int32(row))
        cache, hidden_UxD = filled
        rows = {tokens: row for row, tokens in enumerate(unique)}
        rows_B = np.array([rows[tuple(tokens)] for tokens in prompts], np.int32)
        if len(rows_B) > len(unique) or (np.diff(rows_B) < 0).any():
            cache = tuple(run(self._spread, layer, rows_B) for layer in cache)
        settings = SamplingArrays.stack(params)
        seen_BxV = np.zeros((len(prompts), self.config.vocab_size), bool)
        for seen, tokens in zip(seen_BxV, prompts, strict=True):
            seen[list(tokens)] = True
        lengths_B = np.array([len(tokens) for tokens in prompts], np.int32)
        drawn_B, seen_BxV = run(
            self.first, self.leaves, hidden_UxD, rows_B, lengths_B, seen_BxV, settings
        )
        return drawn_B, DecodeState(cache, jnp.asarray(lengths_B), seen_BxV), settings

    def extended(
        self, cache: Cache, tokens: Sequence[int], first: int, run: Callable[..., Any]
    ) -> Filled:
        """Run tokens of one sequence, one or more, behind what its cache holds.

        Args:
            cache: of one sequence; donated.
            tokens: run `PREFILL_TOKENS` at a time.
            first: the slot of the first.
            run: `Program.__call__`; or `Program.shapes`, which only compiles.
        """
        filled: Any = cache, None
        for start in range(0, len(tokens), PREFILL_TOKENS):
            piece = tokens[start : start + PREFILL_TOKENS]
            padded_1xT = np.zeros((1, padded_length(len(piece))), np.int32)
            padded_1xT[0, : len(piece)] = piece
            filled = run(
                self.extend, self.leaves, filled[0], padded_1xT, np.int32(first + start),
                np.int32(len(piece)),
            )  # fmt: skip
        return filled


class Stream:
    """An iterator over pieces of one generated text; `completion` sums up what came so far."""

    def __init__(self, prompt: str, writer: TextWriter, tokens: TokenStream) -> None:
        self._prompt = prompt
        self._writer = writer
        self._tokens = tokens
        self._created = time.perf_counter()
        self._first = self._last = self._created

    def __iter__(self) -> IteratorToClose[str, None, None]:
        with contextlib.closing(self._tokens):
            for tokens_B in self._tokens:
                self._last = time.perf_counter()
                if self._writer.tokens == 0:
                    self._first = self._last
                piece = self._writer.feed(int(tokens_B[0]))
                if piece:
                    yield piece
                if self._writer.finish_reason:
                    return

    @property
    def completion(self) -> Completion:
        """Text, count and timings of what has been generated so far."""
        writer = self._writer
        return Completion(
            self._prompt, writer.text, writer.tokens, writer.finish_reason,
            self._first - self._created, self._last - self._first,
        )  # fmt: skip


def padded_length(n: int) -> int:
    """n rounded up: to a multiple of 16, of the power of two below n over 4 if that is more.

    Few sizes mean few compiled programs; the rounding adds less than a quarter beyond 64.
    """
    step = max(SMALLEST_BUCKET, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step


def _prefills(
    prompts: Sequence[tuple[int, ...]], limit: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """First row, padded tokens int32 `[N, T]` and lengths `[N]` of prompts to be run together."""
    first = 0
    for bucket, group in itertools.groupby(prompts, key=lambda tokens: padded_length(len(tokens))):
        count = len(list(group))
        parts = -(-count // max(1, PREFILL_TOKENS // bucket))
        size = -(-count // parts)
        for part in range(parts):
            # All parts are of one size, so of one program: the last one runs some prompts again.
            row = first + min(part * size, count - size)
            together = prompts[row : row + size]
            tokens_NxT = np.zeros((size, min(limit, bucket)), np.int32)
            for padded, tokens in zip(tokens_NxT, together, strict=True):
                padded[: len(tokens)] = tokens
            yield row, tokens_NxT, np.array([len(tokens) for tokens in together], np.int32)
        first += count


def _empty(model: Transformer, dtype: CacheDType | None, prompts: int, length: int) -> Filled:
    cache = model.empty_cache(prompts, length, dtype)
    return cache, jnp.zeros((prompts, model.config.hidden_size), model.dtype)


def _fill(
    tree: Any,
    dtype: CacheDType | None,
    filled: Filled,
    leaves: list[Any],
    tokens_NxT: jax.Array,
    lengths_N: jax.Array,
    row: jax.Array,
) -> Filled:
    """Run right-padded prompts; their caches and hidden states become the rows from `row` on."""
    model: Transformer = nnx.merge(*jax.tree.unflatten(tree, leaves))
    N, T = tokens_NxT.shape
    positions_NxT = jnp.broadcast_to(jnp.arange(T), (N, T))
    hidden_NxTxD, cache = model.extend(tokens_NxT, positions_NxT, model.empty_cache(N, T, dtype))
    assert cache is not None
    hidden_NxD = hidden_NxTxD[jnp.arange(N), lengths_N - 1]
    return _place(filled, (cache, hidden_NxD), row)


def _extend(
    tree: Any,
    leaves: list[Any],
    cache: Cache,
    tokens_1xT: jax.Array,
    first: jax.Array,
    count: jax.Array,
) -> Filled:
    """Run right-padded tokens from slot `first` on; the cache, and the last one's hidden state.

    What padding writes behind them is written again before it is read.
    """
    model: Transformer = nnx.merge(*jax.tree.unflatten(tree, leaves))
    positions_1xT = first + jnp.arange(tokens_1xT.shape[1])[None]
    hidden_1xTxD, extended = model.extend(tokens_1xT, positions_1xT, cache)
    assert extended is not None
    return extended, jax.lax.dynamic_index_in_dim(hidden_1xTxD, count - 1, axis=1, keepdims=False)


def _place(filled: Filled, some: Filled, row: jax.Array) -> Filled:
    """What some prompts gave, as rows from `row` on of what all of them do."""
    return jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_slice(
            whole, part, (row, *[0] * (whole.ndim - 1))
        ),
        filled,
        some,
    )


def _spread(layer: KVCache, rows_B: jax.Array) -> KVCache:
    """The cache of each sequence, out of the cache of each prompt."""
    return jax.tree.map(lambda part: part[rows_B], layer)


def _first(
    tree: Any,
    leaves: list[Any],
    hidden_UxD: jax.Array,
    rows_B: jax.Array,
    lengths_B: jax.Array,
    seen_BxV: jax.Array,
    settings: SamplingArrays,
) -> tuple[jax.Array, jax.Array]:
    """Draw the first token of each sequence; returns them, and the tokens seen with them."""
    model: Transformer = nnx.merge(*jax.tree.unflatten(tree, leaves))
    logits_BxV = model.next_logits(hidden_UxD[rows_B], exact_ranks(seen_BxV, settings))
    drawn_B = sample(logits_BxV, seen_BxV, lengths_B, settings)
    return drawn_B, seen_BxV.at[jnp.arange(len(rows_B)), drawn_B].set(True)


def _decode(
    tree: Any,
    leaves: list[Any],
    state: DecodeState,
    tokens_B: jax.Array,
    settings: SamplingArrays,
) -> tuple[jax.Array, DecodeState]:
    """Feed the last token of each sequence and draw the next, int32 `[B]`."""
    model: Transformer = nnx.merge(*jax.tree.unflatten(tree, leaves))
    hidden_Bx1xD, cache = model.extend(tokens_B[:, None], state.positions_B[:, None], state.cache)
    assert cache is not None
    positions_B = state.positions_B + 1
    logits_BxV = model.next_logits(hidden_Bx1xD[:, 0], exact_ranks(state.seen_BxV, settings))
    drawn_B = sample(logits_BxV, state.seen_BxV, positions_B, settings)
    rows_B = jnp.arange(drawn_B.shape[0])
    seen_BxV = state.seen_BxV.at[rows_B, drawn_B].set(True)
    return drawn_B, DecodeState(cache, positions_B, seen_BxV)
