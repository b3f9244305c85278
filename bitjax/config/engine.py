"""How the batch engine works: `bitjax.engine`."""

from __future__ import annotations

from dataclasses import dataclass

from bitjax.config.fields import check_fields, require
from bitjax.config.model import CacheDType


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the batch engine. None of them changes what a request gives, to the bit.

    But for `cache_dtype`: an int8 or bfloat16 cache rounds keys and values.

    Attributes:
        cache_dtype: of keys and values; the model's if None.
        max_sequences: that run together; a request with n samples is n sequences.
        context: tokens that a sequence may have, prompt included; the model's if None.
        memory: bytes of the cache; None takes what `max_sequences` of `context` tokens need (of
            1,024 if that is less, for few use all of it), and at most `memory_share` of what is
            available.
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
        check_fields(self)
        context, memory = self.context, self.memory
        require(self.max_sequences >= 1, f"max_sequences={self.max_sequences} is below 1")
        require(context is None or context >= 2, f"context={context} is below 2")
        require(memory is None or memory > 0, f"memory={memory} is not above 0")
        require(0 < self.memory_share <= 1, f"memory_share={self.memory_share} is not in (0, 1]")
        require(self.step_tokens >= 1, f"step_tokens={self.step_tokens} is below 1")
        require(self.lookup >= 0, f"lookup={self.lookup} is below 0")
        require(self.lookup_rows >= 0, f"lookup_rows={self.lookup_rows} is below 0")
