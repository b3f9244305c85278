"""`bitjax scale plan` and `bitjax scale run`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Command = Callable[[str, object, str], argparse.ArgumentParser]


def add_run_commands(command: Command) -> None:
    """The commands that make runs."""
