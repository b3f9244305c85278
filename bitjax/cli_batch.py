"""`bitjax batch`: a file of prompts in, a file of results out."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from bitjax.config import BatchConfig, EngineConfig

# Of sampling: flag, its name in bodies of requests, type, help.
_SAMPLING: tuple[tuple[str, str, type, str], ...] = (
    ("--max-new-tokens", "max_tokens", int, "of each answer (default: 256)"),
    ("--temperature", "temperature", float, "0 is greedy (default: 0.8)"),
    ("--top-k", "top_k", int, "0 keeps all (default: 0)"),
    ("--top-p", "top_p", float, "1 keeps all (default: 1)"),
    ("--min-p", "min_p", float, "0 keeps all (default: 0)"),
    ("--repetition-penalty", "repetition_penalty", float, "1 is none (default: 1)"),
    ("--samples", "n", int, "of each prompt (default: 1)"),
)


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `bitjax batch` behind the model."""
    defaults = BatchConfig()
    add = parser.add_argument
    add(
        "input", type=Path,
        help=".jsonl, .txt or .csv, also .gz, .xz or .zst; or .parquet. JSON lines are texts, "
        '{"prompt": ...}, {"messages": [...]}, or of OpenAI\'s batch format',
    )  # fmt: skip
    add(
        "-o", "--output", type=Path, required=True, metavar="PATH",
        help=".jsonl, .csv or .parquet; where the same command stopped it goes on",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="begin anew")
    add(
        "--order", choices=("input", "done"), default=defaults.order,
        help="of results: the input's, or as they are done (default: input)",
    )  # fmt: skip
    add(
        "--field", default=defaults.field, metavar="NAME",
        help=f"field or column that holds prompts (default: {defaults.field})",
    )  # fmt: skip
    add(
        "--keep", action="append", default=[], metavar="NAME",
        help="copy this field or column to the output; repeatable",
    )  # fmt: skip
    add_template_argument(parser)
    sampling = parser.add_argument_group(
        "sampling", "where a line does not say otherwise; in OpenAI's format its own defaults hold"
    )
    for flag, name, kind, text in _SAMPLING:
        metavar = "N" if kind is int else "X"
        sampling.add_argument(flag, dest=name, type=kind, metavar=metavar, help=text)
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="end at this text; repeatable"
    )
    sampling.add_argument(
        "--seed", type=int, default=defaults.seed,
        help="of lines without one, each of which gets its own of it (default: 0)",
    )  # fmt: skip
    add_engine_arguments(parser)


def add_template_argument(parser: argparse.ArgumentParser) -> None:
    """For chats; `template_of` reads it."""
    parser.add_argument("--template", type=Path, metavar="FILE",
                        help="a chat template in Jinja (default: the model's own)")  # fmt: skip


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """How the engine works."""
    defaults = EngineConfig()
    engine = parser.add_argument_group("engine", "none of these but --cache changes a result")
    add = engine.add_argument
    add(
        "--sequences", type=int, default=defaults.max_sequences, metavar="N",
        help=f"that run together (default: {defaults.max_sequences})",
    )  # fmt: skip
    add(
        "--context", type=int, metavar="N",
        help="tokens of a prompt with its answer (default: the model's)",
    )  # fmt: skip
    add(
        "--memory", type=float, metavar="GB",
        help="of cached keys and values (default: as needed, of what is free at most half)",
    )  # fmt: skip
    add(
        "--cache", choices=("float32", "bfloat16", "int8"),
        help="number format of cached keys and values (default: that of the activations)",
    )  # fmt: skip
    add("--impl", choices=("auto", "ffi", "reference"), default="auto",
        help="custom calls, or pure JAX (default: auto)")  # fmt: skip


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """What the arguments say of the engine.

    Raises:
        ValueError: sizes that are none.
    """
    memory = arguments.memory
    if memory is not None:
        if not math.isfinite(memory):
            raise ValueError(f"--memory {memory} is no size")
        memory = int(memory * 1e9)
    return EngineConfig(
        cache_dtype=arguments.cache, max_sequences=arguments.sequences,
        context=arguments.context, memory=memory,
    )  # fmt: skip


def template_of(path: Path | None) -> str | None:
    """The text of a template's file.

    Raises:
        ValueError: not UTF-8.
    """
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None


def run_batch_command(arguments: argparse.Namespace) -> None:
    """Run `bitjax batch`."""
    config = BatchConfig(
        field=arguments.field, keep=tuple(arguments.keep), order=arguments.order,
        seed=arguments.seed,
    )  # fmt: skip
    settings: dict[str, Any] = {
        name: getattr(arguments, name) for _, name, _, _ in _SAMPLING
        if getattr(arguments, name) is not None
    }  # fmt: skip
    if arguments.stop:
        settings["stop"] = arguments.stop
    template, engine = template_of(arguments.template), engine_config(arguments)
    from bitjax.batch.lines import Source

    source = Source(arguments.input, config.field, config.keep)  # before the model is read
    from bitjax import terminal
    from bitjax.api import load
    from bitjax.batch import Batch, Progress, run_batch

    batch = Batch(
        source, arguments.output, config, settings, engine, template, Path(arguments.model).stem,
        arguments.overwrite,
    )  # fmt: skip
    model = load(arguments.model, arguments.impl)

    def numbers(now: Progress) -> str:
        left = "" if now.seconds_left is None else f"  ETA {terminal.clock(now.seconds_left)}"
        return f"{now.tokens_per_second:,.0f} tok/s{left}"

    with terminal.job_progress(arguments.input.name) as show:
        done = run_batch(batch, model, lambda now: show(now.done, now.total, numbers(now)))
    terminal.console.print(summary(arguments.output, done), soft_wrap=True)


def summary(output: Path, done: Any) -> str:
    """One line about a job that is complete."""
    from bitjax import terminal

    wrong = f", {done.errors:,} of them errors" if done.errors else ""
    rate = ""
    if done.tokens:
        rate = (
            f"; {done.prompt_tokens:,} tokens of prompts and {done.tokens:,} generated in "
            f"{terminal.clock(done.seconds)}, {done.tokens_per_second:,.0f} tokens/s"
        )
    return f"{output}: {done.total:,} lines{wrong}{rate}"
