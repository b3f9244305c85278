"""Learning rates: a small grid of short runs for every size and arm, kept as a table.

The grid grows where its best rate is at an edge, so a chosen rate has worse ones on both sides
unless `extensions` ran out. Divergence counts as an infinite loss.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitjax.replacing import replace_text

COLUMNS = (
    "size", "arm", "tokens", "learning_rate", "loss", "loss_se", "status", "chosen", "seconds",
)  # fmt: skip
Tried = Mapping[float, float]  # learning rate -> nats per held-out token; infinite: it diverged


@dataclass(frozen=True)
class Trial:
    """One short run of a sweep; `loss` is infinite if it diverged."""

    size: str
    arm: str
    tokens: int
    learning_rate: float
    loss: float
    loss_se: float
    seconds: float


def next_rates(tried: Tried, grid: Sequence[float], extensions: int) -> list[float]:
    """Rates to try next; none if the best is known.

    Args:
        tried: so far.
        grid: ascending, in equal factors or nearly so.
        extensions: how many rates may be added to it.

    Raises:
        ValueError: every rate diverged, and no more may be added.
    """
    missing = [rate for rate in grid if rate not in tried]
    if missing:
        return missing
    rates = sorted(tried)
    left = extensions - (len(rates) - len(grid))
    best = best_rate(tried)
    if math.isinf(tried[best]):
        if left <= 0:
            raise ValueError(f"every learning rate from {rates[0]:g} to {rates[-1]:g} diverged")
        return [_tidy(rates[0] * grid[0] / grid[1])]
    if left > 0 and best == rates[0]:
        return [_tidy(best * grid[0] / grid[1])]
    if left > 0 and best == rates[-1]:
        return [_tidy(best * grid[-1] / grid[-2])]
    return []


def _tidy(rate: float) -> float:
    return float(f"{rate:.6g}")


def best_rate(tried: Tried) -> float:
    """The rate of the lowest loss; of equal ones the lowest."""
    return min(tried, key=lambda rate: (tried[rate], rate))


def write_sweeps(path: Path, trials: Sequence[Trial]) -> None:
    """Write all trials, those of a size and arm together, the best of them marked."""
    made = io.StringIO()
    out = csv.writer(made, lineterminator="\n")
    out.writerow(COLUMNS)
    for trial in trials:
        rest = {
            t.learning_rate: t.loss for t in trials if (t.size, t.arm) == (trial.size, trial.arm)
        }
        diverged = math.isinf(trial.loss)
        chosen = not diverged and trial.learning_rate == best_rate(rest)
        values = ["", ""] if diverged else [trial.loss, trial.loss_se]
        out.writerow([
            trial.size, trial.arm, trial.tokens, trial.learning_rate, *values,
            "diverged" if diverged else "finished", str(chosen).lower(), trial.seconds,
        ])  # fmt: skip
    replace_text(path, made.getvalue())


def read_sweeps(path: Path) -> list[Trial]:
    """The trials of a table; none if there is none.

    Raises:
        ValueError: a damaged line, naming it.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as damage:
        raise ValueError(f"{path} is not UTF-8 text: {damage.reason}") from None
    lines = csv.reader(io.StringIO(text), strict=True)
    found = []
    try:
        if next(lines, None) != list(COLUMNS):
            raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
        for fields in lines:
            if len(fields) != len(COLUMNS):
                raise ValueError(f"{len(fields)} fields instead of {len(COLUMNS)}")
            size, arm, tokens, rate, loss, error, status, _, seconds = fields
            if status not in ("finished", "diverged"):
                raise ValueError(f"status {status!r:.20}")
            failed = status == "diverged"
            trial = Trial(
                size, arm, int(tokens), float(rate), math.inf if failed else float(loss),
                0.0 if failed else float(error), float(seconds),
            )  # fmt: skip
            if not failed and not 0 < trial.loss < math.inf:
                raise ValueError(f"loss {loss}")
            found.append(trial)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {max(1, lines.line_num)}: {error}") from None
    return found
