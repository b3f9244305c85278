"""`bitjax scale`: plan and run training runs of many sizes; the table of them, and its laws."""

from __future__ import annotations

import argparse

from bitjax.cli_scale_laws import add_law_commands
from bitjax.cli_scale_runs import add_run_commands


def add_scale_commands(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of `bitjax scale`; each sets `run`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: object, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        added.set_defaults(run=run)
        return added

    add_run_commands(command)
    add_law_commands(command)
