"""`bitjax scale fit`, `predict` and `plot`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Command = Callable[[str, object, str], argparse.ArgumentParser]


def add_law_commands(command: Command) -> None:
    """The commands that make laws of runs, and use them."""
    _add_fit(command("fit", _fit, "fit scaling laws to a table of runs"))
    _add_predict(command("predict", _predict, "what a fit says of sizes that were not trained"))
    _add_plot(command("plot", _plot, "draw runs, laws and frontiers as PNG and SVG"))


def _add_fit(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("table", type=Path, metavar="TABLE", help="CSV with columns N, D, loss, and arm and others")
    add(
        "--law", nargs="+", metavar="FORM",
        help="what arms differ in: shared, eta (effective parameters), drift (eta changing with N "
        "and D), own-e, eta-e, separate, precision (default: eta drift own-e eta-e separate; of "
        "one arm shared)",
    )  # fmt: skip
    add(
        "--arms", nargs="+", metavar="ARM",
        help="arms to fit, the reference first (default: all, float first)",
    )  # fmt: skip
    add(
        "--where", action="append", default=[], metavar="COLUMN=VALUE",
        help="only the runs that have this in tokenizer, validation, data, seed, arm or ended",
    )  # fmt: skip
    add("--delta", type=float, help="of the Huber loss of log loss (default: 0.001)")
    add("--resamples", type=int, metavar="N", help="of the bootstrap (default: 4000)")
    add("--bootstrap", choices=("cells", "weights"), help="default: cells, if there are enough")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    add("--drop-highest", type=int, default=0, metavar="N", help="leave out the N highest losses")
    add(
        "--hold-out", type=int, default=1, metavar="N",
        help="largest sizes that are predicted from the others, to judge the laws (default: 1)",
    )  # fmt: skip
    add("--profile", action="store_true", help="intervals by profile likelihood as well")
    add("--isoflop", action="store_true", help="parabolas at equal compute as well")
    add("-o", "--output", type=Path, metavar="JSON", help="write the fit here")


def _fit(arguments: argparse.Namespace) -> None:
    from bitjax.scaling import tables
    from bitjax.scaling.fit import DELTA
    from bitjax.scaling.fit_file import write_fit
    from bitjax.scaling.intervals import RESAMPLES
    from bitjax.scaling.runs import read_runs, without_highest
    from bitjax.scaling.study import fit_runs

    delta = DELTA if arguments.delta is None else arguments.delta
    resamples = RESAMPLES if arguments.resamples is None else arguments.resamples
    if not delta > 0:
        raise ValueError(f"--delta {delta} must be above 0")
    if resamples < 2:
        raise ValueError(f"--resamples {resamples} must be 2 or more")
    runs = read_runs(arguments.table)
    for condition in arguments.where:
        column, _, value = condition.partition("=")
        runs = runs.where(column, value)
    runs = without_highest(runs, arguments.drop_highest)
    arms = tuple(arguments.arms) if arguments.arms else None
    fit, standings = fit_runs(
        runs, arguments.law, arms, delta, resamples, arguments.bootstrap, arguments.seed,
        arguments.hold_out,
    )  # fmt: skip
    if arguments.output:
        write_fit(arguments.output, fit)
    tables.print_fit(fit, standings, arguments.profile)
    if arguments.isoflop:
        tables.print_parabolas(fit)


def _add_predict(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("fit", type=Path, metavar="FIT", help="file of `bitjax scale fit -o`, or a table of runs")
    add("--arm", default="ternary", help="compared with the reference (default: ternary)")
    add(
        "--sizes", nargs="+", type=float, metavar="N",
        help="non-embedding parameters (default: 1e9 7e9 13e9 70e9 100e9)",
    )  # fmt: skip
    tokens = parser.add_mutually_exclusive_group()
    tokens.add_argument("--ratio", type=float, help="tokens per parameter (default: 20)")
    tokens.add_argument("--tokens", type=float, metavar="D", help="the same for every size")
    add("--tolerance", type=float, help="nats per token that count as closed (default: 0.01)")
    add("--vocabulary", type=int, metavar="V", help="rows of the embedding (default: 32000)")
    add("--throughput", type=float, metavar="FLOPS", help="of an accelerator (default: 4e14)")
    add("--price", type=float, metavar="DOLLARS", help="of an accelerator's hour (default: 2.5)")
    add(
        "--budget", type=float, metavar="FLOPS",
        help="of the next experiment (default: 10 times the largest run's)",
    )  # fmt: skip
    add("--published", action="store_true", help="beside what others measured of ternary models")


def _predict(arguments: argparse.Namespace) -> None:
    from bitjax.config.prices import Prices
    from bitjax.scaling import tables
    from bitjax.scaling.predict import SIZES, TOKENS_PER_PARAMETER, TOLERANCE
    from bitjax.scaling.shapes import VOCABULARY
    from bitjax.scaling.study import load_fit

    usual = Prices()
    prices = Prices(
        usual.flops_per_second if arguments.throughput is None else arguments.throughput,
        usual.dollars_per_hour if arguments.price is None else arguments.price,
    )
    sizes = [float(N) for N in arguments.sizes or SIZES]
    ratio = TOKENS_PER_PARAMETER if arguments.ratio is None else arguments.ratio
    tokens = [N * ratio if arguments.tokens is None else arguments.tokens for N in sizes]
    if not all(0 < x < float("inf") for x in (*sizes, *tokens)):
        raise ValueError("sizes and tokens must be numbers above 0")
    question = tables.Question(
        arguments.arm, sizes, tokens,
        TOLERANCE if arguments.tolerance is None else arguments.tolerance,
        VOCABULARY if arguments.vocabulary is None else arguments.vocabulary,
    )  # fmt: skip
    fit = load_fit(arguments.fit)
    tables.print_predictions(fit, question)
    tables.print_costs(fit, question, prices)
    tables.print_next(fit, question, arguments.budget)
    if arguments.published:
        tables.print_published(fit, arguments.arm)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("fit", type=Path, metavar="FIT", help="file of `bitjax scale fit -o`, or a table of runs")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the figures")
    add("--ratio", type=float, help="tokens per parameter beyond the runs (default: 20)")
    add(
        "--vocabulary", type=int, metavar="V",
        help="rows of the embedding that bytes and joules include (default: 32000)",
    )  # fmt: skip


def _plot(arguments: argparse.Namespace) -> None:
    from bitjax import terminal
    from bitjax.scaling.plots import plot_fit
    from bitjax.scaling.predict import TOKENS_PER_PARAMETER
    from bitjax.scaling.shapes import VOCABULARY
    from bitjax.scaling.study import load_fit

    ratio = TOKENS_PER_PARAMETER if arguments.ratio is None else arguments.ratio
    vocabulary = VOCABULARY if arguments.vocabulary is None else arguments.vocabulary
    if not 0 < ratio < float("inf"):
        raise ValueError(f"--ratio {ratio} is not a number above 0")
    fit = load_fit(arguments.fit)
    for path in plot_fit(arguments.output, fit.runs, fit.ensemble, ratio, vocabulary):
        terminal.console.print(str(path), soft_wrap=True)
