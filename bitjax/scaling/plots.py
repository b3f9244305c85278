"""Figures of a fit, as PNG and SVG: arms differ by line and marker, so black and white will do.

Losses are nats per token. Bands are 95 % of the ensemble's draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitjax.scaling.ensemble import Ensemble
from bitjax.scaling.predict import TOKENS_PER_PARAMETER
from bitjax.scaling.published import points
from bitjax.scaling.runs import Runs
from bitjax.scaling.shapes import (
    INT4_BITS,
    INT8_ACTIVATIONS,
    VOCABULARY,
    model_bytes,
    stored_bits,
    token_joules,
)

ENDINGS = ("png", "svg")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREYS = ("0.0", "0.35", "0.5", "0.2", "0.6", "0.45")
POINTS = 60  # of a curve
BEYOND = 1e11  # parameters: how far gap and frontiers are drawn


class Style(NamedTuple):
    """Of an arm."""

    line: Any
    marker: str
    colour: str


def plot_fit(
    folder: Path, runs: Runs, ensemble: Ensemble, ratio: float = TOKENS_PER_PARAMETER,
    vocabulary: int = VOCABULARY,
) -> list[Path]:  # fmt: skip
    """Write every figure into a folder; returns the files.

    Args:
        ratio: tokens per parameter of curves that go beyond the runs.
        vocabulary: rows of the embedding that bytes and joules include.

    Raises:
        ValueError: the folder cannot be written.
    """
    styles = {
        arm: Style(LINES[i % len(LINES)], MARKERS[i % len(MARKERS)], GREYS[i % len(GREYS)])
        for i, arm in enumerate(ensemble.arms)
    }
    drawn: dict[str, Callable[[Any], None]] = {
        "loss-parameters": lambda axes: _losses(axes, runs, ensemble, styles, "N"),
        "loss-tokens": lambda axes: _losses(axes, runs, ensemble, styles, "D"),
        "loss-compute": lambda axes: _compute(axes, runs, ensemble, styles),
    }
    if len(ensemble.arms) > 1:
        drawn["gap"] = lambda axes: _gap(axes, runs, ensemble, styles, ratio)
    drawn["equal-memory"] = lambda axes: _memory(axes, runs, ensemble, styles, ratio, vocabulary)
    drawn["equal-energy"] = lambda axes: _energy(axes, runs, ensemble, styles, ratio, vocabulary)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [path for name, draw in drawn.items() for path in _figure(folder / name, draw)]
    except OSError as error:
        raise ValueError(f"cannot write figures to {folder}: {error.strerror}") from None


def _figure(path: Path, draw: Callable[[Any], None]) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "bitjax", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(5.6, 3.8), layout="constrained")
        try:
            draw(axes)
            axes.grid(alpha=0.25, linewidth=0.5)
            axes.legend(fontsize=7)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # found once, for both files
            files = [path.with_name(f"{path.name}.{ending}") for ending in ENDINGS]
            for file in files:  # no date: the same fit gives the same bytes
                figure.savefig(
                    file, dpi=200, metadata={"Date": None} if file.suffix == ".svg" else {}
                )
        finally:
            pyplot.close(figure)
    return files


def _losses(axes: Any, runs: Runs, ensemble: Ensemble, styles: dict[str, Style], of: str) -> None:
    """Loss over N or D; a curve and its band for each arm at the smallest and the largest of the
    other one."""
    x, other = (runs.N, runs.D / runs.N) if of == "N" else (runs.D, runs.N)
    grid = np.geomspace(x.min() / 1.5, x.max() * 3, POINTS)
    held = (other.min(), other.max())
    for arm, style in styles.items():
        mine = runs.arm == arm
        axes.plot(
            x[mine], runs.loss[mine], style.marker, color=style.colour, markersize=4,
            markerfacecolor="white", markeredgewidth=0.8, label=f"{arm}: runs",
        )  # fmt: skip
        for k, value in enumerate(held):
            N, D = (grid, grid * value) if of == "N" else (np.full(POINTS, value), grid)
            said = f"{value:,.0f} tokens/parameter" if of == "N" else f"{_short(value)} parameters"
            _curve(
                axes, grid, ensemble.losses(N, D, arm), style, f"{arm}: law, {said}", 1.0 + 0.8 * k
            )
    axes.set(
        xscale="log", yscale="log", ylabel="held-out loss (nats per token)",
        xlabel="non-embedding parameters N" if of == "N" else "training tokens D",
    )  # fmt: skip
    _plain(axes)


def _compute(axes: Any, runs: Runs, ensemble: Ensemble, styles: dict[str, Style]) -> None:
    """Loss over 6 N D, and the lowest loss that a law allows for it."""
    flops = 6 * runs.N * runs.D
    grid = np.geomspace(flops.min() / 2, flops.max() * 10, POINTS)
    sizes = np.geomspace(runs.N.min() / 10, runs.N.max() * 30, 80)
    for arm, style in styles.items():
        mine = runs.arm == arm
        axes.plot(
            flops[mine], runs.loss[mine], style.marker, color=style.colour, markersize=4,
            markerfacecolor="white", markeredgewidth=0.8, label=f"{arm}: runs",
        )  # fmt: skip
        every = [ensemble.losses(sizes, c / (6 * sizes), arm).min(1) for c in grid]
        _curve(axes, grid, np.stack(every, 1), style, f"{arm}: best size", 1.4)
    axes.set(
        xscale="log", yscale="log", xlabel="training FLOPs, 6 N D",
        ylabel="held-out loss (nats per token)",
    )  # fmt: skip
    _plain(axes)


def _gap(axes: Any, runs: Runs, ensemble: Ensemble, styles: dict[str, Style], ratio: float) -> None:
    """Relative gap to the reference over N; twins that were run, and what others published."""
    from bitjax.scaling.compare import twins

    reference = ensemble.arms[0]
    grid = np.geomspace(runs.N.min() / 1.5, BEYOND, POINTS)
    base = ensemble.losses(grid, ratio * grid, reference)
    pairs = twins(runs, reference)
    for arm in ensemble.arms[1:]:
        style = styles[arm]
        own = [(i, j) for i, j in pairs if runs.arm[i] == arm]
        axes.plot(
            [runs.N[i] for i, _ in own],
            [100 * math.log(runs.loss[i] / runs.loss[j]) for i, j in own],
            style.marker, color=style.colour, markersize=4, markerfacecolor="white",
            markeredgewidth=0.8, label=f"{arm}: twins",
        )  # fmt: skip
        gap = 100 * np.log(ensemble.losses(grid, ratio * grid, arm) / base)
        _curve(axes, grid, gap, style, f"{arm}: law, {ratio:g} tokens/parameter", 1.4)
    if "ternary" in ensemble.arms:
        for source, marker in zip(dict.fromkeys(p.source for p in points()), "*+x", strict=False):
            of = [p for p in points() if p.source == source]
            axes.plot(
                [p.N for p in of], [100 * p.relative for p in of], marker, color="0.0",
                markersize=6, label=f"published: {source}",
            )  # fmt: skip
    axes.axhline(0, color="0.0", linewidth=0.6)
    axes.axvspan(runs.N.min(), runs.N.max(), color="0.9", zorder=0, label="sizes that were run")
    axes.set(
        xscale="log", xlabel="non-embedding parameters N",
        ylabel=f"loss above {reference or 'reference'} (%)",
    )  # fmt: skip


def _memory(
    axes: Any, runs: Runs, ensemble: Ensemble, styles: dict[str, Style], ratio: float,
    vocabulary: int,
) -> None:  # fmt: skip
    """Loss over bytes of weights and embedding."""
    grid = np.geomspace(runs.N.min(), BEYOND, POINTS)
    for arm, style in styles.items():
        losses = ensemble.losses(grid, ratio * grid, arm)
        for k, bits in enumerate(stored_bits(arm)):
            weights = [model_bytes(N, bits, vocabulary) for N in grid]
            _curve(axes, weights, losses, style, f"{arm}, {bits:g} bits", 1.4 - 0.7 * k)
        if arm == "float" and "ptq_int4" not in styles:
            weights = [model_bytes(N, INT4_BITS, vocabulary) for N in grid]
            rounded = Style((0, (1, 1)), "", "0.3")
            _curve(axes, weights, losses, rounded, "float in 4 bits, were nothing lost", 1.4, False)
    axes.set(xlabel="bytes of weights and embedding", **_frontier(ratio))
    _plain(axes)


def _energy(
    axes: Any, runs: Runs, ensemble: Ensemble, styles: dict[str, Style], ratio: float,
    vocabulary: int,
) -> None:  # fmt: skip
    """Loss over joules of a token's arithmetic."""
    grid = np.geomspace(runs.N.min(), BEYOND, POINTS)
    for arm, style in styles.items():
        joules = [token_joules(N, arm, vocabulary) for N in grid]
        kind = "int8 additions" if arm in INT8_ACTIVATIONS else "float16"
        _curve(axes, joules, ensemble.losses(grid, ratio * grid, arm), style, f"{arm}, {kind}", 1.4)
    axes.set(xlabel="joules of a token's arithmetic, modelled at 7 nm", **_frontier(ratio))
    _plain(axes)


def _frontier(ratio: float) -> dict[str, str]:
    label = f"loss after {ratio:g} tokens per parameter (nats)"
    return {"xscale": "log", "yscale": "log", "ylabel": label}


def _curve(
    axes: Any, x: Sequence[float] | np.ndarray, values: np.ndarray, style: Style, label: str,
    width: float, band: bool = True,
) -> None:  # fmt: skip
    """Best values and band of [1 + R, n]."""
    axes.plot(x, values[0], linestyle=style.line, color=style.colour, linewidth=width, label=label)
    if band:
        low, high = np.nanquantile(values[1:], [0.025, 0.975], axis=0)
        axes.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)


def _plain(axes: Any) -> None:
    """Losses as 2.5, not 10^0.4."""
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    axes.yaxis.set_major_formatter(FormatStrFormatter("%.3g"))
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(
        FormatStrFormatter("%.3g") if high < 8 * low else NullFormatter()
    )


def _short(count: float) -> str:
    """1.3M, 7B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"
