"""From a table of runs to an ensemble of laws: what `bitjax scale fit` does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitjax.scaling.compare import Standing, compare
from bitjax.scaling.ensemble import Ensemble, Member
from bitjax.scaling.fit import DELTA, law_for
from bitjax.scaling.fit_file import FitFile, read_fit
from bitjax.scaling.intervals import (
    MAX_DEGENERATE,
    RESAMPLES,
    Resampling,
    bootstrap,
    degenerate_share,
    noise,
)
from bitjax.scaling.laws import Form
from bitjax.scaling.runs import Runs, design_warnings, read_runs

DEFAULT_FORMS: tuple[Form, ...] = ("eta", "drift", "own-e", "eta-e", "separate")


def fit_runs(
    runs: Runs, forms: Sequence[Form] | None = None, arms: tuple[str, ...] | None = None,
    delta: float = DELTA, resamples: int = RESAMPLES, resampling: Resampling | None = None,
    seed: int = 0, largest: int = 1,
) -> tuple[FitFile, list[Standing]]:  # fmt: skip
    """Fit forms (default: `DEFAULT_FORMS`, of one arm "shared"), rank and bootstrap them.

    Warns of what the runs cannot tell.

    Args:
        arms: to fit, the reference first; runs of others are left out (default: all).
        resampling: default "cells", or "weights" where cells are too few for that.
        largest: sizes held out to judge the forms by.

    Raises:
        ValueError: see `fit_law`.
    """
    arms = arms or runs.arms
    if unknown := [a for a in arms if a not in runs.arms]:
        raise ValueError(f"no run has arm {unknown[0]!r}; there are {', '.join(runs.arms)}")
    runs = runs[np.isin(runs.arm, arms)]
    forms = tuple(forms or _affordable(runs, arms))
    standings = compare(runs, forms, arms, delta, largest)
    best = standings[0].fit
    exponents = {name: best.natural[name] for name in ("alpha", "beta")}
    for said in design_warnings(runs, best.jacobian, exponents):
        warnings.warn(said, stacklevel=2)
    if resampling is None:
        share = degenerate_share(runs, seed)
        resampling = "weights" if share > MAX_DEGENERATE else "cells"
        if share > MAX_DEGENERATE:
            warnings.warn(
                f"{share:.0%} of resamples of these cells leave an arm one size or token count: "
                "intervals come from random weights instead; see --profile as well",
                stacklevel=2,
            )
    members = [
        Member(
            s.fit.law, s.fit.theta, bootstrap(s.fit, resamples, resampling, seed), s.weight,
            noise(s.fit), s.aicc, s.fit.objective, s.held_out, s.held_out_gap,
        )
        for s in standings
    ]  # fmt: skip
    return FitFile(runs, Ensemble(tuple(members)), delta, resampling), standings


def _affordable(runs: Runs, arms: tuple[str, ...]) -> list[Form]:
    """The default forms that there are runs enough for."""
    wanted = DEFAULT_FORMS if len(arms) > 1 else ("shared",)
    found: list[Form] = []
    for form in wanted:
        try:
            law_for(runs, form, arms)
            found.append(form)
        except ValueError:
            if form == wanted[0]:  # the others want more
                raise
    return found


def load_fit(path: Path) -> FitFile:
    """A fit from its file, or made of a table with the defaults."""
    with path.open("rb") as file:
        is_fit = file.read(1) == b"{"
    return read_fit(path) if is_fit else fit_runs(read_runs(path))[0]
