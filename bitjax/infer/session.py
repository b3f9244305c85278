"""One growing sequence: of a new prompt only what the last one did not begin with is run.

The KV cache of an answer stays. The next prompt of a chat begins with the same tokens, the answer's
included as far as the tokenizer cuts its text alike; their keys and values are used again, and the
rest is run as a prefill behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitjax.infer.generator import DecodeState, Generator, Stream, TokenStream, padded_length
from bitjax.infer.memory import available_memory, require_memory
from bitjax.infer.programs import Program
from bitjax.infer.sampling import SamplingArrays, SamplingParams
from bitjax.model import Cache


class Session:
    """Generates one text after another, each prompt like the last text so far.

    Args:
        generator: whose model, programs and cache format are used.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._cache: Cache | None = None
        self._slots = 0
        self._held: list[int] = []  # tokens whose keys and values the cache has
        self._grow = Program(_grow, donate=1)
        self.reused = 0  # tokens of the last prompt that were not run

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Stream:
        """Continue a token prompt, piece by piece.

        Raises:
            ValueError: an empty prompt, or one that leaves no room in the context.
        """
        writer = self._generator.writer(prompt, params)
        text = self._generator.tokenizer.decode(prompt)
        return Stream(text, writer, self._tokens(list(prompt), params, writer.room))

    def compile(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Compile for such a prompt, before anything is timed."""
        room = self._generator.writer(prompt, params).room
        self._start(list(prompt), params, room, Program.shapes)

    def _tokens(self, prompt: list[int], params: SamplingParams, room: int) -> TokenStream:
        """As `Generator.tokens`, for `room` tokens at most."""
        drawn_B, state, settings = self._start(prompt, params, room, Program.__call__)
        leaves, decode = self._generator.leaves, self._generator.decode
        fed: list[jax.Array] = []
        try:
            # Each step is started before the caller sees the token it continues.
            for _ in range(room - 1):
                known_B = drawn_B
                drawn_B, state = decode(leaves, state, known_B, settings)
                fed.append(known_B)
                yield np.asarray(known_B)
            yield np.asarray(drawn_B)
        finally:
            self._cache = state.cache
            self._held = [*prompt, *(int(token[0]) for token in fed)]

    def _start(
        self, prompt: list[int], params: SamplingParams, room: int, run: Callable[..., Any]
    ) -> tuple[Any, DecodeState, SamplingArrays]:
        """Run what is new of the prompt and draw; or, with `Program.shapes`, only compile."""
        generator, limit = self._generator, self._generator.config.max_seq_len
        cache, kept = self._prepared(prompt, min(limit, len(prompt) + room), run)
        cache, hidden_1xD = generator.extended(cache, prompt[kept:], kept, run)
        seen_1xV = np.zeros((1, generator.config.vocab_size), bool)
        seen_1xV[0, prompt] = True
        settings, length_1 = SamplingArrays.stack([params]), np.array([len(prompt)], np.int32)
        drawn_1, seen_1xV = run(
            generator.first, generator.leaves, hidden_1xD, np.zeros(1, np.int32), length_1,
            seen_1xV, settings,
        )  # fmt: skip
        state = DecodeState(cache, jnp.asarray(length_1), seen_1xV)
        if run is Program.shapes:
            generator.decode.compiled(generator.leaves, state, drawn_1, settings)
        else:
            self.reused = kept
        return drawn_1, state, settings

    def _prepared(self, prompt: list[int], needed: int, run: Callable[..., Any]) -> tuple[Any, int]:
        """A cache of at least `needed` slots, and how many tokens of the prompt it has."""
        generator = self._generator
        cache, held, slots = self._cache, self._held, self._slots
        if run is not Program.shapes:
            self._cache = None  # what stops us now may leave it half written, or donated away
        if cache is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
            cache, held, slots = None, [], 0
        if slots < needed:
            # Twice as many at a time: few sizes, so few compiled programs and copies.
            slots = min(generator.config.max_seq_len, max(2 * slots, padded_length(needed)))
            require_memory(
                f"a conversation of up to {slots} tokens",
                generator.memory(1, 1, slots, padded_length(len(prompt))),
                available_memory(),
            )
            empty, _ = run(generator.empty, 1, slots)
            cache = empty if cache is None else run(self._grow, cache, empty)
        if run is not Program.shapes:
            self._slots = slots
        # One token at least has to be run: it gives the logits.
        pairs = zip(held, prompt[:-1], strict=False)
        kept = next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(held), len(prompt) - 1)
        )
        return cache, kept


def _grow(cache: Cache, empty: Cache) -> Cache:
    """The same slots at the beginning of a larger cache."""
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(new, old, [0] * new.ndim), cache, empty
    )
