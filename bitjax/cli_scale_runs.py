"""`bitjax scale plan` and `bitjax scale run`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitjax.config import StudyConfig
    from bitjax.scaling.plan import Budget

Command = Callable[[str, object, str], argparse.ArgumentParser]


def add_run_commands(command: Command) -> None:
    """The commands that make runs."""
    plan = command("plan", _plan, "choose runs within a budget, and predict their times")
    plan.add_argument(
        "recipe", type=Path,
        help="a Python file with get_config(): the ternary run of any size; and, if the study is "
        "not of one group of runs, get_study()",
    )  # fmt: skip
    plan.add_argument("-o", "--output", type=Path, required=True, metavar="PLAN.json")
    _data(plan)
    budget = plan.add_mutually_exclusive_group()
    add = budget.add_argument
    add("--hours", type=float, metavar="H", help="on this machine, as measured")
    add("--flops", type=float, metavar="F", help="of training, e.g. 1e16")
    add("--dollars", type=float, metavar="X", help="at --price")
    add = plan.add_argument
    add("--price", type=float, metavar="P", help="dollars for an hour of such a machine")
    add(
        "--design", choices=("ratios", "factorial", "isoflop"), default="ratios",
        help="tokens in fixed ratios to parameters; the same token counts for all sizes; or a few "
        "levels of compute (default: ratios)",
    )  # fmt: skip
    add("--sizes", nargs="+", metavar="DxL", help="hidden size x layers, e.g. 64x2 128x4")
    add("--ratios", nargs="+", type=float, metavar="R", help="training tokens per parameter")
    add("--arms", nargs="+", metavar="ARM", help="e.g. ternary float binary ptq_int4 continual")
    add("--seeds", type=int, metavar="N", help="of every cell")
    add("--rates", nargs="+", type=float, metavar="LR", help="that sweeps begin with")
    _jobs(plan)
    add("--overwrite", action="store_true", help="replace PLAN.json; its calibrations are kept")

    run = command("run", _run, "do a plan's runs, or what is left of them, into a table")
    run.add_argument("plan", type=Path)
    run.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    _data(run)
    _jobs(run)
    run.add_argument("--retry", action="store_true", help="try runs again that failed before")


def _data(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--data", default=None, metavar="PATH",
        help="a corpus of `bitjax corpus build`, or a text (default: the recipe's)",
    )  # fmt: skip


def _jobs(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="runs at once, each with its share of the cores (default: 1)",
    )  # fmt: skip


def _plan(arguments: argparse.Namespace) -> None:
    from bitjax import terminal
    from bitjax.recipe import read_recipe
    from bitjax.replacing import replace_text
    from bitjax.scaling.plan import read_plan, to_json
    from bitjax.scaling.planning import Wanted, make_plan, remarks, show_plan

    base = read_recipe(arguments.recipe)
    known = []
    if arguments.output.exists():
        if not arguments.overwrite:
            raise ValueError(f"{arguments.output} exists; choose another name or give --overwrite")
        known = read_plan(arguments.output).calibrations
    wanted = Wanted(_study(arguments), arguments.design, _budget(arguments), arguments.jobs)
    plan = make_plan(base, wanted, arguments.data, known)
    replace_text(arguments.output, to_json(plan))
    show_plan(plan, arguments.jobs)
    for remark in remarks(plan):
        print(f"bitjax: warning: {remark}", file=sys.stderr)
    terminal.console.print(f"plan: {arguments.output}", soft_wrap=True)


def _study(arguments: argparse.Namespace) -> StudyConfig:
    """The recipe's study, or one group of what the command line says."""
    import dataclasses

    from bitjax.config import Group
    from bitjax.recipe import read_study

    study = read_study(arguments.recipe)
    said: dict[str, Any] = {
        name: tuple(value)
        for name in ("sizes", "ratios", "arms")
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.seeds is not None:
        said["seeds"] = arguments.seeds
    if said:
        study = dataclasses.replace(study, groups=(Group(**said),))
    if arguments.rates is not None:
        study = dataclasses.replace(study, rates=tuple(arguments.rates))
    return study


def _budget(arguments: argparse.Namespace) -> Budget | None:
    from bitjax.scaling.plan import Budget

    for name in ("hours", "flops", "dollars", "price"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} {value} is not above 0")
    if (arguments.dollars is None) != (arguments.price is None):
        raise ValueError("--dollars and --price go together: the budget, and what an hour costs")
    if arguments.flops is not None:
        return Budget(arguments.flops, "flops", f"{arguments.flops:g} FLOPs")
    if arguments.dollars is not None:
        seconds = 3600 * arguments.jobs * arguments.dollars / arguments.price
        said = f"{arguments.dollars:g} dollars, at {arguments.price:g} an hour"
        return Budget(seconds, "seconds", said)
    if arguments.hours is not None:
        return Budget(3600 * arguments.jobs * arguments.hours, "seconds", f"{arguments.hours:g} h")
    return None


def _run(arguments: argparse.Namespace) -> None:
    from bitjax import terminal
    from bitjax.scaling.plan import read_plan
    from bitjax.scaling.run import run_plan

    plan = read_plan(arguments.plan)
    data = plan.recipe.data.text if arguments.data is None else arguments.data

    def say(line: str) -> None:
        terminal.console.print(line, soft_wrap=True)

    run_plan(plan, data, arguments.output, arguments.jobs, say, arguments.retry)
    say(f"table: {arguments.output / 'table.csv'}")
