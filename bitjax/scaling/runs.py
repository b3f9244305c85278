"""Runs as arrays, and whether they can be fitted: what `fit` and the others work on."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from bitjax.scaling.table import COLUMNS, read_table

FINISHED = "finished"  # status of a run that counts
MIN_SIZES = 4  # with three, N alone decides E, A and alpha without anything left over
MAX_CORRELATION = 0.9  # of log N and log D: beyond it alpha and beta trade for one another
MAX_CONDITION = 1e3  # of the standardised derivatives; Chinchilla's points have 220


@dataclass(frozen=True)
class Runs:
    """Finished runs, an entry each; arrays of one length [n].

    Attributes:
        N: non-embedding parameters.
        D: training tokens.
        loss: held-out, nats per token.
        arm: name of the number format ("ternary", "float", ...).
        seed: -1 where the table has none.
        embedding_parameters: 0 where the table has none.
        ended: whether the learning rate was at the end of its schedule.
        tokenizer, validation, data: identities; "" where the table has none.
        loss_se: standard error of the loss over held-out windows; NaN where the table has none.
    """

    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray
    arm: np.ndarray
    seed: np.ndarray
    embedding_parameters: np.ndarray
    ended: np.ndarray
    tokenizer: np.ndarray
    validation: np.ndarray
    data: np.ndarray
    loss_se: np.ndarray

    @classmethod
    def of(cls, N: object, D: object, loss: object, arm: object = "", **others: object) -> Runs:
        """Runs of arrays, or of values that all runs share; what is not given is unknown."""
        N = np.atleast_1d(np.asarray(N, float))
        defaults: dict[str, object] = {
            "seed": -1, "embedding_parameters": 0.0, "ended": True, "tokenizer": "",
            "validation": "", "data": "", "loss_se": math.nan,
        }  # fmt: skip
        given = {"N": N, "D": D, "loss": loss, "arm": arm, **defaults, **others}
        kinds = {"D": float, "loss": float, "embedding_parameters": float, "loss_se": float}
        arrays = {
            name: np.broadcast_to(np.asarray(value, kinds.get(name)), N.shape).copy()
            for name, value in given.items()
        }
        return cls(**arrays)

    def __len__(self) -> int:
        return len(self.N)

    def __getitem__(self, rows: np.ndarray) -> Runs:
        return Runs(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def where(self, column: str, value: str) -> Runs:
        """The runs that have a value, as the table writes it, in a column.

        Raises:
            ValueError: no such column, or none has it.
        """
        columns = ("arm", "tokenizer", "validation", "data", "seed", "ended")
        if column not in columns:
            raise ValueError(f"runs are chosen by {', '.join(columns)}; got {column!r}")
        values = [str(v) for v in getattr(self, column)]
        rows = np.array([v.lower() == value.lower() for v in values])
        if not rows.any():
            raise ValueError(
                f"no run has {column} {value!r}; there are {', '.join(sorted(set(values)))}"
            )
        return self[rows]

    @property
    def cells(self) -> np.ndarray:
        """Numbers from 0 [n]; runs of equal N and D, so twins and seeds, share one."""
        keys = [f"{n:.6g} {d:.6g}" for n, d in zip(self.N, self.D, strict=True)]
        return np.unique(keys, return_inverse=True)[1]

    @property
    def arms(self) -> tuple[str, ...]:
        """The names in the table: float first, then by name."""
        return tuple(sorted({str(a) for a in self.arm}, key=lambda a: (a != "float", a)))


def read_runs(path: Path) -> Runs:
    """The finished runs of a CSV with columns N, D, loss, and any of arm, seed, ended, tokenizer,
    validation, data, loss_se, embedding_parameters and status (only finished ones are read).

    The points of Chinchilla's figure 4 as Epoch AI read them off (arXiv 2404.10102) are known by
    their columns `Model Size` and `Training FLOP`; D is FLOP / (6 N).

    Raises:
        ValueError: no rows, a column that is missing, a cell that is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [r for r in reader if (r.get("status") or FINISHED) == FINISHED]
            columns = set(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table of runs: {error}") from None
    if set(COLUMNS) <= columns:  # of `bitjax scale run`: everything in it is checked
        done = [row for row in read_table(path) if row.status == FINISHED]
        if not done:
            raise ValueError(f"{path} has no finished runs")
        return Runs.of(**{f.name: [getattr(row, f.name) for row in done] for f in fields(Runs)})
    if {"Model Size", "Training FLOP", "loss"} <= columns:
        N, flops = _numbers(path, rows, "Model Size"), _numbers(path, rows, "Training FLOP")
        return Runs.of(N, flops / (6 * N), _numbers(path, rows, "loss"))
    if missing := [name for name in ("N", "D", "loss") if name not in columns]:
        raise ValueError(f"{path} has no column {missing[0]!r}; a table of runs has N, D and loss")
    if not rows:
        raise ValueError(f"{path} has no finished runs")
    others: dict[str, object] = {
        name: np.array([r[name] or "" for r in rows])
        for name in ("arm", "tokenizer", "validation", "data") if name in columns
    }  # fmt: skip
    if "ended" in columns:
        others["ended"] = np.array([(r["ended"] or "").lower() in ("true", "1") for r in rows])
    if "seed" in columns:
        seeds = _numbers(path, rows, "seed")
        others["seed"] = np.where(np.isnan(seeds), -1, seeds).astype(int)
    for name in ("loss_se", "embedding_parameters"):
        if name in columns:
            others[name] = _numbers(path, rows, name)
    N, D, loss = (_numbers(path, rows, name) for name in ("N", "D", "loss"))
    return Runs.of(N, D, loss, **others)


def without_highest(runs: Runs, count: int) -> Runs:
    """Runs without those of the `count` highest losses."""
    if not 0 <= count < len(runs):
        raise ValueError(f"{count} of {len(runs)} runs cannot be left out")
    return runs[np.sort(np.argsort(runs.loss)[: len(runs) - count])]


def _numbers(path: Path, rows: list[dict[str, str]], column: str) -> np.ndarray:
    values = []
    for row, cells in enumerate(rows, 1):
        try:
            values.append(math.nan if cells[column] == "" else float(cells[column]))
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}, run {row}: {column} is {cells[column]!r}, not a number"
            ) from None
    return np.array(values)


