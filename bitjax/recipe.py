"""Recipes: Python files with a `get_config()` that returns a `RunConfig`."""

from __future__ import annotations

import runpy
from pathlib import Path

from bitjax.config import RunConfig


def read_recipe(path: Path) -> RunConfig:
    """Run a recipe file and return its configuration. The file is code: run only your own.

    Raises:
        ValueError: no such file, one that fails, or one without a `get_config()` that returns a
            `RunConfig`.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a Python file with get_config()")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise ValueError(f"{path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        raise ValueError(f"{path} has no get_config() that returns a bitjax.config.RunConfig")
    return config
