"""How much larger a ternary model is that loses no more than its float twin, read off between runs.

No law is fitted. At the tokens D of a float cell, the ternary loss of each size is interpolated in
log D between that size's runs, and the size of equal loss in log N between sizes. Where the runs do
not enclose it, nothing is said. The error is that of the losses over held-out documents, which all
runs share, divided by the slope; seeds are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bitjax.bench.energy import product_joules, ternary_joules
from bitjax.scaling.shapes import INT4_BITS, stored_bits
from bitjax.scaling.table import Row

Held = tuple[Sequence[int], Sequence[float]]  # tokens and nats of each held-out document
WITHIN = 1.05  # sizes are whole heads: D may be so far beyond the ends of a size's runs


@dataclass(frozen=True)
class Parity:
    """A float cell and its ternary equal.

    Attributes:
        N, D: parameters and tokens of the float run.
        loss: its loss, nats per token.
        factor: ternary parameters for the same loss, divided by N.
        error: standard error of the factor's logarithm.
        joules: of the layers' arithmetic for a token, ternary divided by float.
    """

    N: int
    D: int
    loss: float
    factor: float
    error: float
    joules: float

    @property
    def bytes_of(self) -> dict[str, float]:
        """Bytes of the layers at the fewest bits, divided by the float model's in 16 and 4 bits."""
        bits = stored_bits("ternary")[0]
        return {"bf16": self.factor * bits / 16, "int4": self.factor * bits / INT4_BITS}


class _Cell:
    """Runs of one size and number of tokens, averaged over seeds."""

    def __init__(self, rows: Sequence[Row], documents: Callable[[Row], Held]) -> None:
        self.N, self.D, self.first = rows[0].N, rows[0].D, rows[0]
        self.loss = float(np.mean([row.loss for row in rows]))
        held = [documents(row) for row in rows]
        self.tokens = np.asarray(held[0][0], float)
        self.nats = np.mean([nats for _, nats in held], axis=0)


def parities(rows: Iterable[Row], documents: Callable[[Row], Held]) -> list[Parity]:
    """Of every float cell whose equal lies between ternary runs; by N, then D."""
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.N, row.D), []).append(row)
    cells = {key: _Cell(group, documents) for key, group in groups.items()}
    sizes = sorted({N for arm, N, _ in cells if arm == "ternary"})
    series = {N: _of_size(cells, N) for N in sizes}
    found = []
    for (arm, _, _), cell in sorted(cells.items(), key=lambda item: item[0]):
        if arm == "float" and (equal := _equal(cell, series)):
            found.append(equal)
    return found


def _of_size(cells: dict[tuple[str, int, int], _Cell], N: int) -> list[_Cell]:
    own = [cell for (arm, n, _), cell in cells.items() if arm == "ternary" and n == N]
    return sorted(own, key=lambda cell: cell.D)


def _equal(cell: _Cell, series: dict[int, list[_Cell]]) -> Parity | None:
    at = {}  # ternary size -> the mixture of its runs that stands for D
    for N, runs in series.items():
        if (mixture := _mixture([run.D for run in runs], cell.D)) is not None:
            at[N] = [(share, runs[i]) for i, share in mixture]
    losses = {N: sum(share * run.loss for share, run in mixture) for N, mixture in at.items()}
    for small, large in zip(list(losses), list(losses)[1:], strict=False):
        if losses[small] >= cell.loss >= losses[large] < losses[small]:
            share = (losses[small] - cell.loss) / (losses[small] - losses[large])
            log_N = math.log(small) + share * math.log(large / small)
            factor = math.exp(log_N) / cell.N
            parts = [((1 - share) * s, run) for s, run in at[small]]
            parts += [(share * s, run) for s, run in at[large]]
            slope = (losses[small] - losses[large]) / math.log(large / small)
            error = _error(cell, parts) / slope
            return Parity(cell.N, cell.D, cell.loss, factor, error, _joules(cell.first, factor))
    return None


def _mixture(tokens: list[int], D: int) -> list[tuple[int, float]] | None:
    """Indices and shares of the runs that D lies between, in log D; None outside."""
    for i, held in enumerate(tokens):
        if max(held, D) <= WITHIN * min(held, D):
            return [(i, 1.0)]
    for i in range(len(tokens) - 1):
        if tokens[i] < D < tokens[i + 1]:
            share = math.log(D / tokens[i]) / math.log(tokens[i + 1] / tokens[i])
            return [(i, 1 - share), (i + 1, share)]
    return None


def _error(cell: _Cell, parts: list[tuple[float, _Cell]]) -> float:
    """Standard error over documents of the mixture's loss minus the cell's."""
    differences = sum(share * run.nats for share, run in parts) - cell.nats
    tokens, n = cell.tokens, len(cell.tokens)
    rest = differences - differences.sum() / tokens.sum() * tokens
    return float(math.sqrt((rest**2).sum() * n / (n - 1)) / tokens.sum())


def _joules(row: Row, factor: float) -> float:
    """Of layers as many times wider as gives the factor, per parameter and altogether."""
    h = float(row.hidden_size)
    F = (row.N / row.num_layers - 4 * h * h) / (3 * h)

    def layers(product: Callable[[float, float], float], times: float) -> float:
        a, b = h * times, F * times
        return row.num_layers * (4 * product(a, a) + 2 * product(b, a) + product(a, b))

    return layers(ternary_joules, math.sqrt(factor)) / layers(product_joules, 1.0)