def check_runs(runs: Runs, parameters: int) -> None:
    """Refuse what no law should be fitted to.

    Args:
        parameters: of the law.

    Raises:
        ValueError: no more runs than parameters; a loss, N or D that is not a positive number;
            several tokenizers, held-out sets or corpora.
    """
    for name in ("N", "D", "loss"):
        values = getattr(runs, name)
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise ValueError(
                f"run {bad[0] + 1} of the table has {name} {values[bad[0]]:g}; leave out runs that "
                "diverged or did not finish"
            )
    for name, said in (
        ("tokenizer", "tokenizers"), ("validation", "held-out sets"), ("data", "corpora"),
    ):  # fmt: skip
        known = sorted({str(v) for v in getattr(runs, name)})
        if len(known) > 1:
            raise ValueError(
                f"the runs have {len(known)} {said} ({', '.join(repr(v) for v in known)}), whose "
                f"losses do not compare; choose one with --where {name}=VALUE"
            )
    if len(runs) <= parameters:
        raise ValueError(f"{len(runs)} runs are too few for a law of {parameters} parameters")
    for arm in runs.arms:
        sizes, tokens = (_distinct(values[runs.arm == arm]) for values in (runs.N, runs.D))
        if sizes < 2 or tokens < 2:
            raise ValueError(
                f"arm {arm or 'of the table'!r} has {sizes} sizes and {tokens} token counts; a law "
                "in N and D needs two or more of each"
            )


def design_warnings(
    runs: Runs, jacobian: np.ndarray, exponents: Mapping[str, float] | None = None
) -> list[str]:
    """Sentences on what the runs cannot tell apart.

    Args:
        jacobian: [n, P] derivatives of log loss at the fit.
        exponents: of the fit, alpha and beta.
    """
    said = []
    sizes = _distinct(runs.N)
    if sizes < MIN_SIZES:
        said.append(f"{sizes} sizes: the exponent of N is hardly known; plan {MIN_SIZES} or more")
    correlation = abs(collinearity(runs.N, runs.D) or 0.0)
    if correlation > MAX_CORRELATION:
        said.append(
            f"log N and log D are collinear (correlation {correlation:.3f}): alpha and beta cannot "
            "be told apart; vary the tokens per parameter"
        )
    condition = condition_number(jacobian)
    if condition > MAX_CONDITION:
        said.append(
            f"the design is nearly singular (condition number {condition:.1e} of the standardised "
            "derivatives): some parameters are hardly known"
        )
    for name, value in (exponents or {}).items():
        if value <= 0:
            said.append(
                f"{name} is {value:.3g}: by this fit more parameters or tokens make no loss better"
            )
    if early := int((~runs.ended).sum()):
        said.append(
            f"{early} of {len(runs)} runs are not at the end of their schedule: losses before the "
            "learning rate has decayed overstate what training gives"
        )
    return said


def collinearity(N: Sequence[float] | np.ndarray, D: Sequence[float] | np.ndarray) -> float | None:
    """Correlation of log N and log D; None where either does not vary.

    Where it is near 1 or -1 a fit cannot tell parameters from tokens.
    """
    n, d = np.log(N), np.log(D)
    if min(np.ptp(n), np.ptp(d)) < 1e-9:
        return None
    return float(np.corrcoef(n, d)[0, 1])


def _distinct(values: np.ndarray) -> int:
    """How many differ by a thousandth or more."""
    return len(np.unique(np.round(np.log(values), 3)))


def condition_number(jacobian: np.ndarray) -> float:
    """Of the columns scaled to length 1, which takes their units out."""
    lengths = np.linalg.norm(jacobian, axis=0)
    if not lengths.all():
        return math.inf
    return float(np.linalg.cond(jacobian / lengths))
