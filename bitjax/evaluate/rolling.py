"""Perplexity document by document: every token of a document is scored, and nothing crosses over.

A document begins after the tokenizer's beginning token. One longer than the model's context is cut
into windows that predict disjoint parts; the last window is as long as the others and so sees more
of what is before it. These are the rolling log-likelihoods of EleutherAI's lm-evaluation-harness.

The standard error treats documents as independent; it is that of a ratio of means,

    m = sum of nats / sum of tokens     error^2 = n / (n - 1) sum (nats_i - m tokens_i)^2 / tokens^2
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from bitjax.corpus.store import Part
from bitjax.evaluate.perplexity import TextScore
from bitjax.evaluate.requests import Request, RequestScorer, beginning
from bitjax.tokenizer import Tokenizer, utf8


def rolling_requests(tokens: np.ndarray, first: int, longest: int) -> list[Request]:
    """Windows that together score every token once.

    Args:
        tokens: int32 `[T]`, without a beginning.
        first: token that stands before them.
        longest: tokens that the model reads.
    """
    whole = np.concatenate([[first], tokens]).astype(np.int32)
    made = []
    for start in range(0, len(tokens), longest):
        end = min(start + longest, len(tokens))
        made.append(Request(whole[max(0, end - longest) : end + 1], end - start))
    return made


def score_documents(
    scorer: RequestScorer, tokenizer: Tokenizer, documents: Sequence[str]
) -> tuple[TextScore, list[float]]:
    """Score documents.

    Args:
        scorer: of the model.
        tokenizer: of the model.
        documents: at least one that is not empty; empty ones count nothing.

    Returns:
        The score of all, and the log-likelihood of each in nats.

    Raises:
        ValueError: nothing to score.
    """
    made = (_without_beginning(tokenizer, tokenizer.encode(text)) for text in documents)
    size = sum(len(utf8(text)) for text in documents)
    return score_token_documents(scorer, tokenizer, made, size)


def score_corpus_documents(
    scorer: RequestScorer, part: Part, tokenizer: Tokenizer, size: int
) -> tuple[TextScore, list[float]]:
    """Score the documents of a corpus, without the tokens that begin and end each.

    Args:
        scorer: of the model.
        part: of the corpus.
        tokenizer: of both.
        size: UTF-8 bytes of all texts.

    Raises:
        ValueError: nothing to score, or a damaged file.
    """

    def documents() -> Iterator[np.ndarray]:
        for start, end in pairwise(part.starts.tolist()):
            tokens = part.windows(np.array([start]), end - start)[0]
            if tokenizer.stop and len(tokens) and tokens[-1] == tokenizer.stop[0]:
                tokens = tokens[:-1]
            yield _without_beginning(tokenizer, tokens)

    return score_token_documents(scorer, tokenizer, documents(), size)


def _without_beginning(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    begins = len(tokens) and tokens[0] == beginning(tokenizer)
    return tokens[1:] if begins and not utf8(tokenizer.decode(tokens[:1])) else tokens


def score_token_documents(
    scorer: RequestScorer, tokenizer: Tokenizer, documents: Iterable[np.ndarray], size: int
) -> tuple[TextScore, list[float]]:
    """Score documents of tokens.

    Args:
        scorer: of the model.
        tokenizer: of the model; names the token that stands before each document.
        documents: int32 `[T]` each, without a beginning.
        size: UTF-8 bytes that all tokens stand for.

    Returns:
        The score of all, and the log-likelihood of each in nats.

    Raises:
        ValueError: nothing to score.
    """
    first, n = beginning(tokenizer), 0
    requests: list[Request] = []
    owners: list[int] = []
    for tokens in documents:
        made = rolling_requests(tokens, first, scorer.longest)
        requests += made
        owners += [n] * len(made)
        n += 1
    if not requests:
        raise ValueError(f"{n} documents hold nothing to score")
    nats, counts = np.zeros(n), np.zeros(n)
    for owner, request, score in zip(owners, requests, scorer.score(requests), strict=True):
        nats[owner] -= score.log_likelihood
        counts[owner] += request.scored
    mean = nats.sum() / counts.sum()
    used = np.count_nonzero(counts)
    squares = float(((nats - mean * counts) ** 2).sum())
    error = math.sqrt(squares * used / (used - 1)) / counts.sum() if used > 1 else math.nan
    return TextScore(float(mean), float(error), int(counts.sum()), size), (-nats).tolist()
