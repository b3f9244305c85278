"""How the batch engine works: `bitjax.engine`."""

from __future__ import annotations

from dataclasses import dataclass

from bitjax.config.model import CacheDType


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the batch engine. None of them changes what a request gives, to the bit.

    But for `cache_dtype`: an int8 or bfloat16 cache rounds keys and values.

    Attributes:
        cache_dtype: of keys and values; the model's if None.
        max_sequences: that run together; a request with n samples is n sequences.
        context: tokens that a sequence may have, prompt included; the model's if None.
        memory: bytes of the cache; None takes what `max_sequences` of `context` tokens need, and
            at most `memory_share` of what is available.
        memory_share: in (0, 1], see `memory`.
        step_tokens: most tokens that one step runs: one of each sequence that generates, the rest
            of prompts, which are cut into pieces to fit.
        sharing: whether prompts that begin alike share the cache of their beginning.
        lookup: most tokens that are guessed from the text so far and checked together (prompt
            look-up); 0 guesses none.
        lookup_rows: guesses are made while all sequences together need no more rows than this, for
            which reading the weights costs more than the products.
    """

    cache_dtype: CacheDType | None = None
    max_sequences: int = 32
    context: int | None = None
    memory: int | None = None
    memory_share: float = 0.5
    step_tokens: int = 128
    sharing: bool = True
    lookup: int = 4
    lookup_rows: int = 8

    def __post_init__(self) -> None:
        for holds, what in (
            (self.max_sequences >= 1, f"max_sequences={self.max_sequences} is below 1"),
            (self.context is None or self.context >= 2, f"context={self.context} is below 2"),
            (self.memory is None or self.memory > 0, f"memory={self.memory} is not above 0"),
            (0 < self.memory_share <= 1, f"memory_share={self.memory_share} is not in (0, 1]"),
            (self.step_tokens >= 1, f"step_tokens={self.step_tokens} is below 1"),
            (self.lookup >= 0, f"lookup={self.lookup} is below 0"),
            (self.lookup_rows >= 0, f"lookup_rows={self.lookup_rows} is below 0"),
        ):
            if not holds:
                raise ValueError(what)
