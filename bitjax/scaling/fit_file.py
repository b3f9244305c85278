"""A fit as a JSON file: runs, laws, their draws. Written whole, and checked when read.

{"format": "bitjax scale fit", "version": 1, "delta": ..., "resampling": ...,
 "runs": {"N": [...], "D": [...], "loss": [...], "arm": [...], ...},
 "laws": [{"form", "arms", "center", "names", "theta": [P], "draws": [R][P], "weight", ...}]}
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from bitjax.replacing import replace_text
from bitjax.scaling.ensemble import Ensemble, Member
from bitjax.scaling.laws import Law
from bitjax.scaling.runs import Runs

FORMAT, VERSION = "bitjax scale fit", 1
DIGITS = 8  # of draws: far below what 4000 of them decide
NUMBERS = ("weight", "noise", "aicc", "objective", "held_out", "held_out_gap")  # of a member


@dataclass(frozen=True)
class FitFile:
    """What a file holds."""

    runs: Runs
    ensemble: Ensemble
    delta: float
    resampling: str


def write_fit(path: Path, fit: FitFile) -> None:
    """Write a file, in place of one that is there."""
    runs = {f.name: getattr(fit.runs, f.name).tolist() for f in fields(Runs)}
    laws = [
        {
            "form": m.law.form, "arms": m.law.arms, "center": m.law.center, "names": m.law.names,
            "theta": m.theta.tolist(), **{name: getattr(m, name) for name in NUMBERS},
            "draws": [[float(f"{x:.{DIGITS}g}") for x in row] for row in m.draws],
        }
        for m in fit.ensemble.members
    ]  # fmt: skip
    document = {
        "format": FORMAT, "version": VERSION, "delta": fit.delta, "resampling": fit.resampling,
        "runs": runs, "laws": laws,
    }  # fmt: skip
    replace_text(path, json.dumps(_null(document), allow_nan=False))


def read_fit(path: Path) -> FitFile:
    """Read a file.

    Raises:
        ValueError: it is none, or damaged; the message says where.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ValueError(f"{document['format']!r} of version {document['version']!r}")
        columns = {f.name: document["runs"][f.name] for f in fields(Runs)}
        columns["loss_se"] = [math.nan if x is None else x for x in columns["loss_se"]]
        if len({len(values) for values in columns.values()}) != 1:
            raise ValueError("columns of runs differ in length")
        runs = Runs.of(**columns)
        members = tuple(_member(law) for law in document["laws"])
        if not members:
            raise ValueError("no laws")
        return FitFile(
            runs, Ensemble(members), float(document["delta"]), str(document["resampling"])
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no fit of `bitjax scale fit`: {said}") from None


def _member(law: dict[str, Any]) -> Member:
    made = Law(law["form"], tuple(law["arms"]), tuple(law["center"]))
    theta, draws = np.array(law["theta"], float), np.array(law["draws"], float)
    P = len(made.names)
    if theta.shape != (P,) or draws.ndim != 2 or draws.shape[1] != P or not len(draws):
        raise ValueError(f"the {made.form} law wants {P} parameters")
    if not (np.isfinite(theta).all() and np.isfinite(draws).all()):
        raise ValueError(f"the {made.form} law has parameters that are no finite numbers")
    numbers = {name: math.nan if law[name] is None else float(law[name]) for name in NUMBERS}
    if not 0 <= numbers["weight"] <= 1:
        raise ValueError(f"the {made.form} law has weight {numbers['weight']:g}, not a share")
    if not 0 < numbers["noise"] < math.inf:
        raise ValueError(
            f"the {made.form} law has noise {numbers['noise']:g}, not a number above 0"
        )
    return Member(made, theta, draws, **numbers)


def _null(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {k: _null(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_null(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
