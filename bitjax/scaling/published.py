"""What others measured of ternary models beside full precision, and a fit held against it.

Losses in nats per token of different tokenizers and texts do not compare; their ratio does not have
a unit, so what is compared is

    relative gap = log(L_ternary / L_float)

of equal N and D, a loss from a perplexity by its logarithm. The figures are in published.json, with
their sources; `checked` says that they were read in the source itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bitjax.presets import MODELS
from bitjax.scaling.arms import non_embedding
from bitjax.scaling.ensemble import Ensemble, Estimate
from bitjax.scaling.predict import predict

FIT_POINTS = 5  # sizes at which a published curve is read, ends of its range included


@dataclass(frozen=True)
class Point:
    """One published pair.

    Attributes:
        N: non-embedding parameters where the shape is known, else of the whole model.
        relative: log of the ternary loss over the full-precision one.
        parameters: N_ternary / N at equal loss, where a curve was published; else NaN.
    """

    source: str
    at: str
    name: str
    N: float
    D: float
    relative: float
    parameters: float = math.nan


@cache
def published() -> dict[str, Any]:
    """published.json."""
    text = Path(__file__).with_name("published.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def points() -> list[Point]:
    """Every published pair, and published curves at some sizes of their range."""
    found = []
    for table in published()["pairs"]:
        for row in table["rows"]:
            if row["float_perplexity"] is None:
                continue
            ternary, full = (math.log(row[f"{a}_perplexity"]) for a in ("ternary", "float"))
            found.append(
                Point(
                    table["source"], table["at"], row["name"],
                    non_embedding(MODELS[row["preset"]]), table["tokens"],
                    math.log(ternary / full),
                )
            )  # fmt: skip
    for fit in published()["fits"]:
        for N in np.geomspace(fit["range"][0], fit["range"][1], FIT_POINTS):
            full, ternary = curve(fit["float"], N), curve(fit["ternary"], N)
            t = fit["ternary"]
            parameters = (t["A"] / (full - t["E"])) ** (1 / t["alpha"]) / N
            found.append(
                Point(
                    fit["source"], fit["at"], f"curve at {N / 1e9:.2g}B", float(N), fit["tokens"],
                    math.log(ternary / full), float(parameters) if full > t["E"] else math.inf,
                )
            )  # fmt: skip
    return found


def curve(of: Mapping[str, float], N: float) -> float:
    """E + A / N^alpha."""
    return of["E"] + of["A"] / N ** of["alpha"]


@dataclass(frozen=True)
class Confrontation:
    """A published pair beside what a fit predicts for it; `agrees`: the interval holds it."""

    point: Point
    relative: Estimate
    parameters: Estimate
    agrees: bool


def confront(ensemble: Ensemble, arm: str = "ternary") -> list[Confrontation]:
    """A fit's predictions of every published pair."""
    pairs = points()
    made = predict(ensemble, arm, [p.N for p in pairs], [p.D for p in pairs])
    return [
        Confrontation(
            p, m.relative, m.parameters, m.relative.low <= p.relative <= m.relative.high
        )
        for p, m in zip(pairs, made, strict=True)
    ]  # fmt: skip
