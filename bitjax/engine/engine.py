"""Requests in, texts out, many at once.

    engine = Engine(model)
    for completion in engine.generate([Request("a", "ROMEO:"), Request("b", "JULIET:")]):
        print(completion.id, completion.choices[0].text)

A server calls `submit`, `cancel` and `step` itself. What a request gives depends on the model, its
prompt, its settings and the active kernel, to the bit: not on what else runs, on sizes, threads,
or the cutting of prompts (`bitjax.ops.rows`), nor on guesses (`bitjax.engine.lookup`). So a job
that was interrupted can be resumed, and any answer made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from bitjax.config import EngineConfig
from bitjax.engine.constraint import Constraints, Matcher
from bitjax.engine.pages import PageStore, pages_for
from bitjax.engine.request import Completion, Delta, Request, Sampling, TokenLogprob
from bitjax.engine.runner import Runner
from bitjax.engine.sampler import NOTHING_ALLOWED, Draw, Edits, plain_settings, ranks_for, sample
from bitjax.engine.scheduler import Scheduler
from bitjax.engine.sequence import Job, Sequence
from bitjax.engine.sizing import sizes
from bitjax.infer.writer import TextWriter
from bitjax.model import Transformer

AHEAD = 2  # times `max_sequences`, requests that `deltas` takes from its iterable


@dataclasses.dataclass
class Stats:
    """Counts since the engine was made, and what it holds now; for metrics."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # run, so without those shared
    cached_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    preempted: int = 0
    guessed: int = 0
    accepted: int = 0
    pages: int = 0
    pages_used: int = 0


class Piece(NamedTuple):
    """Rows of a step: so many tokens of a sequence, then its guesses."""

    sequence: Sequence
    size: int
    first: int  # row


@dataclasses.dataclass
class Step:
    """Rows that run, or have run.

    Attributes:
        pieces: row by row.
        hidden_RxD: their final states, which may not be there yet.
    """

    pieces: list[Piece]
    hidden_RxD: jax.Array

    @property
    def alive(self) -> list[Piece]:
        """Those of sequences that have not ended since it began."""
        return [piece for piece in self.pieces if not piece.sequence.reason]


