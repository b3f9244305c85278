"""Answers in pieces, as server-sent events, to clients that may be slow or leave."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bitjax.protocol import Answers, BadRequest
from bitjax.serve.worker import Ticket, Worker

GONE = 499  # the status of a client that left before its answer: nginx's, for metrics alone
ABORT = "bitjax.abort"  # in the scope: what closes the connection at once, unread bytes and all


async def watch(receive: Receive, ticket: Ticket) -> None:
    """Say on the ticket when the client leaves; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    ticket.gone = True
    ticket.changed.set()


def end(worker: Worker, ticket: Ticket, watcher: asyncio.Task[None], slow: bool = False) -> None:
    """An HTTP request is over, whichever way."""
    watcher.cancel()
    reason = "client slow" if slow else "client left" if ticket.gone else "ended early"
    worker.release(ticket, reason)
    if ticket.finished and not ticket.error:
        worker.metrics.finished(time.perf_counter() - ticket.created)


class EventStream(Response):
    """The events of one call; releases its ticket.

    Args:
        worker: that runs it.
        ticket: submitted.
        answers: its form.
        watcher: the task that watches the client.
        seconds: that the client may take to read what it was sent.
    """

    def __init__(
        self, worker: Worker, ticket: Ticket, answers: Answers, watcher: asyncio.Task[None],
        seconds: float,
    ) -> None:  # fmt: skip
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._worker, self._ticket, self._answers = worker, ticket, answers
        self._watcher, self._seconds = watcher, seconds
        self._seen: set[tuple[int, int]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all, or as much as the client takes."""
        slow = False
        try:
            head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await self._send(send, head)
            await self._events(send)
        except TimeoutError:
            slow = True
            abort: Callable[[], None] | None = scope.get(ABORT)
            if abort is not None:
                abort()  # closing would wait for the client to read
                await asyncio.wait({self._watcher}, timeout=1.0)  # until uvicorn knows of it
        finally:
            end(self._worker, self._ticket, self._watcher, slow)

    async def _events(self, send: Send) -> None:
        ticket = self._ticket
        while not ticket.gone:
            done = ticket.finished  # before taking: nothing comes after
            raw = b"".join(map(event, self._taken()))
            if done:
                raw += self._last() + b"data: [DONE]\n\n"
            if raw:
                await self._send(
                    send, {"type": "http.response.body", "body": raw, "more_body": not done}
                )
            if done:
                return
            await ticket.changed.wait()
            ticket.changed.clear()

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(self._seconds):
            await send(message)

    def _taken(self) -> list[dict[str, Any]]:
        """The chunks that have come since."""
        found: list[dict[str, Any]] = []
        while self._ticket.deltas:
            prompt, delta = self._ticket.deltas.popleft()
            sample = prompt, delta.index
            found += self._answers.pieces(delta, prompt, sample not in self._seen)
            self._seen.add(sample)
        return found

    def _last(self) -> bytes:
        ticket = self._ticket
        error = ticket.error
        for completion in ticket.completions.values():
            error = error or completion.error
        if error:
            return event(BadRequest(error, status=500).body())
        if not self._answers.call.include_usage:
            return b""
        completions = [ticket.completions[i] for i in range(len(ticket.names))]
        return event(self._answers.last(completions))


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    said = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {said}\n\n".encode()
