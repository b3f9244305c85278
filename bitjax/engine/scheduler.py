"""Which sequences run, and which of their tokens in the next step.

A step runs one token (and guesses) of every sequence that generates, then tokens of prompts, the
first admitted first, up to `step_tokens` in all. So prompts are cut into pieces, and nobody who
generates waits for a long one.

A sequence is admitted when there is a table for it and pages for what it is expected to need:
prompt, and its share of `max_new_tokens` that texts lately came to. When pages run out all the
same, the last admitted gives up its pages and is run again later: it gets the same bits. One that
begins like another whose prompt is still running waits for what it can share.
"""

from __future__ import annotations

from collections import deque

from bitjax.config import EngineConfig
from bitjax.engine.pages import PageStore, common, pages_for
from bitjax.engine.runner import Runner
from bitjax.engine.sequence import Sequence
from bitjax.ops.rows import PAGE

LOOKED_AT = 16  # waiting sequences that may be admitted before others
PASSED = 64  # times that one may be passed by others
WORTH_WAITING = 16  # shared tokens; fewer are run twice
FORGETTING = 0.05  # share of each finished text in the expected length of the next


class Scheduler:
    """Waiting and running sequences, and their pages.

    Args:
        config: sizes.
        store: pages.
        runner: whose page tables are kept, and which copies pages.

    Attributes:
        waiting, running: sequences, in order of arrival and of admission.
        preempted: how often pages were taken back.
    """

    def __init__(self, config: EngineConfig, store: PageStore, runner: Runner) -> None:
        self.config = config
        self.store = store
        self.runner = runner
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preempted = 0
        self._tables = list(reversed(range(config.max_sequences)))
        self._expected = 1.0  # of max_new_tokens, that a text comes to

    def plan(self) -> list[tuple[Sequence, int]]:
        """Sequences and how many tokens of each to run now, guesses excluded; pages are there."""
        self._admit()
        plan: list[tuple[Sequence, int]] = []
        budget = max(self.config.step_tokens, self.config.max_sequences)
        generating = [s for s in self.running if s.left == 1]
        self._guess(generating)
        for sequence in generating:
            if sequence.table < 0:
                continue  # preempted by one before it
            if not self._provide(sequence, 1 + len(sequence.guesses)):
                sequence.guesses = []
                if not self._provide(sequence, 1):
                    continue
            plan.append((sequence, 1))
            budget -= 1 + len(sequence.guesses)
        for sequence in list(self.running):
            if sequence.left == 1 or sequence.table < 0 or budget <= 0:
                continue
            count = min(sequence.left, budget)
            if self._provide(sequence, count):
                plan.append((sequence, count))
                budget -= count
        return [entry for entry in plan if entry[0].table >= 0]

    def ahead(self, sequences: list[Sequence]) -> bool:
        """Whether those that run may run on before their next tokens are known; then with pages.

        Not where another could join, where one may end with its next token, or where guesses may
        pay: they begin with what that token is.
        """
        if (self.waiting and self._tables) or any(sequence.room <= 1 for sequence in sequences):
            return False
        if any(self._guesses_of(sequence, len(sequences)) for sequence in sequences):
            return False
        needed = sum(pages_for(s.done + 1) - len(s.pages) for s in sequences)
        return needed <= self.store.available and all(self._provide(s, 1) for s in sequences)

    def finish(self, sequence: Sequence) -> None:
        """Give up what it holds; it does not run again."""
        if sequence.table >= 0:
            self._stop(sequence)
            most = sequence.writer.room
            share = sequence.writer.tokens / most if most else 1.0
            self._expected += FORGETTING * (share - self._expected)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.store.release(sequence.pages)
        self._tables.append(sequence.table)
        self.running.remove(sequence)
        sequence.pages, sequence.table, sequence.done, sequence.guesses = [], -1, 0, []

    def _expected_pages(self, sequence: Sequence) -> int:
        room = max(1, round(sequence.room * self._expected))
        return pages_for(len(sequence.tokens) + room)

    def _admit(self) -> None:
        while self._tables and self.waiting:
            growth = sum(max(0, self._expected_pages(s) - len(s.pages)) for s in self.running)
            chosen = None
            for sequence in list(self.waiting)[:LOOKED_AT]:
                fits = self._expected_pages(sequence) + growth <= self.store.available
                if (fits or not self.running) and not self._worth_waiting(sequence):
                    chosen = sequence
                    break
                if sequence.passed >= PASSED:
                    return
            if chosen is None:
                return
            for sequence in self.waiting:
                if sequence is chosen:
                    break
                sequence.passed += 1
            self.waiting.remove(chosen)
            self._start(chosen)

    def _worth_waiting(self, sequence: Sequence) -> bool:
        """Whether a running one is about to have what this one begins with."""
        if not self.store.sharing:
            return False
        for other in self.running:
            if other.left == 1:
                continue
            shared = min(common(sequence.tokens, other.tokens), len(sequence.tokens) - 1)
            if shared - other.done >= WORTH_WAITING:
                return True
        return False

    def _start(self, sequence: Sequence) -> None:
        """Give it a table, and the pages that it shares."""
        found, partial, length = self.store.match(sequence.tokens, len(sequence.tokens) - 1)
        sequence.table = self._tables.pop()
        sequence.pages = found
        sequence.done = PAGE * len(found)
        self.running.append(sequence)
        for place, page in enumerate(found):
            self.runner.tables_QxN[sequence.table, place] = page.number
        if partial is not None:
            self.store.hold(partial)
            copied = partial.tokens[:length]
            if self._provide(sequence, 1):
                self.runner.copy(partial.number, sequence.pages[-1].number)
                self.store.extend(sequence.pages, sequence.done, copied)
                sequence.done += length
            self.store.release([partial])
        job = sequence.job
        if job.cached_tokens < 0:
            job.cached_tokens = sequence.done
            job.started = job.since()

    def _provide(self, sequence: Sequence, count: int) -> bool:
        """Pages for so many more tokens, taken from the last admitted if need be."""
        needed = pages_for(sequence.done + count) - len(sequence.pages)
        while self.store.available < needed:
            last = self.running[-1]
            if last is sequence:
                return False
            self._stop(last)
            self.waiting.appendleft(last)
            self.preempted += 1
        for _ in range(needed):
            page = self.store.take()
            self.runner.tables_QxN[sequence.table, len(sequence.pages)] = page.number
            sequence.pages.append(page)
        return True

    def _guess(self, generating: list[Sequence]) -> None:
        """Guesses, where few rows run and one more costs little."""
        rows = len(generating)
        for sequence in generating:
            sequence.guesses = []
            if len(generating) == len(self.running):
                sequence.guesses = self._guesses_of(sequence, rows)
            rows += len(sequence.guesses)

    def _guesses_of(self, sequence: Sequence, rows: int) -> list[int]:
        """What may follow its tokens, in a step that has so many rows."""
        spare = self.config.lookup_rows - rows
        if sequence.lookup is None or spare <= 0 or not sequence.lookup.worth(rows):
            return []
        most = min(self.config.lookup, spare, sequence.room - 1)
        return sequence.lookup.guess(sequence.tokens, most)
