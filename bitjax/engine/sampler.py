"""Rows of logits to tokens, each row by its own settings; ffi/sampling.h has the equations.

A token depends on its row of logits, the settings, and noise made of (seed, sample, position): not
on what else is drawn in the same call.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from bitjax.engine.request import MAX_LOGPROBS, Sampling, TokenLogprob
from bitjax.infer.sampling import UNFILTERED_RANKS
from bitjax.ops import ffi

NOTHING_ALLOWED, NOT_FINITE = -1, -2


class Edits:
    """Tokens whose logits penalties and biases change, of one sequence.

    Args:
        sampling: its settings.
        prompt: its tokens.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self.repeats = sampling.repetition_penalty != 1
        self.counts = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._places: dict[int, int] = {}
        self._tokens = np.zeros(8, np.int32)
        self._values = np.zeros((8, 3), np.float32)  # seen, count, bias
        for token, bias in sampling.logit_bias.items():
            place = self._place(token)
            self._values[place, 2] = bias
        if self.repeats:
            for token in prompt:
                place = self._place(token)
                self._values[place, 0] = 1

    def add(self, token: int) -> None:
        """A token was generated."""
        if self.repeats or self.counts:
            place = self._place(token)
            self._values[place, 0] = self.repeats
            self._values[place, 1] += 1

    def copy(self) -> Edits:
        """Another with the same tokens so far, to try guesses on."""
        other = copy.copy(self)
        other._places = self._places.copy()
        other._tokens, other._values = self._tokens.copy(), self._values.copy()
        return other

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 `[E]`; seen, count and bias float32 `[E, 3]`. Views."""
        size = len(self._places)
        return self._tokens[:size], self._values[:size]

    def _place(self, token: int) -> int:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._values = np.concatenate([self._values, np.zeros_like(self._values)])
        self._tokens[place] = token
        return place


@dataclass
class Draw:
    """One token to be drawn.

    Attributes:
        row: of the logits.
        sampling: settings.
        sample: of the request.
        position: of the token in its sequence.
        edits: tokens and values, as of `Edits.arrays`, copied.
        mask: uint32 `[ceil(V / 32)]`, a bit for each token that is allowed; None allows all.
    """

    row: int
    sampling: Sampling
    sample: int
    position: int
    edits: tuple[np.ndarray, np.ndarray] | None = None
    mask: np.ndarray | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing but the logits and the noise decides, and only the token is asked for."""
        return self.edits is None and self.mask is None and self.sampling.logprobs is None


def ranks_for(draw: Draw, vocab: int) -> int:
    """How many of the largest logits must be exact for the draw to be.

    1 for greedy, `top_k` where it is set; else all tokens count, and the likeliest 64 shall be
    exact. What lowers tokens lets as many others pass; what may lift any needs all.
    """
    s = draw.sampling
    ranks = 1 if s.temperature == 0 else min(s.top_k, vocab) if s.top_k else UNFILTERED_RANKS
    if s.logprobs is not None:
        ranks = max(ranks, UNFILTERED_RANKS)
    if draw.edits is not None and len(draw.edits[0]):
        lifts = (
            s.repetition_penalty < 1
            or s.presence_penalty < 0
            or s.frequency_penalty < 0
            or bool((draw.edits[1][:, 2] > 0).any())
        )
        ranks = vocab if lifts else ranks + len(draw.edits[0])
    if draw.mask is not None and s.logprobs is not None:
        ranks = vocab  # which counts what is allowed alone; the likeliest need not be
    return min(ranks, vocab)


def plain_settings(draws: list[Draw]) -> tuple[np.ndarray, np.ndarray]:
    """Settings of plain draws as `ops.ffi.sample_rows` takes them: `[draws, 3]`, `[draws, 8]`."""
    floats, integers = np.empty((len(draws), 3), np.float32), np.empty((len(draws), 4), np.uint64)
    for i, draw in enumerate(draws):
        s = draw.sampling
        floats[i] = s.temperature, s.top_p, s.min_p
        integers[i] = s.top_k, s.seed, draw.sample, draw.position
    return floats, integers.astype("<u8").view("<u4").astype(np.uint32)


def sample(
    logits_SxV: np.ndarray, draws: list[Draw]
) -> tuple[np.ndarray, list[TokenLogprob | None]]:
    """Tokens int32 `[draws]`, negative where there is none, and log-probabilities asked for.

    Raises:
        ModuleNotFoundError: without the extension.
    """
    count, words = len(draws), -(-logits_SxV.shape[1] // 32)
    floats = np.empty((count, 6), np.float32)
    integers = np.empty((count, 7), np.int64)
    offsets = np.zeros(count + 1, np.int64)
    masks: list[np.ndarray] = []
    most = 0
    for i, draw in enumerate(draws):
        s = draw.sampling
        floats[i] = (
            s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty,
            s.frequency_penalty,
        )  # fmt: skip
        wanted = -1 if s.logprobs is None else s.logprobs
        most = max(most, wanted)
        mask = -1
        if draw.mask is not None:
            mask = len(masks)
            masks.append(draw.mask)
        integers[i] = (draw.row, s.top_k, s.seed, draw.sample, draw.position, mask, wanted)
        offsets[i + 1] = offsets[i] + (0 if draw.edits is None else len(draw.edits[0]))
    edits = [draw.edits for draw in draws if draw.edits is not None]
    tokens = np.concatenate([e[0] for e in edits]) if edits else np.zeros(0, np.int32)
    values = np.concatenate([e[1] for e in edits]) if edits else np.zeros((0, 3), np.float32)
    allowed = np.stack(masks) if masks else np.zeros((0, words), np.uint32)
    drawn, logprobs = np.empty(count, np.int32), np.empty(count, np.float32)
    assert most <= MAX_LOGPROBS
    top_tokens, top_logprobs = (
        np.empty((count, most), np.int32),
        np.empty((count, most), np.float32),
    )
    ffi.sample(logits_SxV, floats, integers, offsets, tokens, values, allowed,
               drawn, logprobs, top_tokens, top_logprobs)  # fmt: skip
    about: list[TokenLogprob | None] = []
    for i, draw in enumerate(draws):
        asked = draw.sampling.logprobs
        if asked is None or drawn[i] < 0:
            about.append(None)
            continue
        pairs = zip(top_tokens[i, :asked].tolist(), top_logprobs[i, :asked].tolist(), strict=True)
        top = tuple(pair for pair in pairs if pair[0] >= 0)
        about.append(TokenLogprob(int(drawn[i]), float(logprobs[i]), top))
    return drawn, about
