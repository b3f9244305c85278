"""Curves of runs as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Records = Sequence[Mapping[str, Any]]  # of metrics.jsonl
STYLES = ("-", "--", "-.", ":")


def plot_losses(path: Path, runs: Mapping[str, Records], token: str = "byte") -> None:
    """Write training (line) and validation (markers) curves in bits per token as a PNG.

    Args:
        path: of the PNG.
        runs: label -> records of `metrics.jsonl`.
        token: what the runs' tokens are called.
    """
    figure, axes = _figure()
    for i, (label, records) in enumerate(runs.items()):
        style = STYLES[i % len(STYLES)]
        bits = [(r["step"], r["loss"] / math.log(2)) for r in records]
        held = [(r["step"], r["valid_loss"] / math.log(2)) for r in records if "valid_loss" in r]
        (line,) = axes.plot(*zip(*bits, strict=True), style, linewidth=1.2, label=f"{label}, train")
        axes.plot(
            *zip(*held, strict=True), "o", color=line.get_color(), markersize=5,
            markerfacecolor="white" if style != "-" else None, label=f"{label}, held out",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel=f"bits per {token}", title="Training loss")
    highest = max(r["loss"] for records in runs.values() for r in records[len(records) // 20 :])
    axes.set_ylim(top=highest / math.log(2) * 1.02)
    _write(figure, axes, path)


def plot_quantity(
    path: Path, runs: Mapping[str, Records], quantity: str = "loss", smoothing: float = 0.0
) -> None:
    """Write one quantity of several runs over their steps as a PNG; raw points stay faintly seen.

    Args:
        path: of the PNG; another ending chooses another format of matplotlib's.
        runs: label -> records of `metrics.jsonl`.
        quantity: a field of `bitjax.train.Report` ("loss", "valid_loss", "flip_rate", "mfu", ...),
            or `FIELD/LAYER` of its layers ("flips/blocks.0.ffn.down").
        smoothing: weight w in 0..1 of `smoothed`.

    Raises:
        ValueError: no run has the quantity, a weight out of range, an unknown kind of picture.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must be 0 or more and below 1")
    curves = {label: series(records, quantity) for label, records in runs.items()}
    for label, (steps, _) in curves.items():
        if not steps:
            raise ValueError(f"{label} has no {quantity!r}; it has {', '.join(known(runs[label]))}")
    figure, axes = _figure()
    for i, (label, (steps, values)) in enumerate(curves.items()):
        style = STYLES[i // 10 % len(STYLES)]  # matplotlib has ten colours
        smooth = smoothed(values, smoothing)
        (line,) = axes.plot(steps, smooth, style, linewidth=1.4, label=label)
        if smoothing:
            axes.plot(steps, values, style, color=line.get_color(), linewidth=0.7, alpha=0.3)
    unit = ", nats per token" if quantity in ("loss", "valid_loss") else ""
    axes.set(xlabel="step", ylabel=f"{quantity}{unit}")
    _write(figure, axes, path)


def series(records: Records, quantity: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have the quantity."""
    field, _, layer = quantity.partition("/")
    found = [
        (r["step"], r.get("layers", {}).get(layer, {}).get(field) if layer else r.get(field))
        for r in records
    ]
    kept = [(step, float(x)) for step, x in found if isinstance(x, int | float)]
    return [step for step, _ in kept], [x for _, x in kept]


def known(records: Records) -> list[str]:
    """Names of the quantities in records, those of layers as a pattern."""
    fields = {name for r in records for name in r} - {"step", "layers"}
    of_layers = {f"{f}/LAYER" for r in records for x in r.get("layers", {}).values() for f in x}
    return sorted(fields) + sorted(of_layers)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without the pull towards zero at its start.

        s[t] = sum over i <= t of w^(t-i) x[i]  /  sum over i <= t of w^(t-i)

    A value that is not finite is left as it is and out of the sums.
    """
    total = norm = 0.0
    result = []
    for x in values:
        if not math.isfinite(x):
            result.append(x)
            continue
        total, norm = weight * total + x, weight * norm + 1
        result.append(total / norm)
    return result


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(7, 4.2), layout="constrained")


def _write(figure: Any, axes: Any, path: Path) -> None:
    from matplotlib import pyplot

    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
