"""Tables of README.md, and all figures, from table.csv, sweeps.csv and curves/ alone.

    python experiments/scaling/report.py

Gaps are of twins: an arm's loss minus the float run's of the same size, tokens and seed, nats per
byte. Their standard error is over held-out documents, pair by pair; where a cell has several seeds
the mean has a 95 % interval of Student's t over seeds as well.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from scipy import stats

from bitjax.cli import main as bitjax
from bitjax.scaling.sweep import best_rate, read_sweeps
from bitjax.scaling.table import Row, read_table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from parity import parities

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
FIT_ARMS = ("float", "ternary")


def documents(row: Row) -> tuple[list[int], list[float]]:
    """Tokens and nats of each held-out document."""
    held = json.loads((HERE / row.curve).read_text(encoding="utf-8"))["documents"]
    return held["tokens"], held["nats"]


def paired_error(row: Row, twin: Row) -> float:
    """Standard error over documents of the difference of two losses."""
    tokens, nats = documents(row)
    _, others = documents(twin)
    total, n = sum(tokens), len(tokens)
    differences = [a - b for a, b in zip(nats, others, strict=True)]
    mean = sum(differences) / total
    squares = sum((d - mean * t) ** 2 for d, t in zip(differences, tokens, strict=True))
    return math.sqrt(squares * n / (n - 1)) / total


def pairs(rows: Iterable[Row], arm: str) -> dict[tuple[int, int, int], list[tuple[Row, Row]]]:
    """(N, layers, D) -> an arm's run and its float twin, for each seed."""
    rows = list(rows)
    twins = {(r.N, r.num_layers, r.D, r.seed): r for r in rows if r.arm == "float"}
    found: dict[tuple[int, int, int], list[tuple[Row, Row]]] = {}
    for row in rows:
        twin = twins.get((row.N, row.num_layers, row.D, row.seed))
        if row.arm == arm and twin is not None:
            found.setdefault((row.N, row.num_layers, row.D), []).append((row, twin))
    return dict(sorted(found.items()))


def gap(both: list[tuple[Row, Row]]) -> str:
    """Mean difference; error over documents (of the mean), and the interval over seeds."""
    differences = [row.loss - twin.loss for row, twin in both]
    errors = [paired_error(row, twin) for row, twin in both]
    mean = statistics.fmean(differences)
    text = f"{mean:+.4f} ± {max(errors):.4f}"
    if len(both) > 1:
        reach = float(stats.t.ppf(0.975, len(both) - 1))
        half = reach * statistics.stdev(differences) / math.sqrt(len(both))
        text += f" (95 %: {mean - half:+.4f} to {mean + half:+.4f})"
    return text


def mean_loss(rows: Iterable[Row]) -> str:
    return f"{statistics.fmean(r.loss for r in rows):.4f}"


def twins_table(rows: list[Row]) -> list[str]:
    lines = ["| N | D | D/N | seeds | float | ternary | gap |", "|---|---|---|---|---|---|---|"]
    for (N, _, D), both in pairs(rows, "ternary").items():
        ternary, twins = zip(*both, strict=True)
        lines.append(
            f"| {N:,} | {D:,} | {D / N:.0f} | {len(both)} | {mean_loss(twins)} | "
            f"{mean_loss(ternary)} | {gap(both)} |"
        )
    return lines


def arms_table(rows: list[Row]) -> list[str]:
    arms = [arm for arm in dict.fromkeys(r.arm for r in rows) if arm not in FIT_ARMS]
    lines = ["| arm | N | D/N | loss | minus float's |", "|---|---|---|---|---|"]
    for arm in arms:
        for (N, _, D), both in pairs(rows, arm).items():
            loss = mean_loss(row for row, _ in both)
            lines.append(f"| {arm} | {N:,} | {D / N:.0f} | {loss} | {gap(both)} |")
    return lines


def parity_table(rows: list[Row]) -> list[str]:
    lines = [
        "| N | D/N | loss | parameters | width | bytes, of bf16 | of int4 | joules |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in parities(rows, documents):
        low, high = (p.factor * math.exp(sign * 1.96 * p.error) for sign in (-1, 1))
        lines.append(
            f"| {p.N:,} | {p.D / p.N:.0f} | {p.loss:.4f} | {p.factor:.2f} ({low:.2f}-{high:.2f}) | "
            f"{math.sqrt(p.factor):.2f} | {p.bytes_of['bf16']:.2f} | {p.bytes_of['int4']:.2f} | "
            f"{p.joules:.3f} |"
        )
    return lines


def sweeps_table() -> list[str]:
    trials = read_sweeps(HERE / "sweeps.csv")
    lines = ["| size | arm | tokens | learning rate: loss | chosen |", "|---|---|---|---|---|"]
    for size, arm in dict.fromkeys((t.size, t.arm) for t in trials):
        own = [t for t in trials if (t.size, t.arm) == (size, arm)]
        shown = ", ".join(f"{t.learning_rate:g}: {t.loss:.4f}" for t in own)
        best = best_rate({t.learning_rate: t.loss for t in own})
        lines.append(f"| {size} | {arm} | {own[0].tokens:,} | {shown} | {best:g} |")
    return lines


def main() -> int:
    rows = read_table(HERE / "table.csv")
    hours = sum(row.seconds for row in rows) / 3600
    parts = [
        f"{len(rows)} runs so far, {hours:.1f} hours of one core.", "",
        "Twins, nats per byte:", "", *twins_table(rows), "",
        "Other arms, against the float run of the same cell:", "", *arms_table(rows), "",
        "A ternary model of the same loss as a float one, after the same tokens, by interpolation "
        "between runs (`parity.py`): its parameters, width at the same depth, layers' bytes at 1.6 "
        "bits and joules of the layers' arithmetic (modelled), each divided by the float model's; "
        "95 % over held-out documents:",
        "", *parity_table(rows), "",
        "Learning rates:", "", *sweeps_table(),
    ]  # fmt: skip
    readme = HERE / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n" + "\n".join(parts) + f"\n{END}{after}", encoding="utf-8")
    fit = HERE / "fit.json"
    table = str(HERE / "table.csv")
    if code := bitjax(["scale", "fit", table, "--arms", *FIT_ARMS, "-o", str(fit)]):
        return code
    return bitjax(["scale", "plot", str(fit), "-o", str(HERE / "figures")])


if __name__ == "__main__":
    sys.exit(main())
