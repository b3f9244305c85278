"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from bitjax.infer.sampling import SamplingParams

FinishReason = Literal["", "stop", "length", "cancelled", "error"]
ConstraintKind = Literal["json_schema", "regex", "lark"]
MAX_LOGPROBS = 20  # as many as OpenAI's interface knows; all of them are exact with a screened head
MAX_SAMPLES = 1024
MAX_STOPS = 64  # of strings, and of ids
MAX_BIASES = 1024


@dataclass(frozen=True)
class Constraint:
    """What the text must match.

    Attributes:
        kind: "json_schema" (`text` is the schema, in JSON), "regex", or "lark" (a grammar).
        text: of that kind.
    """

    kind: ConstraintKind
    text: str


@dataclass(frozen=True)
class Sampling(SamplingParams):
    """How one request is sampled: `SamplingParams`, and what only the engine knows.

    In this order, for every token (l logits, c how often the text so far has it, prompt excluded):

        l' = l / r if l > 0 else l * r              for tokens of prompt and text
        l' - presence (c > 0) - frequency c + bias
        what the constraint allows, temperature, top-k, top-p, min-p

    Attributes:
        presence_penalty, frequency_penalty: in [-2, 2]; 0 is none.
        stop_ids: tokens that end the text, beside the tokenizer's; not part of it.
        ignore_eos: the tokenizer's own do not end the text.
        logit_bias: added to the logits of these tokens; -100 and less forbid.
        logprobs: None gives none; else those of the tokens drawn and of so many likeliest, of the
            model's own distribution, before penalties and temperature.
        n: samples; sample i draws with noise of its own, sample 0 as it would alone.
        constraint: what the text must match; None is anything.
        lookup: False lets this request alone not guess (`EngineConfig.lookup`).
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    logprobs: int | None = None
    n: int = 1
    constraint: Constraint | None = None
    lookup: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        penalties = ("presence_penalty", self.presence_penalty), (
            "frequency_penalty", self.frequency_penalty,
        )  # fmt: skip
        for name, value in penalties:
            if not -2 <= value <= 2:
                raise ValueError(f"{name}={value} is not in [-2, 2]")
        for holds, what in (
            (1 <= self.n <= MAX_SAMPLES, f"n={self.n} is not in 1..{MAX_SAMPLES}"),
            (
                self.n == 1 or self.temperature > 0,
                f"n={self.n} samples at temperature 0 would all be the same",
            ),
            (
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"logprobs={self.logprobs} is not in 0..{MAX_LOGPROBS}",
            ),
            (
                len(self.stop) <= MAX_STOPS and len(self.stop_ids) <= MAX_STOPS,
                f"{max(len(self.stop), len(self.stop_ids))} stops; at most {MAX_STOPS} are taken",
            ),
            (
                len(self.logit_bias) <= MAX_BIASES,
                f"logit_bias has {len(self.logit_bias)} tokens; at most {MAX_BIASES} are taken",
            ),
            (
                all(math.isfinite(bias) for bias in self.logit_bias.values()),
                "logit_bias has a number that is not finite",
            ),
        ):
            if not holds:
                raise ValueError(what)


@dataclass(frozen=True)
class Request:
    """One prompt, and how it is continued.

    Attributes:
        id: unique among the requests that are not finished.
        prompt: text, which the model's tokenizer encodes, or token ids.
        sampling: see `Sampling`.
    """

    id: str
    prompt: str | tuple[int, ...]
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token drawn, and of the likeliest ones: (token, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: of the prompt, those of it that were shared, and those generated.

    Attributes:
        guessed, accepted: tokens that prompt look-up proposed, and those of them that were right.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    guessed: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds since the request was submitted.

    Attributes:
        started: its prompt began to run.
        first_token: its first token was drawn.
        finished: all was done.
    """

    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(frozen=True)
class Choice:
    """One finished sample.

    Attributes:
        index: 0..n-1.
        text: without stop strings.
        tokens: generated, those that stopped it included.
        finish_reason: "stop", "length", "cancelled" or "error".
        logprobs: of each token, if asked for.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished request; with an error, which is then one sentence, no choices need be there."""

    id: str
    choices: tuple[Choice, ...]
    usage: Usage = Usage()
    timings: Timings = Timings()
    error: str = ""


@dataclass(frozen=True)
class Delta:
    """What a step added to one sample.

    Attributes:
        id, index: of the request and the sample.
        text: released now; may be empty, for a character or a possible stop string is held back.
        tokens: drawn now.
        logprobs: of these, if asked for.
        finish_reason: empty until the sample is finished.
        completion: with the last delta of the request, all of it.
    """

    id: str
    index: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason = ""
    completion: Completion | None = None
