"""The one thread that runs the engine, and what connects it with the event loop.

    event loop:  reserve -> submit (in a thread of the pool) -> deltas -> release
    worker:      cancel what was released, engine.step(), hand the deltas to the loop

A ticket stands for one HTTP request. Its share of the queue is free again when the engine has let
go of all of its sequences, not before.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bitjax.config import EngineConfig, ServeConfig
from bitjax.engine import Completion, Delta, Engine, Request, Sampling
from bitjax.model import Transformer
from bitjax.protocol import BadRequest
from bitjax.serve.metrics import Metrics

_log = logging.getLogger("bitjax.serve")
_names = itertools.count()


class Ticket:
    """One HTTP request's place, and what the engine has given for it; lives in the event loop.

    Attributes:
        size: sequences that it may take.
        deltas: not yet taken, each with the index of its prompt.
        completions: of the prompts that are finished, by their index.
        changed: set when anything of this changes.
        gone: whether the client has left.
        error: of the engine as a whole.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.deltas: collections.deque[tuple[int, Delta]] = collections.deque()
        self.completions: dict[int, Completion] = {}
        self.changed = asyncio.Event()
        self.gone = False
        self.error = ""
        self.created = time.perf_counter()
        self.last: dict[tuple[int, int], float] = {}  # when a sample's last token came
        self.names: list[str] = []
        self.live: set[str] = set()
        self.released = threading.Event()

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return bool(self.error) or len(self.completions) == len(self.names)


class Worker:
    """Runs an engine.

    Args:
        engine: that nobody else uses.
        capacity: sequences that may run and wait, together.
        metrics: to be told.

    Attributes:
        broken: why the engine can no longer be used; empty while it can.
    """

    def __init__(self, engine: Engine, capacity: int, metrics: Metrics) -> None:
        self.engine = engine
        self.capacity = capacity
        self.metrics = metrics
        self.broken = ""
        self.reserved = 0
        self._tickets: dict[str, tuple[Ticket, int]] = {}
        self._cancelled: collections.deque[str] = collections.deque()
        self._awake = threading.Event()
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(4, "bitjax-encode")  # text to tokens, JSON, grammars
        self._thread = threading.Thread(target=self._run, name="bitjax-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def live(self) -> int:
        """Requests of the engine that somebody waits for, or that are being cancelled."""
        return len(self._tickets)

    def start(self) -> None:
        """Begin, in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the step that it is in."""
        self._ended.set()
        self._awake.set()
        self._thread.join()
        self._pool.shutdown()

    async def work(self, function, *arguments):  # type: ignore[no-untyped-def]
        """Run something slow beside the event loop."""
        assert self._loop is not None
        return await self._loop.run_in_executor(self._pool, function, *arguments)

    def _require_engine(self) -> None:
        if self.broken:
            raise BadRequest(f"the engine has failed: {self.broken}", status=503)

    def reserve(self, size: int) -> Ticket:
        """A place for so many sequences.

        Raises:
            BadRequest: there are too many already, or could never be so many.
        """
        self._require_engine()
        if size > self.capacity:
            raise BadRequest(f"the request has {size:,} sequences; this server takes "
                             f"{self.capacity:,} at once", "n")  # fmt: skip
        if self.reserved + size > self.capacity:
            raise BadRequest(f"{self.reserved:,} sequences run or wait, of {self.capacity:,}; try "
                             "again later", code="queue_full", status=429)  # fmt: skip
        self.reserved += size
        return Ticket(size)

    async def submit(
        self, ticket: Ticket, prompts: Sequence[tuple[int, ...]], sampling: Sampling
    ) -> None:
        """Give the prompts of a ticket to the engine.

        Raises:
            BadRequest: one that the engine refuses, or an engine that has failed since `reserve`.
        """
        self._require_engine()
        requests = [Request(f"r{next(_names)}", tokens, sampling) for tokens in prompts]
        ticket.names = [request.id for request in requests]
        for index, name in enumerate(ticket.names):
            self._tickets[name] = ticket, index
            ticket.live.add(name)
        try:
            await self.work(self._submit, ticket, requests)
        except ValueError as error:
            raise BadRequest(str(error)) from None

    def _submit(self, ticket: Ticket, requests: Sequence[Request]) -> None:
        """In a thread of the pool."""
        assert self._loop is not None
        for position, request in enumerate(requests):
            try:
                if ticket.released.is_set():  # the client left meanwhile
                    raise ValueError("the client has left")
                self.engine.submit(request)
            except BaseException:
                names = [r.id for r in requests[position:]]
                self._loop.call_soon_threadsafe(self._forget, names)
                raise
            if ticket.released.is_set():
                self._cancelled.append(request.id)
            self._awake.set()

    def release(self, ticket: Ticket, reason: str) -> None:
        """The HTTP request is over: whatever still runs for it is cancelled.

        Args:
            ticket: any.
            reason: for the metrics, in case something does.
        """
        assert not ticket.released.is_set()
        ticket.released.set()
        if ticket.live:
            self.metrics.cancelled(reason)
            self._cancelled.extend(ticket.live)
            self._awake.set()
        else:
            self.reserved -= ticket.size

    def _forget(self, names: Sequence[str]) -> None:
        """The engine has let go of these; in the event loop."""
        for name in names:
            if (found := self._tickets.pop(name, None)) is None:
                continue
            ticket = found[0]
            ticket.live.discard(name)
            if ticket.released.is_set() and not ticket.live:
                self.reserved -= ticket.size

    def _run(self) -> None:
        """The worker's thread."""
        assert self._loop is not None
        while not self._ended.is_set():
            while self._cancelled:
                self.engine.cancel(self._cancelled.popleft())
            if not self.engine.pending:
                self._awake.wait(1.0)
                self._awake.clear()
                continue
            try:
                deltas = self.engine.step()
            except Exception as error:
                _log.exception("the engine failed")
                self._loop.call_soon_threadsafe(self._fail, f"{type(error).__name__}: {error}")
                return
            if deltas:
                self._loop.call_soon_threadsafe(self._deliver, deltas, time.perf_counter())

    def _deliver(self, deltas: Sequence[Delta], now: float) -> None:
        """What a step gave goes to the tickets; in the event loop."""
        for delta in deltas:
            found = self._tickets.get(delta.id)
            if found is None:
                continue
            ticket, prompt = found
            self.metrics.token(ticket, (prompt, delta.index), len(delta.tokens), now)
            ticket.deltas.append((prompt, delta))
            if delta.completion is not None:
                ticket.completions[prompt] = delta.completion
                self._forget([delta.id])
            ticket.changed.set()

    def _fail(self, error: str) -> None:
        """The engine can no longer be used; in the event loop."""
        self.broken = error.splitlines()[0][:300]
        for name in [*self._tickets]:
            ticket, _ = self._tickets[name]
            ticket.error = self.broken
            ticket.changed.set()
            self._forget([name])


def make_worker(model: Transformer, engine: EngineConfig, config: ServeConfig) -> Worker:
    """A worker over a new engine.

    Raises:
        ValueError: as `Engine`.
    """
    made = Engine(model, engine)
    return Worker(made, engine.max_sequences + config.queue, Metrics())
