"""A server of OpenAI's HTTP interface over the batch engine."""

from bitjax.serve.app import make_app
from bitjax.serve.server import Server, serve
from bitjax.serve.worker import Worker, make_worker

__all__ = ["Server", "Worker", "make_app", "make_worker", "serve"]
