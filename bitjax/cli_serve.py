"""`bitjax serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bitjax.cli_batch import (
    add_engine_arguments,
    add_template_argument,
    engine_config,
    template_of,
)
from bitjax.config import ServeConfig

KEY = "BITJAX_API_KEY"  # in the environment, where other users of the machine do not see it


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `bitjax serve` behind the model."""
    defaults = ServeConfig()
    add = parser.add_argument
    add("--host", default=defaults.host, help=f"to listen on (default: {defaults.host})")
    add("--port", type=int, default=defaults.port, help="0: any (default: 8000)")
    add("--name", help="of the model, for clients (default: that of its file)")
    add(
        "--api-key", action="append", default=[], metavar="KEY",
        help=f"that clients must send; repeatable (default: ${KEY}, or none)",
    )  # fmt: skip
    add_template_argument(parser)
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    add(
        "--max-body", type=int, default=defaults.max_body, metavar="BYTES",
        help=f"of a request (default: {defaults.max_body})",
    )  # fmt: skip
    add(
        "--max-tokens", type=int, metavar="N",
        help="of an answer (default: what the context leaves)",
    )  # fmt: skip
    add(
        "--queue", type=int, default=defaults.queue, metavar="N",
        help=f"sequences that may wait; more are refused (default: {defaults.queue})",
    )  # fmt: skip
    add(
        "--connections", type=int, default=defaults.connections, metavar="N",
        help=f"at once; more are refused (default: {defaults.connections})",
    )  # fmt: skip
    for name, text in (
        ("idle", "without a request"), ("send", "for a client to read what it was sent"),
        ("drain", "for requests to finish after SIGTERM"),
    ):  # fmt: skip
        default = getattr(defaults, f"{name}_seconds")
        add(
            f"--{name}-seconds", type=float, default=default, metavar="S",
            help=f"{text} (default: {default:g})",
        )  # fmt: skip
    add_engine_arguments(parser)


def run_serve_command(arguments: argparse.Namespace) -> None:
    """Run `bitjax serve`."""
    config = ServeConfig(
        arguments.host, arguments.port, arguments.max_body, arguments.max_tokens, arguments.queue,
        arguments.connections, arguments.idle_seconds, arguments.send_seconds,
        arguments.drain_seconds,
    )  # fmt: skip
    engine, template = engine_config(arguments), template_of(arguments.template)
    keys = arguments.api_key or [key for key in (os.environ.get(KEY),) if key]
    if not all(keys):
        raise ValueError("--api-key is empty")
    try:
        from bitjax.serve import make_app, make_worker, serve
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "bitjax":
            raise
        raise ValueError(
            f"this needs the package {error.name}: pip install 'bitjax[serve]'"
        ) from None
    from bitjax import terminal
    from bitjax.api import load
    from bitjax.protocol import Encoder

    model = load(arguments.model, arguments.impl)
    worker = make_worker(model, engine, config)
    worker.engine.load()
    encoder = Encoder(model.tokenizer, model.config, worker.engine.context, template)
    name = arguments.name or Path(arguments.model).stem

    def ready(address: str) -> None:
        terminal.console.print(f"{name} is served at {address}; Ctrl-C ends it", soft_wrap=True)

    serve(make_app(worker, encoder, config, name, keys), config, ready)
