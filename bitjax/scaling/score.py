"""The loss that a table holds: of all held-out tokens, document by document.

The held-out text is cut into windows of T predictions one behind the other; every token but the
first is predicted once, from the tokens before it in its window. T is the length of the sequences
in training, so no run is scored beyond what it was trained for.

The standard error treats documents as independent (`bitjax.evaluate.rolling` has the equation of
such a ratio), or windows where there are fewer than `FEWEST` documents.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitjax.config import RunConfig
from bitjax.corpus.store import Corpus, is_corpus
from bitjax.evaluate import model_scorer
from bitjax.model import Transformer
from bitjax.tokenizer import BYTES
from bitjax.train.data import load_text

FEWEST = 20  # documents: fewer say too little of how documents differ
BATCH = 32  # windows scored together


@dataclass(frozen=True)
class HeldOut:
    """What runs are scored on.

    Attributes:
        tokens: int32 `[n]`.
        ends: int64, of the first tokens that belong to each unit of the standard error.
        bytes: of text that all tokens stand for.
        tokenizer: its name, with the hash of a trained one.
        data: identity of the whole corpus.
        identity: of the held-out tokens and the length of windows.
        train_tokens: how many there are to train on.
        window: T.
    """

    tokens: np.ndarray
    ends: np.ndarray
    bytes: int
    tokenizer: str
    data: str
    identity: str
    train_tokens: int
    window: int


def held_out(config: RunConfig) -> HeldOut:
    """The held-out part of a run's data, a corpus or a text.

    Raises:
        ValueError: nothing readable, or too short.
    """
    T, path = config.train.seq_len, Path(config.data.text)
    if config.data.mixture:
        raise ValueError("a study is of one corpus; data.mixture names several")
    if config.data.text and is_corpus(path):
        corpus = Corpus(path)
        part = corpus.valid
        if part.kind != "text":
            raise ValueError(f"{path} is a corpus of {part.kind}; a study needs text")
        tokens = part.windows(np.zeros(1, np.int64), part.tokens)[0]
        starts, count = np.asarray(part.starts[1:-1]), part.documents
        about = corpus.index["tokenizer_sha256"]
        tokenizer = corpus.tokenizer.name + (f" {about[:12]}" if about else "")
        data, size = corpus.identity, corpus.index["parts"]["valid"]["bytes"]
        train_tokens = corpus.train.tokens
    else:
        text = load_text(config.data)
        tokens, starts, count = text.valid.astype(np.int32), np.empty(0, np.int64), 1
        tokenizer, data, size = BYTES.name, text.sha256, len(tokens)
        train_tokens = len(text.train)
    if len(tokens) < T + 1:
        raise ValueError(
            f"{config.data.text or 'the packaged text'} holds out {len(tokens)} tokens; windows of "
            f"{T} need {T + 1}"
        )
    if count < FEWEST:
        starts = np.arange(T, len(tokens) - 1, T)
    digest = hashlib.sha256(f"windows of {T}, stride {T}\n".encode())
    digest.update(tokens.astype("<i4").tobytes())
    return HeldOut(
        tokens, np.append(starts, len(tokens)), size, tokenizer, data, digest.hexdigest(),
        train_tokens, T,
    )  # fmt: skip


@dataclass(frozen=True)
class Score:
    """Of one model.

    Attributes:
        loss: nats per token.
        error: standard error of it.
        bits_per_byte: what the text costs.
        tokens, nats: of each document (or window).
    """

    loss: float
    error: float
    bits_per_byte: float
    tokens: list[int]
    nats: list[float]


def score(model: Transformer, held: HeldOut) -> Score:
    """The model's loss on all held-out tokens but the first."""
    scorer, T = model_scorer(model), held.window
    predictions = len(held.tokens) - 1
    windows = math.ceil(predictions / T)
    padded = np.zeros(windows * T + 1, np.int32)
    padded[: len(held.tokens)] = held.tokens
    cut = np.lib.stride_tricks.sliding_window_view(padded, T + 1)[::T]
    losses = np.empty((math.ceil(windows / BATCH) * BATCH, T))
    for first in range(0, windows, BATCH):
        chosen = np.minimum(np.arange(first, first + BATCH), windows - 1)  # one shape for all
        losses[first : first + BATCH] = scorer(cut[chosen])
    each = np.concatenate([[0.0], losses[:windows].reshape(-1)[:predictions]])
    firsts = np.concatenate([[0], held.ends[:-1]])
    nats = np.add.reduceat(each, firsts)
    counts = np.diff(held.ends, prepend=0)
    counts[0] -= 1  # nothing predicts the first token
    mean, n = nats.sum() / predictions, len(nats)
    error = math.sqrt(((nats - mean * counts) ** 2).sum() * n / max(1, n - 1)) / predictions
    bits = mean / math.log(2) * len(held.tokens) / held.bytes
    return Score(float(mean), error, float(bits), counts.tolist(), nats.tolist())
