"""The network: uvicorn, with connections that do nothing closed, those beyond a limit refused while
the others go on, and an end that waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from bitjax.config import ServeConfig
from bitjax.protocol import BadRequest
from bitjax.serve.stream import ABORT

BACKLOG = 1024  # connections that the system holds until they are accepted


class Server:
    """One application on one address.

    Args:
        app: the application.
        config: limits.

    Attributes:
        address: where it listens, such as `http://127.0.0.1:8000`.

    Raises:
        ValueError: an address that cannot be listened on.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._listener = listen(config)
        host, port = self._listener.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        settings = uvicorn.Config(
            app, http=_protocol(config.idle_seconds, config.connections), loop="asyncio",
            ws="none", lifespan="on", log_level="error", access_log=False, server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=max(1, int(config.idle_seconds)),
            timeout_graceful_shutdown=int(config.drain_seconds),
        )  # fmt: skip
        self._server = uvicorn.Server(settings)

    def run(self) -> None:
        """Serve until `stop`, SIGINT or SIGTERM; then finish what was begun, within its time."""
        with _signals_that_do_not_kill(), contextlib.closing(self._listener):
            self._server.run(sockets=[self._listener])

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._server.should_exit = True


def serve(app: ASGIApp, config: ServeConfig, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        app: the application.
        config: limits.
        on_ready: told the address; connections that come before the application is ready wait.

    Raises:
        ValueError: an address that cannot be listened on.
    """
    _raise_file_limit(config.connections)
    server = Server(app, config)
    on_ready(server.address)
    server.run()


def listen(config: ServeConfig) -> socket.socket:
    """A socket on the configured address.

    Raises:
        ValueError: there is none to be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {config.host} port {config.port}: "
            + (os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror))
        ) from None


def _protocol(idle: float, most: int) -> type[H11Protocol]:
    """Connections that are closed when nothing is asked of them for `idle` to 1.5 `idle` seconds,
    and refused when there are `most` already.

    uvicorn's own time runs between requests alone: not before the first, nor while one is being
    begun a byte at a time. Its own limit, once passed, refuses the requests of all connections.
    """
    accepted: set[H11Protocol] = set()
    refusal = _refusal(most)

    class Protocol(H11Protocol):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.app = self._with_abort(self.app)
            self._quiet_since: float | None = None

        def _with_abort(self, app: ASGIApp) -> ASGIApp:
            async def run(scope: Scope, receive: Receive, send: Send) -> None:
                scope[ABORT] = self.transport.abort
                await app(scope, receive, send)

            return run

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(accepted) < most:
                accepted.add(self)
            self._quiet_since = time.monotonic()
            self._look()

        def data_received(self, data: bytes) -> None:
            if self in accepted:
                super().data_received(data)
            else:  # not before it asks: an answer to a request that is on its way may be lost
                self.transport.write(refusal)
                self.transport.close()

        def _look(self) -> None:
            if self.transport.is_closing():
                return
            now = time.monotonic()
            if self.cycle is not None and not self.cycle.response_complete:
                self._quiet_since = None
            elif self._quiet_since is None:
                self._quiet_since = now
            elif now - self._quiet_since >= idle:
                self.transport.abort()
                return
            self._looking = self.loop.call_later(idle / 2, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            self._looking.cancel()
            accepted.discard(self)
            super().connection_lost(exc)

    return Protocol


def _refusal(most: int) -> bytes:
    """The answer to a connection that is one too many."""
    error = BadRequest(f"the server has {most:,} connections, as many as it takes", status=503)
    body = json.dumps(error.body()).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


@contextlib.contextmanager
def _signals_that_do_not_kill() -> Iterator[None]:
    """uvicorn raises the signals that ended it once more, for whoever had them before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_file_limit(connections: int) -> None:
    """Let the process have the files that so many connections are."""
    try:
        import resource
    except ImportError:  # no POSIX
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 1000  # the model, libraries, and connections about to be refused
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(hard, wanted), hard)
            )
