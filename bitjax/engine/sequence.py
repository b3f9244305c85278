"""One sample of a request while it is generated."""

from __future__ import annotations

import time

from bitjax.engine.constraint import Matcher
from bitjax.engine.lookup import Lookup
from bitjax.engine.pages import Page
from bitjax.engine.request import (
    Choice,
    Completion,
    FinishReason,
    Request,
    Timings,
    TokenLogprob,
    Usage,
)
from bitjax.engine.sampler import Edits
from bitjax.infer.writer import TextWriter


class Job:
    """A request and its samples.

    Attributes:
        request: as it was submitted.
        prompt: its tokens.
        sequences: one a sample.
        cancelled: it shall end.
    """

    def __init__(self, request: Request, prompt: list[int], sequences: list[Sequence]) -> None:
        self.request = request
        self.prompt = prompt
        self.sequences = sequences
        self.cancelled = False
        self.submitted = time.perf_counter()
        self.started = self.first_token = 0.0
        self.cached_tokens = -1  # before any of the prompt has run
        for sequence in sequences:
            sequence.job = self

    def since(self) -> float:
        """Seconds since it was submitted."""
        return time.perf_counter() - self.submitted

    @property
    def finished(self) -> bool:
        """Whether all samples are."""
        return all(sequence.reason for sequence in self.sequences)

    def completion(self) -> Completion:
        """What it gave."""
        errors = [s.error for s in self.sequences if s.error]
        return Completion(
            self.request.id,
            tuple(
                Choice(s.index, s.writer.text, tuple(s.tokens[len(self.prompt) :]), s.reason,
                       tuple(s.logprobs))
                for s in self.sequences
            ),
            Usage(
                len(self.prompt), max(self.cached_tokens, 0),
                sum(len(s.tokens) - len(self.prompt) for s in self.sequences),
                sum(s.guessed for s in self.sequences), sum(s.accepted for s in self.sequences),
            ),
            Timings(self.started, self.first_token, self.since()),
            errors[0] if errors else "",
        )  # fmt: skip


class Sequence:
    """Tokens, and how far they have been run.

    Attributes:
        index: of the sample.
        tokens: prompt and text.
        done: tokens whose keys and values are in the pages.
        pages: of the cache, the first slots first.
        table: row of the page tables while it runs, else -1.
        matcher: of its constraint.
        passed: how often another was admitted before it.
        reason: why it finished; empty until then.
    """

    job: Job

    def __init__(
        self, index: int, prompt: list[int], writer: TextWriter, edits: Edits, guesses: bool
    ) -> None:
        self.index = index
        self.tokens = list(prompt)
        self.writer = writer
        self.edits = edits
        self.edited = bool(len(edits.arrays[0])) or edits.repeats or edits.counts
        self.lookup = Lookup() if guesses else None
        self.matcher: Matcher | None = None
        self.guesses: list[int] = []  # run behind the tokens in this step
        self.done = 0
        self.pages: list[Page] = []
        self.table = -1
        self.passed = 0
        self.logprobs: list[TokenLogprob] = []
        self.reason: FinishReason = ""
        self.error = ""
        self.guessed = self.accepted = 0

    @property
    def left(self) -> int:
        """Tokens that have yet to run; 1 once it generates."""
        return len(self.tokens) - self.done

    @property
    def room(self) -> int:
        """Tokens that it may still generate."""
        return self.writer.room - self.writer.tokens

    def fail(self, error: str) -> None:
        """End with an error."""
        self.reason, self.error = "error", error