class Engine:
    """Runs requests, each with its own settings, in whatever company.

    `submit` and `cancel` may be called from any thread, `step` and `generate` from one at a time.

    Args:
        model: float or packed.
        config: sizes.

    Attributes:
        context: tokens that a sequence may have, prompt included.
        memory: bytes that the pages take.

    Raises:
        ValueError: too little memory, or a vocabulary without all of the tokenizer's tokens.
    """

    def __init__(self, model: Transformer, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.tokenizer = model.tokenizer
        self.vocab_size = model.config.vocab_size
        if self.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"the model has {self.vocab_size} tokens; the tokenizer has "
                f"{self.tokenizer.vocab_size}"
            )
        self.context, pages, self.memory = sizes(model, self.config)
        runner = Runner(
            model, self.config.cache_dtype, pages, self.config.max_sequences, self.context
        )
        self._runner = runner
        self._store = PageStore(pages, self.config.sharing)
        self._scheduler = Scheduler(self.config, self._store, runner)
        self._constraints = Constraints(self.tokenizer, self.vocab_size)
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._arrived: list[Job] = []
        self._counts = Stats()
        self._ahead: Step | None = None  # begun before its tokens were known

    def load(self) -> None:
        """Compile, or read from the disk, all programs now, so that no request waits for one.

        But for the head of a screened model under constraints, which few servers ever run.
        """
        config = self.config
        most = max(config.max_sequences, config.lookup_rows if config.lookup else 1)
        self._runner.load(max(config.step_tokens, most), most)

    @property
    def pending(self) -> int:
        """Requests that are not finished."""
        return len(self._jobs)

    @property
    def stats(self) -> Stats:
        """Numbers of this moment."""
        scheduler = self._scheduler
        return dataclasses.replace(
            self._counts, running=len(scheduler.running), waiting=len(scheduler.waiting),
            preempted=scheduler.preempted, pages=self._store.count, pages_used=self._store.used,
        )  # fmt: skip

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: an empty prompt, one that leaves no room in the context or holds an unknown
                token, a bias or stop for an unknown token, a constraint that cannot be compiled, or
                an id that is in use. No other request is touched.
        """
        prompt = self._tokens_of(request)
        sampling = request.sampling
        for what, tokens in (("logit_bias", sampling.logit_bias), ("stop_ids", sampling.stop_ids)):
            for token in tokens:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(f"{what} has token {token}, not in 0..{self.vocab_size - 1}")
        room = min(sampling.max_new_tokens, self.context - len(prompt))
        if pages_for(len(prompt) + room) > self._store.count:
            raise ValueError(
                f"the request may need {pages_for(len(prompt) + room)} pages of the cache; it has "
                f"{self._store.count}"
            )
        matcher = None
        if sampling.constraint is not None:
            matcher = self._constraints.matcher(sampling.constraint)
        job = Job(request, prompt, [self._sequence(prompt, sampling, room, index, matcher)
                                    for index in range(sampling.n)])  # fmt: skip
        with self._lock:
            if request.id in self._jobs:
                raise ValueError(f"request id {request.id!r} is in use")
            self._jobs[request.id] = job
            self._arrived.append(job)

    def cancel(self, request_id: str) -> bool:
        """Stop a request: its last deltas say "cancelled". False if there is none."""
        with self._lock:
            job = self._jobs.get(request_id)
            if job is not None:
                job.cancelled = True
            return job is not None

    def step(self) -> list[Delta]:
        """Run one step; nothing where nothing is pending."""
        with self._lock:
            for job in self._arrived:
                self._scheduler.waiting.extend(job.sequences)
            self._arrived = []
            cancelled = [job for job in self._jobs.values() if job.cancelled]
        deltas = [delta for job in cancelled for delta in self._cancelled(job)]
        step, self._ahead = self._ahead, None
        if step is None or not step.alive:
            plan = self._scheduler.plan()
            step = self._started(plan) if plan else None
        if step is not None:
            self._counts.steps += 1
            deltas += self._finished(step)
        return deltas

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish, in whatever order; a bad request gives one with an error.

        See `deltas`.
        """
        with contextlib.closing(self.deltas(requests)) as deltas:
            for delta in deltas:
                if delta.completion is not None:
                    yield delta.completion

    def deltas(self, requests: Iterable[Request | None]) -> Generator[Delta, None, None]:
        """What steps add to requests, and one with an error for each that `submit` refuses.

        Requests are taken from the iterable a few ahead of what runs, so it may be endless; None
        is one that is not there yet. What still runs when the iterator is closed is cancelled.
        """
        source, more = iter(requests), True
        live: set[str] = set()
        try:
            while more or self.pending:
                while more and self.pending < AHEAD * self.config.max_sequences:
                    try:
                        request = next(source)
                    except StopIteration:
                        more = False
                        break
                    if request is None:
                        break
                    try:
                        self.submit(request)
                        live.add(request.id)
                    except ValueError as error:
                        refused = Completion(request.id, (), error=str(error))
                        yield Delta(request.id, 0, "", finish_reason="error", completion=refused)
                for delta in self.step():
                    if delta.completion is not None:
                        live.discard(delta.id)
                    yield delta
        finally:
            for name in live:
                self.cancel(name)
            if live:
                self.step()  # which gives up what they hold

    def _tokens_of(self, request: Request) -> list[int]:
        if isinstance(request.prompt, str):
            tokens = self.tokenizer.encode(request.prompt).tolist()
        else:
            tokens = [int(token) for token in request.prompt]
            unknown = next((t for t in tokens if not 0 <= t < self.vocab_size), None)
            if unknown is not None:
                raise ValueError(f"the prompt has token {unknown}, not in 0..{self.vocab_size - 1}")
        if not tokens:
            raise ValueError("the prompt is empty; give at least one character")
        if len(tokens) >= self.context:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; the context of {self.context} leaves no "
                "room for an answer"
            )
        return tokens

    def _sequence(
        self, prompt: list[int], sampling: Sampling, room: int, index: int, matcher: Matcher | None
    ) -> Sequence:
        ends = {*sampling.stop_ids, *(() if sampling.ignore_eos else self.tokenizer.stop)}
        writer = TextWriter(self.tokenizer, sampling, room, ends)
        guesses = bool(self.config.lookup) and sampling.lookup and matcher is None
        sequence = Sequence(index, prompt, writer, Edits(sampling, prompt), guesses)
        sequence.matcher = None if matcher is None else matcher.copy()
        return sequence

    def _started(self, plan: list[tuple[Sequence, int]]) -> Step:
        """Begin to run the rows of a plan."""
        tokens: list[int] = []
        positions: list[int] = []
        tables: list[int] = []
        pieces: list[Piece] = []
        for sequence, count in plan:
            rows = sequence.tokens[sequence.done :][:count] + sequence.guesses
            pieces.append(Piece(sequence, count, len(tokens)))
            tokens += rows
            positions += range(sequence.done, sequence.done + len(rows))
            tables += [sequence.table] * len(rows)
        return Step(
            pieces, self._runner.run(*(np.array(x, np.int32) for x in (tokens, positions, tables)))
        )

    def _finished(self, step: Step) -> list[Delta]:
        """Draw behind the rows of a step, and pass on."""
        wanted: list[int] = []  # rows whose next token is drawn
        draws: list[Draw] = []
        drawing: list[tuple[Sequence, int]] = []  # and where its draws begin
        for sequence, count, first in step.alive:
            self._store.extend(
                sequence.pages, sequence.done, sequence.tokens[sequence.done :][:count]
            )
            if sequence.done < len(sequence.job.prompt):
                self._counts.prompt_tokens += count
            sequence.done += count
            if sequence.left == 0:
                drawing.append((sequence, len(draws)))
                for row, draw in enumerate(self._draws(sequence), first + count - 1):
                    draw.row = len(wanted)
                    wanted.append(row)
                    draws.append(draw)
        drawn, logprobs = self._drawn(step, wanted, draws) if draws else ([], [])
        deltas = []
        for sequence, first in drawing:
            end = first + 1 + len(sequence.guesses)
            deltas.append(self._advance(sequence, drawn[first:end], logprobs[first:end]))
        return deltas

    def _drawn(
        self, step: Step, wanted: list[int], draws: list[Draw]
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """Tokens, and log-probabilities asked for, of the wanted rows of a step."""
        ranks = np.array([ranks_for(draw, self.vocab_size) for draw in draws], np.int32)
        if self._may_run_ahead(step, draws):
            tokens_R = self._runner.draw(step.hidden_RxD, ranks, *plain_settings(draws))
            sequences = [piece.sequence for piece in step.pieces]
            positions = np.array([sequence.done for sequence in sequences], np.int32)
            tables = np.array([sequence.table for sequence in sequences], np.int32)
            hidden_RxD = self._runner.run(tokens_R, positions, tables)
            self._ahead = Step([Piece(s, 1, row) for row, s in enumerate(sequences)], hidden_RxD)
            return np.asarray(tokens_R)[: len(draws)].tolist(), [None] * len(draws)
        masks = {i: draw.mask for i, draw in enumerate(draws) if draw.mask is not None}
        logits = self._runner.logits(step.hidden_RxD, np.array(wanted, np.int32), ranks, masks)
        found, logprobs = sample(logits, draws)
        return found.tolist(), logprobs

    def _may_run_ahead(self, step: Step, draws: list[Draw]) -> bool:
        """Whether the next step may begin before the tokens of this one are known.

        The machine computes then while Python works. Where a sequence turns out to end, its row
        of the next step was for nothing.
        """
        pieces = step.pieces
        return (
            self._runner.draws
            and len(draws) == len(pieces) == len(step.alive) == len(self._scheduler.running)
            and all(piece.size == 1 and not piece.sequence.guesses for piece in pieces)
            and all(draw.plain for draw in draws)
            and self._scheduler.ahead([piece.sequence for piece in pieces])
        )

    def _draws(self, sequence: Sequence) -> Iterator[Draw]:
        """What is to be drawn behind its tokens, and behind each guess as if it were right."""
        sampling, edits = sequence.job.request.sampling, sequence.edits
        if sequence.guesses:
            edits = edits.copy()
        position = len(sequence.tokens)
        for guess in (None, *sequence.guesses):
            if guess is not None:
                edits.add(guess)
            values = None
            if sequence.edited:
                values = edits.arrays[0].copy(), edits.arrays[1].copy()
            mask = None if sequence.matcher is None else sequence.matcher.mask()
            yield Draw(0, sampling, sequence.index, position, values, mask)
            position += 1

    def _advance(
        self, sequence: Sequence, drawn: list[int], logprobs: list[TokenLogprob | None]
    ) -> Delta:
        """Take the drawn tokens as far as the guesses were right."""
        job, guesses = sequence.job, sequence.guesses
        kept: list[int] = []
        text = ""
        for i, token in enumerate(drawn):
            if token == NOTHING_ALLOWED and sequence.matcher and sequence.matcher.may_end:
                sequence.reason = "stop"
                text += sequence.writer.finish()
                break
            if token < 0:
                what = "no token is allowed" if token == NOTHING_ALLOWED else (
                    "the model gave logits that are not finite")  # fmt: skip
                sequence.fail(f"{what} at position {len(sequence.tokens)}")
                break
            kept.append(token)
            sequence.tokens.append(token)
            sequence.edits.add(token)
            text += sequence.writer.feed(token)
            sequence.reason = sequence.writer.finish_reason  # type: ignore[assignment]
            text += self._follow(sequence, token)
            if sequence.reason or i == len(guesses) or guesses[i] != token:
                break
        right = max(0, len(kept) - 1)  # those run behind their guess
        self._store.extend(sequence.pages, sequence.done, kept[:right])
        sequence.done += right
        if sequence.lookup is not None:
            sequence.lookup.learn(len(guesses), right)
        sequence.guessed += len(guesses)
        sequence.accepted += right
        about = tuple(lp for lp in logprobs[: len(kept)] if lp is not None)
        sequence.logprobs += about
        counts = self._counts
        counts.completion_tokens += len(kept)
        counts.guessed += len(guesses)
        counts.accepted += right
        sequence.guesses = []
        job.first_token = job.first_token or job.since()
        return self._delta(sequence, text, tuple(kept), about)

    def _follow(self, sequence: Sequence, token: int) -> str:
        """Tell the constraint of a token; text that is released when it ends the sequence."""
        if sequence.matcher is None or sequence.reason:
            return ""
        complaint = sequence.matcher.take(token)
        if complaint:
            sequence.fail(f"the constraint failed at position {len(sequence.tokens)}: {complaint}")
            return ""
        if not sequence.matcher.complete:
            return ""
        sequence.reason = "stop"
        return sequence.writer.finish()

    def _delta(
        self,
        sequence: Sequence,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> Delta:
        """What to tell, after giving up what finished sequences hold."""
        job = sequence.job
        completion = None
        if sequence.reason:
            self._scheduler.finish(sequence)
            if job.finished:
                completion = job.completion()
                self._counts.finished += 1
                self._counts.cached_tokens += max(job.cached_tokens, 0)
                with self._lock:
                    del self._jobs[job.request.id]
        return Delta(
            job.request.id, sequence.index, text, tokens, logprobs, sequence.reason, completion
        )

    def _cancelled(self, job: Job) -> Iterator[Delta]:
        for sequence in job.sequences:
            if not sequence.reason:
                sequence.reason = "cancelled"
                yield self._delta(sequence)
