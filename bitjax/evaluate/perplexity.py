"""Perplexity and bits per byte of a text under any scoring function.

Every token but the first is scored exactly once. The text is cut into windows of `seq_len`
predictions that start every `stride` tokens; a window scores only the predictions that no earlier
window has, so each of them (beyond the first window) has at least `seq_len - stride` tokens of
context.

    nats per token  m = mean of -log p        perplexity = exp(m)
    bits per byte   m / ln 2 * tokens / bytes that they stand for

The standard error treats the mean of each window as one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitjax.model import Transformer
from bitjax.printable import html_table
from bitjax.tokenizer import ByteTokenizer, Tokenizer

# int32 [B, T + 1] tokens -> float [B, T] negative log-likelihoods in nats of tokens 1..T
Scorer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TextScore:
    """The score of one text.

    Attributes:
        nats_per_token: mean negative log-likelihood.
        standard_error: of `nats_per_token`, over windows.
        tokens: scored.
        bytes: of text that they stand for.
    """

    nats_per_token: float
    standard_error: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """What the text costs, whatever its tokens."""
        return self.nats_per_token / math.log(2) * self.tokens / self.bytes

    @property
    def bits_per_byte_error(self) -> float:
        """Standard error of `bits_per_byte`."""
        return self.standard_error / math.log(2) * self.tokens / self.bytes

    @property
    def perplexity(self) -> float:
        """Per token; infinite beyond what float64 holds."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    def _repr_html_(self) -> str:
        return html_table(
            ("tokens", "bits per byte", "perplexity per token"),
            [(
                f"{self.tokens:,}", f"{self.bits_per_byte:.4f} ± {self.bits_per_byte_error:.4f}",
                f"{self.perplexity:,.3f}",
            )],
        )  # fmt: skip


def score_text(
    scorer: Scorer,
    tokens: np.ndarray,
    seq_len: int,
    stride: int | None = None,
    batch: int = 16,
    scored_bytes: int | None = None,
) -> TextScore:
    """Score all of `tokens` but the first.

    Args:
        scorer: see `Scorer`; called with batches of one shape only.
        tokens: integers `[n]`, n >= 2.
        seq_len: predictions in a window.
        stride: predictions between the starts of windows, 1..seq_len; default half of seq_len.
        batch: windows scored together.
        scored_bytes: of all tokens but the first; by default a byte each.

    Raises:
        ValueError: too few tokens, or a stride or batch out of range.
    """
    stride = max(1, seq_len // 2) if stride is None else stride
    if len(tokens) < 2:
        raise ValueError(f"a text of {len(tokens)} tokens cannot be scored; it needs 2 or more")
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride={stride} is not in 1..{seq_len}, the window length")
    if batch < 1:
        raise ValueError(f"batch={batch} must be above 0")
    predictions = len(tokens) - 1
    starts = list(range(0, max(1, predictions - seq_len + stride), stride))
    padded = np.zeros(starts[-1] + seq_len + 1, np.int32)
    padded[: len(tokens)] = tokens
    sums, counts = [], []
    for i in range(0, len(starts), batch):
        chunk = starts[i : i + batch]
        filled = chunk + [chunk[-1]] * (batch - len(chunk))  # one shape: one compilation
        windows = padded[np.array(filled)[:, None] + np.arange(seq_len + 1)]
        losses = np.asarray(scorer(windows), np.float64)
        for start, row in zip(chunk, losses, strict=False):
            first = 0 if start == 0 else seq_len - stride
            fresh = row[first : min(seq_len, predictions - start)]
            sums.append(fresh.sum())
            counts.append(len(fresh))
    mean = sum(sums) / sum(counts)
    deviations = np.array(sums) - mean * np.array(counts)
    n = len(sums)
    error = math.sqrt((deviations**2).sum() * n / max(1, n - 1)) / sum(counts)
    size = predictions if scored_bytes is None else scored_bytes
    return TextScore(float(mean), error if n > 1 else math.nan, predictions, size)


def tokens_of(tokenizer: Tokenizer, raw: bytes, name: str) -> tuple[np.ndarray, int]:
    """Tokens of a text, and the bytes that all of them but the first stand for.

    Args:
        tokenizer: any.
        raw: the text; UTF-8 but for byte tokens.
        name: of the text, for messages.

    Raises:
        ValueError: not UTF-8.
    """
    if isinstance(tokenizer, ByteTokenizer):
        tokens = np.frombuffer(raw, np.uint8)
        return tokens, len(tokens) - 1
    try:
        tokens = tokenizer.encode(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 at byte {error.start:,}") from None
    # A token that begins every text stands for nothing.
    first = len(tokenizer.decode(tokens[:1]).encode()) if len(tokens) else 0
    return tokens, max(1, len(raw) - first)


def model_scorer(model: Transformer) -> Scorer:
    """A compiled scorer of a float or packed model."""
    graph, params = nnx.split(model)

    @jax.jit
    def losses(params: nnx.State, windows_BxT1: jax.Array) -> jax.Array:
        logits_BxTxV = nnx.merge(graph, params)(windows_BxT1[:, :-1])
        log_p = jax.nn.log_softmax(logits_BxTxV, axis=-1)
        return -jnp.take_along_axis(log_p, windows_BxT1[:, 1:, None], axis=-1)[..., 0]

    return lambda windows: np.asarray(losses(params, windows))
