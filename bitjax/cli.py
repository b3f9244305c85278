"""The command line: parse, call, and turn errors into one sentence."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitjax import __version__
from bitjax.cli_batch import (
    add_batch_arguments,
    add_template_argument,
    run_batch_command,
    template_of,
)
from bitjax.cli_corpus import add_corpus_commands
from bitjax.cli_eval import add_eval_arguments, run_eval
from bitjax.cli_scale import add_scale_commands
from bitjax.cli_serve import add_serve_arguments, run_serve_command
from bitjax.printable import printable

if TYPE_CHECKING:
    from bitjax.infer import SamplingParams
    from bitjax.packing import LayoutName

_LAYOUTS: dict[str, LayoutName] = {"2": "ternary2", "1.6": "ternary1.6"}  # of --bits
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax comments on every directory
    from bitjax.allocator import reuse_freed_memory
    from bitjax.train import Diverged, Interrupted

    # Files are written and read one tensor at a time, of many sizes: kept memory would pile up.
    if arguments.run not in (_convert, _inspect, _dummy):
        reuse_freed_memory()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            arguments.run(arguments)
    except Interrupted as stop:
        print(f"\n{stop}; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, Diverged, ModuleNotFoundError, OSError, RuntimeError) as error:
        if (said := _sentence(error)) is None:
            raise
        print(f"bitjax: {printable(said)}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: Exception) -> str | None:
    """What an error says to a person; None of one that is a fault of ours."""
    from jax.errors import JaxRuntimeError

    if isinstance(error, JaxRuntimeError):  # memory that is not there, or what a custom call says
        return re.sub(
            r"^[A-Z_]+: (Error dispatching computation: )?(bitjax_\w+: )?", "", str(error)
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return None if isinstance(error, RuntimeError) else str(error)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"bitjax: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitjax", description="1.58-bit (ternary) language models in JAX."
    )
    parser.add_argument("--version", action="version", version=f"bitjax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: object, summary: str, more: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}".strip()
        )
        added.set_defaults(run=run)
        return added

    def model_argument(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "model",
            help="a model file, a run directory, a Hugging Face folder, a GGUF file, or the name "
            "of a model on the Hugging Face Hub (owner/name)",
        )

    def i2s_argument(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--i2s-group",
            type=int,
            choices=(128, 64, 4),
            help="values in a group of a GGUF file's I2_S matrices, where neither the file nor its "
            "values tell: 128 as built for x86, 64 for Arm, 4 for four rows to a byte",
        )

    def packing_arguments(added: argparse.ArgumentParser, bits: str, tables: str | None) -> None:
        added.add_argument(
            "--bits",
            choices=tuple(_LAYOUTS),
            default=bits,
            help="bits of a packed ternary weight; 1.6 is smaller, and faster from memory "
            f"(default: {bits})",
        )
        added.add_argument(
            "--layer-bits",
            action="append",
            default=[],
            metavar="PATTERN=BITS",
            help="bits of the layers whose names match, e.g. '*.ffn.down=2'; repeatable, and the "
            "last that matches decides",
        )
        added.add_argument(
            "--tables",
            choices=("float32", "bfloat16", "int8", "int4", "screened"),
            default=tables,
            help="number format of embedding and head; screened is bfloat16 with a 4-bit screen of "
            "the head, exact and nearly as fast as int4 (default: "
            f"{tables or 'float32, in GGUF float16, for Hugging Face bfloat16'})",
        )
        added.add_argument(
            "--columns",
            action="store_true",
            help="store down projections by columns as well: decoding reads only those of non-zero "
            "activations, where that is faster; the layers take a quarter more",
        )

    def cache_argument(added: argparse.ArgumentParser, default: str | None) -> None:
        added.add_argument(
            "--cache",
            choices=("float32", "bfloat16", "int8"),
            default=default,
            help="number format of cached keys and values "
            f"(default: {default or 'that of the activations'})",
        )

    def sampling_arguments(added: argparse.ArgumentParser, max_new_tokens: int) -> None:
        added.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
        added.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
        added.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all")
        added.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 keeps all")
        added.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 keeps all")
        added.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
        added.add_argument("--seed", type=int, default=0)
        added.add_argument(
            "--stop",
            action="append",
            default=[],
            metavar="TEXT",
            help="end at this text; repeatable",
        )
        added.add_argument(
            "--impl",
            choices=("auto", "ffi", "reference"),
            default="auto",
            help="custom calls, or pure JAX (default: auto)",
        )
        cache_argument(added, default=None)

    demo = command(
        "demo",
        _demo,
        "train a ternary model and its full-precision twin, compare, pack, generate",
        "Takes a few minutes on two cores; interrupted, the same command goes on.",
    )
    demo.add_argument(
        "--text",
        default="",
        metavar="PATH",
        help="train on this file instead of the packaged Shakespeare",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("bitjax-demo"),
        metavar="DIR",
        help="directory of the results (default: bitjax-demo)",
    )
    demo.add_argument("--prompt", default="ROMEO:\n", help="text that the sample continues")
    demo.add_argument("--seed", type=int, default=0, help="of weights, data order and sample")

    train = command(
        "train",
        _train,
        "train the model of a configuration",
        "The directory's newest checkpoint, if it has one, is where training goes on.",
    )
    train.add_argument("config", type=Path, help="a Python file with get_config(), see configs/")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's directory")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="override a setting, e.g. --set train.steps=500; repeatable",
    )

    train.add_argument(
        "--join",
        nargs="*",
        metavar=("HOST:PORT", "N"),
        help="be one of N processes of a run: HOST:PORT of the first, N, and which one this is, "
        "from 0; nothing more where the cluster's manager says it. All use the same directory",
    )

    plot = command(
        "plot",
        _plot,
        "draw curves of training runs",
        "Any number of a report can be drawn: loss, valid_loss, gradient_norm, update_norm, "
        "learning_rate, tokens_per_second, mfu, flip_rate, or of one layer minus, zero, plus and "
        "flips, e.g. flips/blocks.0.ffn.down.",
    )
    plot.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="directories of runs")
    plot.add_argument("-o", "--output", type=Path, required=True, metavar="PNG")
    plot.add_argument("--of", default="loss", metavar="NAME", help="the quantity (default: loss)")
    plot.add_argument(
        "--smooth",
        type=float,
        default=0.0,
        metavar="W",
        help="weight of the past in a moving average, 0 to below 1 (default: 0)",
    )

    add_corpus_commands(command("corpus", None, "turn text into token files to train on"))
    add_scale_commands(command("scale", None, "study how loss falls with parameters and tokens"))

    evaluate = command(
        "eval",
        run_eval,
        "score a text: bits per byte and perplexity with its standard error",
        "With --tasks, questions, exercises and programs; and two models are compared item by "
        "item.",
    )
    model_argument(evaluate)
    add_eval_arguments(evaluate)

    generate = command("generate", _generate, "continue a prompt, streaming")
    model_argument(generate)
    generate.add_argument("--prompt", default="\n", help="text to continue (default: a new line)")
    sampling_arguments(generate, max_new_tokens=256)

    batch = command(
        "batch",
        run_batch_command,
        "answer a file of prompts",
        "However it ends, the same command goes on: no line is answered twice.",
    )
    model_argument(batch)
    add_batch_arguments(batch)

    serve = command(
        "serve",
        run_serve_command,
        "serve a model over HTTP, as OpenAI's interface has it",
        "SIGTERM lets it finish what it has begun.",
    )
    model_argument(serve)
    add_serve_arguments(serve)

    chat = command(
        "chat",
        _chat,
        "talk with a model",
        "Reads messages from a pipe too, one a line, and prints the answers alone.",
    )
    model_argument(chat)
    chat.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    add_template_argument(chat)
    sampling_arguments(chat, max_new_tokens=1024)

    convert = command(
        "convert",
        _convert,
        "write a model in another format: packed, in float, for transformers or llama.cpp",
        "One tensor is in memory at a time.",
    )
    model_argument(convert)
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="PATH")
    convert.add_argument(
        "--to",
        choices=("bitjax", "hf", "hf-bf16", "gguf-tq2_0", "gguf-tq1_0", "gguf-i2_s", "gguf-f16"),
        help="the format: a model file of bitjax, a Hugging Face folder (packed, or bfloat16 "
        "master weights), or GGUF (default: gguf-tq2_0 for PATH.gguf, or gguf-f16 if the model is "
        "float, else bitjax)",
    )
    convert.add_argument(
        "--quantize",
        choices=("ternary",),
        help="quantise a full-precision model after its training, with int8 activations; it was "
        "not made for that and gets much worse",
    )
    convert.add_argument(
        "--activations",
        choices=("int8",),
        help="quantise the activations of a model with ternary weights alone (TriLM)",
    )
    i2s_argument(convert)
    convert.add_argument(
        "--float", action="store_true", dest="as_float", help="a model file of float weights"
    )
    packing_arguments(convert, bits="2", tables=None)
    convert.add_argument("--overwrite", action="store_true", help="replace PATH if it exists")

    inspect = command("inspect", _inspect, "show what a model holds: tensors, types, scales, zeros")
    model_argument(inspect)
    i2s_argument(inspect)
    inspect.add_argument(
        "--all",
        action="store_true",
        dest="every",
        help="each matrix and tensor by itself, not those of all blocks together",
    )

    dummy = command(
        "dummy",
        _dummy,
        "write a packed model file with random weights, to measure a shape",
        "Written piece by piece: a model larger than memory needs little of it.",
    )
    dummy.add_argument("preset", help="a shape in bitjax.presets.MODELS, e.g. b1.58-2b4t or 100b")
    dummy.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    dummy.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="override a dimension, e.g. --set num_layers=4; repeatable",
    )
    packing_arguments(dummy, bits="1.6", tables="int4")
    dummy.add_argument("--seed", type=int, default=0)
    dummy.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")

    bench = command(
        "bench",
        _bench,
        "time a packed model, or without one the packed product of every kernel",
        "The machine's limits are measured in the same run. The last line is JSON.",
    )
    bench.add_argument("model", type=Path, nargs="?", help="a packed model file")
    bench.add_argument(
        "--prompt",
        type=int,
        nargs="*",
        default=(128, 512),
        metavar="P",
        help="prompt lengths (default: 128 512)",
    )
    bench.add_argument(
        "--batch",
        type=int,
        nargs="*",
        default=(8, 32),
        metavar="B",
        help="sequences decoded together (default: 8 32)",
    )
    bench.add_argument(
        "--context",
        type=int,
        nargs="*",
        default=None,
        metavar="C",
        help="one sequence decoded up to these positions (default: 4096, or the model's context)",
    )
    cache_argument(bench, default="bfloat16")
    bench.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME=LLAMA_BENCH,GGUF[,FLAG...]",
        help="another engine's llama-bench and model, timed in turn with ours; repeatable",
    )
    bench.add_argument(
        "--threads", type=int, metavar="N", help="of every engine (default: all there are)"
    )
    bench.add_argument("--rounds", type=int, default=5, help="interleaved repetitions (default: 5)")
    bench.add_argument(
        "--shape",
        type=int,
        nargs=2,
        default=(2560, 6912),
        metavar=("N", "K"),
        help="without a model: output and input features (default: 2560 6912)",
    )
    bench.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=(1, 8, 128),
        metavar="M",
        help="without a model: activation rows (default: 1 8 128)",
    )
    bench.add_argument(
        "--layouts",
        nargs="+",
        default=("ternary2", "ternary1.6"),
        choices=("ternary2", "ternary1.6", "int4", "int8"),
        help="without a model: packed layouts (default: ternary2 ternary1.6)",
    )
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from bitjax.demo import run_demo

    run_demo(arguments.out, arguments.text, arguments.prompt, arguments.seed)


def _train(arguments: argparse.Namespace) -> None:
    from bitjax import terminal
    from bitjax.config import override
    from bitjax.recipe import read_recipe
    from bitjax.train import Interrupted, processes, train

    if arguments.join is not None:
        processes.join(*_place(arguments.join))
    config = override(read_recipe(arguments.config), arguments.settings)
    try:
        with terminal.training_progress(arguments.config.stem) as on_report:
            train(config, arguments.out, on_report)
    except Interrupted:
        raise
    except Exception:
        processes.leave_alone()
        raise
    if processes.is_first():
        terminal.console.print(f"run directory: {arguments.out}")


def _place(words: Sequence[str]) -> tuple[str | None, int | None, int | None]:
    """Of --join: the coordinator, how many processes there are, and which one this is."""
    if not words:
        return None, None, None
    if len(words) != 3 or not (words[1].isdecimal() and words[2].isdecimal()):
        said = " ".join(words)
        raise ValueError(f"--join {said} is not HOST:PORT N INDEX, e.g. 10.0.0.1:9000 4 0")
    return words[0], int(words[1]), int(words[2])


def _plot(arguments: argparse.Namespace) -> None:
    from bitjax.plots import plot_quantity
    from bitjax.train import read_metrics

    runs = {}
    for directory in arguments.runs:
        runs[str(directory)] = read_metrics(directory)
        if not runs[str(directory)]:
            raise ValueError(f"{directory} is no run with reports: it has no metrics.jsonl")
    plot_quantity(arguments.output, runs, arguments.of, arguments.smooth)


def _generate(arguments: argparse.Namespace) -> None:
    from bitjax.api import load
    from bitjax.demo import stream_text
    from bitjax.infer import Generator

    generator = Generator(load(arguments.model, arguments.impl), arguments.cache)
    stream_text(generator, arguments.prompt, _sampling(arguments))


def _chat(arguments: argparse.Namespace) -> None:
    from bitjax.api import load
    from bitjax.chat import ChatFormat, Conversation
    from bitjax.chat.terminal import run_chat
    from bitjax.infer import Generator

    params = _sampling(arguments)
    template = template_of(arguments.template)
    model = load(arguments.model, arguments.impl)
    form = ChatFormat(model.tokenizer, model.config, template)
    conversation = Conversation(form, model.config.max_seq_len, arguments.system)
    run_chat(Generator(model, arguments.cache), conversation, params)


def _sampling(arguments: argparse.Namespace) -> SamplingParams:
    from bitjax.infer import SamplingParams

    return SamplingParams(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
    )


def _convert(arguments: argparse.Namespace) -> None:
    from bitjax.conversion import Conversion, convert

    wanted = Conversion(
        arguments.to, arguments.quantize, arguments.activations == "int8", arguments.i2s_group,
        arguments.as_float, _layout(arguments), arguments.tables, arguments.columns,
        _layer_layouts(arguments), arguments.overwrite,
    )  # fmt: skip
    convert(arguments.model, arguments.output, wanted)


def _inspect(arguments: argparse.Namespace) -> None:
    from bitjax.inspection import inspect

    inspect(arguments.model, arguments.i2s_group, arguments.every)


def _dummy(arguments: argparse.Namespace) -> None:
    from bitjax import terminal
    from bitjax.config import override
    from bitjax.infer.dummy import write_dummy
    from bitjax.presets import MODELS

    if arguments.preset not in MODELS:
        raise ValueError(f"no preset {arguments.preset!r}; there are {', '.join(MODELS)}")
    _refuse_to_replace(arguments)
    if arguments.seed < 0:
        raise ValueError(f"--seed {arguments.seed} is below 0")
    config = override(MODELS[arguments.preset], arguments.settings)
    with terminal.byte_progress(arguments.output.name) as on_bytes:
        write_dummy(
            arguments.output, config, _layout(arguments), arguments.tables, arguments.seed,
            on_bytes, arguments.columns, _layer_layouts(arguments),
        )  # fmt: skip
    terminal.console.print(
        f"{arguments.output}: {terminal.size(arguments.output.stat().st_size)}", soft_wrap=True
    )


def _bench(arguments: argparse.Namespace) -> None:
    from bitjax.bench import bench_kernels, bench_model
    from bitjax.bench.rivals import Rival

    rivals = [Rival.parse(text) for text in arguments.against]
    if arguments.model is None:
        if rivals:
            raise ValueError("--against compares models; give ours as well")
        rows, cols = arguments.shape
        bench_kernels(rows, cols, arguments.rows, arguments.layouts, arguments.threads)
    elif arguments.rounds < 1 or min((1, *arguments.prompt, *arguments.batch)) < 1:
        raise ValueError("rounds, prompt lengths and batch sizes must be 1 or more")
    else:
        bench_model(
            arguments.model, arguments.prompt, arguments.context, arguments.batch, rivals,
            arguments.rounds, arguments.cache, arguments.threads,
        )  # fmt: skip


def _refuse_to_replace(arguments: argparse.Namespace) -> None:
    if arguments.output.exists() and not arguments.overwrite:
        raise ValueError(f"{arguments.output} exists; choose another name or give --overwrite")


def _layout(arguments: argparse.Namespace) -> LayoutName:
    return _LAYOUTS[arguments.bits]


def _layer_layouts(arguments: argparse.Namespace) -> list[tuple[str, LayoutName]]:
    layouts = []
    for text in arguments.layer_bits:
        pattern, _, bits = text.rpartition("=")
        if not pattern or bits not in _LAYOUTS:
            raise ValueError(f"--layer-bits {text!r} is not PATTERN=2 or PATTERN=1.6")
        layouts.append((pattern, _LAYOUTS[bits]))
    return layouts


if __name__ == "__main__":
    sys.exit(main())
