"""How many pages: what the sequences need, and what the memory has."""

from __future__ import annotations

from bitjax.config import EngineConfig
from bitjax.engine.pages import pages_for
from bitjax.engine.runner import bucket, page_bytes
from bitjax.infer.memory import available_memory, require_memory
from bitjax.model import Transformer
from bitjax.ops.rows import PAGE

TYPICAL = 1024  # tokens of a sequence that memory is taken for, unless told
FEWEST_PAGES = 2


def sizes(
    model: Transformer, config: EngineConfig, available: int | None = None
) -> tuple[int, int, int]:
    """Context, pages, and their bytes.

    Without a context of its own choice a model's is cut to what the memory has.

    Args:
        model: whose cache it is.
        config: what is wanted.
        available: bytes; asked of the system if None.

    Raises:
        ValueError: too little memory for one sequence; says how much it needs.
    """
    available = available_memory() if available is None else available
    wanted = min(config.context or model.config.max_seq_len, model.config.max_seq_len)
    each = page_bytes(model, config.cache_dtype)
    beside = _step_bytes(model, config)
    if config.memory is not None:
        budget = config.memory
    elif available is None:
        budget = each * config.max_sequences * pages_for(wanted)
    else:
        budget = int(config.memory_share * max(0, available - beside))
    typical = max(pages_for(wanted), config.max_sequences * pages_for(min(wanted, TYPICAL)))
    most = config.max_sequences * pages_for(wanted)
    pages = min(most if config.memory is not None else typical, budget // each)
    fewest = pages_for(wanted) if config.context else min(FEWEST_PAGES, pages_for(wanted))
    if pages < fewest:
        tokens = min(wanted, fewest * PAGE)
        raise ValueError(
            f"the cache of one sequence of {tokens} tokens needs {fewest * each / 1e9:.3f} GB; "
            f"{budget / 1e9:.3f} GB are granted to it (config: memory, memory_share, context)"
        )
    require_memory(
        f"a batch of {config.max_sequences} sequences with {pages} pages of the cache",
        pages * each + beside, available,
    )  # fmt: skip
    return min(wanted, pages * PAGE), pages, pages * each


def _step_bytes(model: Transformer, config: EngineConfig) -> int:
    """About what a step takes beside the pages: activations, and logits (of a screen, twice)."""
    c = model.config
    rows = bucket(max(config.step_tokens, config.max_sequences))
    drawn = bucket(max(config.max_sequences, config.lookup_rows))
    return 4 * (rows * 2 * (c.intermediate_size + c.hidden_size) + 2 * drawn * c.vocab_size)
