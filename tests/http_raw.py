"""Requests to a local server without a library that would be too polite for tests."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager
from urllib.parse import urlparse

from bitjax.protocol import Encoder
from bitjax.serve import Server, make_app, make_worker


@contextmanager
def serving(model, engine, config, name="tiny", keys=()):
    """A server in a thread: (address, worker)."""
    worker = make_worker(model, engine, config)
    encoder = Encoder(model.tokenizer, model.config, worker.engine.context)
    server = Server(make_app(worker, encoder, config, name, keys), config)
    # Of connections too: an answer that nobody reads must not fit into what the system keeps.
    server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.address, worker
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def ask(address, method, path, body=None, key="secret", headers=()):
    """(status, parsed body or text) of one request."""
    where = urlparse(address)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method, path, raw, {"Authorization": f"Bearer {key}", **dict(headers)})
        response = connection.getresponse()
        said = response.read()
    finally:
        connection.close()
    try:
        return response.status, json.loads(said)
    except ValueError:
        return response.status, said.decode()


def opened(address, raw=b"", receive_buffer=None):
    """A connected socket on which some bytes were sent."""
    where = urlparse(address)
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect((where.hostname, where.port))
    connection.sendall(raw)
    return connection


def post(path, body, key="secret"):
    """The bytes of a request."""
    raw = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    ).encode() + raw


def events(raw):
    """The events of a stream's text, without the [DONE] that must end it."""
    parts = [part.removeprefix("data: ") for part in raw.strip().split("\n\n")]
    assert parts.pop() == "[DONE]"
    return [json.loads(part) for part in parts]
