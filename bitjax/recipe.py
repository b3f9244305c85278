"""Recipes: Python files with a `get_config()` that returns a `RunConfig`.

Those of scaling studies may have a `get_study()`, which returns a `StudyConfig`.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from bitjax.config import RunConfig, StudyConfig


def read_recipe(path: Path) -> RunConfig:
    """Run a recipe file and return its configuration. The file is code: run only your own.

    Raises:
        ValueError: no such file, one that fails, or one without a `get_config()` that returns a
            `RunConfig`.
    """
    config = _call(path, "get_config")
    if not isinstance(config, RunConfig):
        raise ValueError(f"{path} has no get_config() that returns a bitjax.config.RunConfig")
    return config


def read_study(path: Path) -> StudyConfig:
    """A recipe file's study; that of all defaults if it has none. The file is code, as above.

    Raises:
        ValueError: no such file, one that fails, or whose `get_study()` returns something else.
    """
    study = _call(path, "get_study")
    if study is None:
        return StudyConfig()
    if not isinstance(study, StudyConfig):
        raise ValueError(f"{path} has a get_study() that returns no bitjax.config.StudyConfig")
    return study


def _call(path: Path, name: str) -> object:
    """What the file's function returns; None without it."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a Python file with get_config()")
    try:
        found = runpy.run_path(str(path)).get(name)
        return found() if callable(found) else None
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise ValueError(f"{path} failed: {type(error).__name__}: {error}") from error
