"""`bitjax eval`: score texts, and answer the items of published tasks."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `bitjax eval` behind the model."""
    add = parser.add_argument
    add("other", nargs="?", help="with --tasks: a model to compare with")
    texts = parser.add_argument_group("texts")
    add = texts.add_argument
    add(
        "--text", default="", metavar="PATH",
        help="score all of this file, or what a corpus of `bitjax corpus build` holds out "
        "(default: the held-out tenth of the packaged Shakespeare)",
    )  # fmt: skip
    add(
        "--documents", action="store_true",
        help="each document by itself, every token of it scored, as lm-evaluation-harness has it; "
        "PATH may then be .jsonl, .parquet and the like",
    )  # fmt: skip
    add(
        "--separator", default="", metavar="TEXT",
        help=r"between documents of a text, \n standing for a new line (default: the file is one)",
    )  # fmt: skip
    add("--field", default="text", help="that holds a document's text (default: text)")
    add(
        "--window", type=int, metavar="N",
        help="tokens predicted per window (default: the model's context)",
    )  # fmt: skip
    add("--stride", type=int, metavar="N", help="tokens between windows (default: half a window)")
    tasks = parser.add_argument_group("tasks")
    add = tasks.add_argument
    add(
        "--tasks", nargs="+", default=[], metavar="TASK",
        help="files of questions, GSM8K's or HumanEval's exercises (.jsonl, .gz, .xz; BLiMP's "
        ".zip), or names in --task-dir",
    )  # fmt: skip
    add("--task-dir", type=Path, metavar="DIR", help="where tasks are by name")
    add("--limit", type=int, metavar="N", help="first N items of each part")
    add("--shots", type=int, default=0, metavar="K", help="solved items before each (default: 0)")
    add("--seed", type=int, default=0, help="of the choice of solved items, and of samples")
    add("--truncate", action="store_true", help="cut off the beginning of what is too long")
    add("--samples", type=int, default=1, metavar="N", help="answers to each exercise (default: 1)")
    add("--temperature", type=float, default=0.0, help="of answers; 0, the default, is greedy")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    add(
        "--run-code", action="store_true",
        help="run the programs that the model writes, in processes without files and network",
    )  # fmt: skip
    add(
        "--records", type=Path, metavar="DIR",
        help="keep the result of each item here; the same command then goes on where it stopped",
    )  # fmt: skip


def run_eval(arguments: argparse.Namespace) -> None:
    """Run `bitjax eval`."""
    if arguments.tasks:
        _tasks(arguments)
        return
    if arguments.other is not None:
        raise ValueError("two models are compared on --tasks; none is given")
    from bitjax.cli_corpus import unescaped
    from bitjax.evaluation_text import TextSettings, evaluate_text

    settings = TextSettings(
        arguments.text, arguments.window, arguments.stride, arguments.documents,
        unescaped(arguments.separator), arguments.field,
    )  # fmt: skip
    evaluate_text(arguments.model, settings)


def _tasks(arguments: argparse.Namespace) -> None:
    from bitjax.evaluate.exercises import read_exercises
    from bitjax.evaluate.generation import GenerationSettings
    from bitjax.evaluate.multiple_choice import Settings
    from bitjax.evaluate.tasks import find_task, read_task
    from bitjax.evaluation import Choices, evaluate_tasks

    choices = Choices(
        Settings(arguments.shots, arguments.seed, arguments.truncate),
        GenerationSettings(
            arguments.shots, arguments.seed, arguments.samples, arguments.temperature,
            arguments.max_new_tokens,
        ),
        arguments.limit, arguments.records, arguments.run_code,
    )  # fmt: skip
    paths = [find_task(name, arguments.task_dir) for name in arguments.tasks]
    tasks = [read_exercises(path) or read_task(path) for path in paths]
    models = [arguments.model, arguments.other] if arguments.other else [arguments.model]
    evaluate_tasks(models, tasks, choices)
