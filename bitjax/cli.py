"""The command line: parse, call, and turn errors into one sentence."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bitjax import __version__

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax comments on every directory
    from bitjax.train import Diverged, Interrupted

    try:
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
    except (ValueError, Diverged, ModuleNotFoundError, OSError) as error:
        print(f"bitjax: {error}", file=sys.stderr)
        return 1
    return 0


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
        added.add_argument("model", type=Path, help="a model file, or a run directory")

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

    evaluate = command(
        "eval", _eval, "score a text: bits per byte and perplexity with its standard error"
    )
    model_argument(evaluate)
    evaluate.add_argument(
        "--text",
        default="",
        metavar="PATH",
        help="score all of this file (default: the held-out tenth of the packaged Shakespeare)",
    )
    evaluate.add_argument(
        "--window",
        type=int,
        default=None,
        metavar="N",
        help="tokens predicted per window (default: the model's context)",
    )
    evaluate.add_argument(
        "--stride",
        type=int,
        default=None,
        metavar="N",
        help="tokens between windows (default: half a window)",
    )

    generate = command("generate", _generate, "continue a prompt, streaming")
    model_argument(generate)
    generate.add_argument("--prompt", default="\n", help="text to continue (default: a new line)")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 keeps all")
    generate.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 keeps all")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable"
    )
    generate.add_argument(
        "--impl",
        choices=("auto", "ffi", "reference"),
        default="auto",
        help="custom calls, or pure JAX (default: auto)",
    )

    convert = command(
        "convert",
        _convert,
        "write a run's model as a file, packed to 2 or 1.6 bits a weight or in float",
    )
    model_argument(convert)
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    convert.add_argument(
        "--float", action="store_true", dest="as_float", help="keep float32 weights"
    )
    convert.add_argument(
        "--bits",
        choices=("2", "1.6"),
        default="2",
        help="bits of a packed ternary weight (default: 2; 1.6 is smaller, and faster from memory)",
    )
    convert.add_argument(
        "--tables",
        choices=("float32", "bfloat16", "int8", "int4"),
        default="float32",
        help="number format of the embedding and head of a packed file (default: float32)",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")

    inspect = command("inspect", _inspect, "show what a model file or a run directory holds")
    model_argument(inspect)

    bench = command(
        "bench",
        _bench,
        "time the packed product of every kernel this machine can run",
        "Weights are cycled through more memory than the caches hold. The last line is JSON.",
    )
    bench.add_argument(
        "--shape",
        type=int,
        nargs=2,
        default=(2560, 6912),
        metavar=("N", "K"),
        help="output and input features (default: 2560 6912)",
    )
    bench.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=(1, 8, 128),
        metavar="M",
        help="activation rows (default: 1 8 128)",
    )
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from bitjax.demo import run_demo
    from bitjax.train import reuse_freed_memory

    reuse_freed_memory()
    run_demo(arguments.out, arguments.text, arguments.prompt, arguments.seed)


def _train(arguments: argparse.Namespace) -> None:
    from bitjax import terminal
    from bitjax.config import override
    from bitjax.recipe import read_recipe
    from bitjax.train import reuse_freed_memory, train

    reuse_freed_memory()
    config = override(read_recipe(arguments.config), arguments.settings)
    with terminal.training_progress(arguments.config.stem) as on_report:
        train(config, arguments.out, on_report)
    terminal.console.print(f"run directory: {arguments.out}")


def _eval(arguments: argparse.Namespace) -> None:
    from bitjax import terminal
    from bitjax.api import load
    from bitjax.config import DataConfig
    from bitjax.evaluate import model_scorer, score_text
    from bitjax.train.data import load_text, read_tokens

    model = load(arguments.model)
    window = arguments.window or model.config.max_seq_len
    tokens, name = read_tokens(arguments.text)
    if not arguments.text:
        tokens, name = load_text(DataConfig()).valid, f"{name}, held-out tenth"
    score = score_text(model_scorer(model), tokens, window, arguments.stride)
    terminal.table(
        ("text", "bytes scored", "bits per byte", "perplexity per byte"),
        [
            (
                name,
                f"{score.tokens:,}",
                f"{score.bits_per_byte:.4f} ± {score.bits_per_byte_error:.4f}",
                f"{score.perplexity:.3f}",
            )
        ],
    )


def _generate(arguments: argparse.Namespace) -> None:
    from bitjax.api import load
    from bitjax.demo import stream_text
    from bitjax.infer import Generator, SamplingParams

    params = SamplingParams(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
    )
    stream_text(Generator(load(arguments.model, arguments.impl)), arguments.prompt, params)


def _convert(arguments: argparse.Namespace) -> None:
    from bitjax import terminal
    from bitjax.api import load
    from bitjax.infer import pack_model
    from bitjax.model.files import save_model
    from bitjax.packing import LayoutName

    if arguments.output.exists() and not arguments.overwrite:
        raise ValueError(f"{arguments.output} exists; choose another name or give --overwrite")
    model = load(arguments.model)
    if not arguments.as_float:
        layout: LayoutName = "ternary2" if arguments.bits == "2" else "ternary1.6"
        model = pack_model(model, layout, arguments.tables)
    save_model(arguments.output, model)
    terminal.console.print(
        f"{arguments.output}: {terminal.size(arguments.output.stat().st_size)}", soft_wrap=True
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from bitjax.inspection import inspect

    inspect(arguments.model)


def _bench(arguments: argparse.Namespace) -> None:
    from bitjax.bench import bench

    rows, cols = arguments.shape
    bench(rows, cols, arguments.rows)


if __name__ == "__main__":
    sys.exit(main())
