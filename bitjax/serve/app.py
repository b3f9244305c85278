"""The HTTP interface: routes, limits, errors. An ASGI application without the network.

POST /v1/completions, /v1/chat/completions     whole, or as server-sent events
GET  /v1/models, /v1/models/{name}
POST /tokenize, /detokenize
GET  /health, /metrics
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive

from bitjax.config import ServeConfig
from bitjax.protocol import Answers, BadRequest, Call, Encoder, chat_call, completion_call
from bitjax.protocol.calls import Kind, messages_of
from bitjax.protocol.fields import Fields
from bitjax.serve.metrics import Metrics
from bitjax.serve.stream import GONE, EventStream, end, watch
from bitjax.serve.worker import Ticket, Worker

DRAINED = 16  # times the limit of a body: so much is read and dropped, for the client to hear why
Handler = Callable[[Request], Awaitable[Any]]


class App:
    """The handlers, and what they share."""

    def __init__(
        self, worker: Worker, encoder: Encoder, config: ServeConfig, name: str, keys: Sequence[str]
    ) -> None:
        self.worker, self.encoder, self.config, self.name = worker, encoder, config, name
        self.metrics: Metrics = worker.metrics
        self._keys = [key.encode() for key in keys]
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """All paths."""
        table: list[tuple[str, str, Handler]] = [
            ("POST", "/v1/completions", self._generate("completion")),
            ("POST", "/v1/chat/completions", self._generate("chat")),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{name:path}", self._model),
            ("POST", "/tokenize", self._tokenize),
            ("POST", "/detokenize", self._detokenize),
            ("GET", "/health", self._health),
            ("GET", "/metrics", self._metrics_text),
        ]
        return [Route(path, self._guarded(path, handler), methods=[method])
                for method, path, handler in table]  # fmt: skip

    def _guarded(self, path: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """A handler behind the key, whose errors are answers."""

        async def run(request: Request) -> Response:
            try:
                if path != "/health":
                    self._check_key(request)
                response: Response = await handler(request)
            except BadRequest as error:
                response = failure(error)
            self.metrics.answered(path, response.status_code)
            return response

        return run

    def _check_key(self, request: Request) -> None:
        if not self._keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        said = given.strip().encode()
        known = [hmac.compare_digest(said, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            raise BadRequest("the API key is missing or wrong; send Authorization: Bearer KEY",
                             code="invalid_api_key", status=401)  # fmt: skip

    async def _body(self, request: Request) -> Any:
        """The parsed JSON.

        Raises:
            BadRequest: too long, too slow, or no JSON.
        """
        try:
            async with asyncio.timeout(self.config.idle_seconds):
                raw = await read_body(request.receive, self.config.max_body)
        except TimeoutError:
            raise BadRequest(f"the body did not come within {self.config.idle_seconds:g} s",
                             status=408) from None  # fmt: skip
        if len(raw) > 1 << 16:
            return await self.worker.work(parse_json, raw)
        return parse_json(raw)

    def _generate(self, kind: Kind) -> Handler:
        parse = chat_call if kind == "chat" else completion_call

        async def run(request: Request) -> Response:
            body = await self._body(request)
            most = min(self.config.max_tokens or self.encoder.context, self.encoder.context)
            call = parse(body, most)
            if call.model not in ("", self.name):
                raise BadRequest(f"the model {call.model!r:.100} does not exist; this is "
                                 f"{self.name}", "model", "model_not_found", 404)  # fmt: skip
            if not call.seeded:
                sampling = dataclasses.replace(call.sampling, seed=secrets.randbits(32))
                call = dataclasses.replace(call, sampling=sampling)
            ticket = self.worker.reserve(max(1, len(call.prompts)) * call.sampling.n)
            watcher = asyncio.create_task(watch(request.receive, ticket))
            try:
                prompts = await self.worker.work(self.encoder.call, call)
                await self.worker.submit(ticket, prompts, call.sampling)
                answers = Answers.now(secrets.token_hex(12), call, self.name,
                                      self.encoder.tokenizer)  # fmt: skip
                if not call.stream:
                    response = await self._whole(ticket, answers)
            except BaseException:
                end(self.worker, ticket, watcher)
                raise
            if call.stream:
                return EventStream(self.worker, ticket, answers, watcher, self.config.send_seconds)
            end(self.worker, ticket, watcher)
            return response

        return run

    async def _whole(self, ticket: Ticket, answers: Answers) -> Response:
        while not ticket.finished:
            await ticket.changed.wait()
            ticket.changed.clear()
            ticket.deltas.clear()
            if ticket.gone:
                return Response(status_code=GONE)
        if ticket.error:
            raise BadRequest(f"the engine has failed: {ticket.error}", status=500)
        completions = [ticket.completions[i] for i in range(len(ticket.names))]
        return JSONResponse(answers.whole(completions))

    def _about(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "bitjax",
                "max_model_len": self.encoder.context}  # fmt: skip

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.name:
            raise BadRequest(f"the model {name!r:.100} does not exist; this is {self.name}",
                             "model", "model_not_found", 404)  # fmt: skip
        return JSONResponse(self._about())

    async def _tokenize(self, request: Request) -> Response:
        fields = Fields(await self._body(request), ("model", "prompt", "messages"))
        if ("prompt" in fields) == ("messages" in fields):
            raise BadRequest("give either a prompt or messages", "prompt")
        if "messages" in fields:
            call = Call("chat", messages=messages_of(fields.get("messages")))
            [tokens] = await self.worker.work(self.encoder.call, call)
        else:
            text = fields.text("prompt")
            tokens = (await self.worker.work(self.encoder.tokenizer.encode, text)).tolist()
        found = {"count": len(tokens), "max_model_len": self.encoder.context, "tokens": tokens}
        return JSONResponse(found)

    async def _detokenize(self, request: Request) -> Response:
        fields = Fields(await self._body(request), ("model", "tokens"))
        tokens, size = fields.get("tokens"), self.encoder.tokenizer.vocab_size
        if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < size
                                                   for t in tokens):  # fmt: skip
            raise fields.refuse("tokens", f"a list of tokens in 0..{size - 1}")
        text = await self.worker.work(self.encoder.tokenizer.decode, tokens)
        return JSONResponse({"prompt": text})

    async def _health(self, request: Request) -> Response:
        if self.worker.broken:
            raise BadRequest(f"the engine has failed: {self.worker.broken}", status=503)
        return JSONResponse({"status": "ok"})

    async def _metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def read_body(receive: Receive, most: int) -> bytes:
    """All of a request's body.

    Raises:
        BadRequest: more than `most` bytes, or the client left.
    """
    pieces, size, more = [], 0, True
    while more:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the client left before its body ended", status=GONE)
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size <= most:
            pieces.append(piece)
        elif size > DRAINED * most:
            break
    if size > most:
        raise BadRequest(
            f"the body is longer than {most:,} bytes", code="body_too_long", status=413
        )
    return b"".join(pieces)


def parse_json(raw: bytes) -> Any:
    """A body.

    Raises:
        BadRequest: not JSON in UTF-8.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(raw.decode(), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


def failure(error: BadRequest) -> Response:
    """The answer to a bad request."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return JSONResponse(error.body(), error.status, headers.get(error.status))


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    said = f"{request.method} {request.url.path[:100]} is not known here"
    response = failure(BadRequest(said, status=status))
    response.headers.update(getattr(error, "headers", None) or {})
    return response


async def _fault(request: Request, error: Exception) -> Response:
    return failure(BadRequest("the server has a fault; its log says more", status=500))


def make_app(
    worker: Worker, encoder: Encoder, config: ServeConfig, name: str, keys: Sequence[str] = ()
) -> Starlette:
    """The application.

    Args:
        worker: started and stopped with the application.
        encoder: closed with it.
        config: limits.
        name: of the model.
        keys: one of which requests must have, if there are any.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.stop()
            encoder.close()

    worker.metrics.watch(worker)
    app = App(worker, encoder, config, name, keys)
    handlers: Any = {404: _not_found, 405: _not_found, 500: _fault}
    return Starlette(routes=app.routes(), exception_handlers=handlers, lifespan=lifespan)
