"""Tables of fits and predictions for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitjax import terminal
from bitjax.config.prices import Prices
from bitjax.scaling.compare import Standing
from bitjax.scaling.ensemble import Estimate, estimates
from bitjax.scaling.fit import Fit
from bitjax.scaling.fit_file import FitFile
from bitjax.scaling.intervals import profile
from bitjax.scaling.isoflop import frontiers, parabolas
from bitjax.scaling.laws import Law
from bitjax.scaling.predict import closing, costs, next_runs, predict
from bitjax.scaling.published import confront, published

CANDIDATES = 5  # of the next experiment, shown
BEYOND_RUNS = 4  # times the largest size: as far as the next experiment may go
BUDGET = 10  # times the largest run's FLOPs: of the next experiment, unless given


@dataclass(frozen=True)
class Question:
    """What is predicted: an arm, sizes and tokens [n] each, tolerance in nats, vocabulary."""

    arm: str
    N: list[float]
    D: list[float]
    tolerance: float
    vocabulary: int

    @property
    def target(self) -> tuple[float, float]:
        """The largest size and its tokens."""
        return max(zip(self.N, self.D, strict=True))


def print_fit(fit: FitFile, standings: Sequence[Standing], profiles: bool) -> None:
    """Which laws the runs speak for, and the parameters of the first."""
    cells, sizes = len(np.unique(fit.runs.cells)), len(np.unique(fit.runs.N))
    rows = [
        (
            s.fit.law.form, len(s.fit.theta), f"{s.fit.objective:.8g}",
            f"{s.aicc - standings[0].aicc:.1f}",
            f"{s.bic - min(x.bic for x in standings):.1f}", f"{s.weight:.3f}",
            _percent(s.held_out), _percent(s.held_out_gap), "{} of {}".format(*s.fit.starts),
        )
        for s in standings
    ]  # fmt: skip
    terminal.table(
        ("law", "parameters", "summed Huber", "AICc", "BIC", "weight", "held-out loss off by",
         "held-out gap off by", "starts that agree"),
        rows, f"{len(fit.runs)} runs, {cells} cells of N and D, {sizes} sizes",
    )  # fmt: skip
    best = standings[0].fit
    member = fit.ensemble.members[0]
    natural = best.law.natural(np.concatenate([best.theta[None], member.draws]))
    columns = ["parameter", "best", "standard error", "95 % interval"]
    columns += ["95 % by profile"] if profiles else []
    terminal.table(
        columns,
        [
            (name, f"{values[0]:.6g}", f"{values[1:].std():.4g}",
             _interval(estimates(values[:, None])[0]),
             *([_profiled(best, name)] if profiles else []))
            for name, values in natural.items()
        ],
        f"{best.law.form}: log loss is {member.noise:.2%} off the law (1 sd); bootstrap over "
        f"{fit.resampling}, {len(member.draws):,} resamples",
    )  # fmt: skip


def _profiled(fit: Fit, name: str) -> str:
    if name.endswith("]") and "power" in name:  # of either sign
        low, high, _ = profile(fit, lambda theta: fit.law.natural(theta)[name])
        return _interval(Estimate(math.nan, low, high))
    low, high, _ = profile(fit, lambda theta: natural_log(fit.law, name, theta))
    return _interval(Estimate(math.nan, *np.exp([low, high]).tolist()))


def natural_log(law: Law, name: str, theta: np.ndarray) -> np.ndarray:
    """Logarithm of a natural parameter [R]: closer to normal, and A and B span decades."""
    with np.errstate(invalid="ignore"):
        return np.log(law.natural(theta)[name])


def print_parabolas(fit: FitFile) -> None:
    """IsoFLOP parabolas, and how the best size grows by them and by the law."""
    found = parabolas(fit.runs)
    terminal.table(
        ("arm", "FLOPs", "best N", "relative error of N", "loss there", "D / N", "between sizes"),
        [
            (p.arm or "all", f"{p.flops:.2e}", f"{p.N:.3g}", _percent(p.se), f"{p.loss:.4f}",
             f"{p.flops / 6 / p.N**2:.1f}", _yes(p.inside))
            for p in found
        ],
        "parabolas at equal compute",
    )  # fmt: skip
    member = fit.ensemble.members[0]
    rows = []
    for f in frontiers(found):
        terms = member.law.arm_terms(np.concatenate([member.theta[None], member.draws]), f.arm)
        by_law = estimates((terms["beta"] / (terms["alpha"] + terms["beta"]))[:, None])[0]
        error = "" if math.isnan(f.se) else f" +- {f.se:.3f}"
        rows.append((f.arm or "all", f"{f.exponent:.3f}{error}", _estimate(by_law, ".3f")))
    if rows:
        terminal.table(
        ("arm", "exponent by parabolas", f"by the law {member.law.form}"),
        rows, "best N goes as FLOPs to the power of",
        )  # fmt: skip


def print_predictions(fit: FitFile, asked: Question) -> None:
    """Losses, gaps and equal-loss factors."""
    arm, reference = asked.arm, fit.ensemble.arms[0]
    made = predict(fit.ensemble, arm, asked.N, asked.D, asked.tolerance, asked.vocabulary)
    terminal.table(
        ("N", "D", reference, arm, "gap (nats)", "gap (%)",
         f"P(gap <= {asked.tolerance:g})", "parameters for equal loss at D"),
        [
            (f"{p.N:.3g}", f"{p.D:.3g}", _estimate(p.reference, ".3f"), _estimate(p.arm, ".3f"),
             _estimate(p.gap, "+.4f"), _estimate(Estimate(*(100 * x for x in p.relative)), "+.2f"),
             f"{p.closed:.2f}", _estimate(p.parameters, ".2f", "x"))
            for p in made
        ],
        f"{arm} against {reference}; in brackets 95 % over {_laws(fit)}",
    )  # fmt: skip
    shrinks, vanishes = closing(fit.ensemble, arm, asked.N, asked.D)
    terminal.console.print(
        f"the relative gap shrinks from {min(asked.N):.3g} to {max(asked.N):.3g} parameters with "
        f"probability {shrinks:.2f}, and is gone there with {vanishes:.2f}"
    )
    terminal.table(
        ("N", *(f"{bits:g} bits against {rival}" for rival, bits in made[0].memory)),
        [
            (f"{p.N:.3g}", *(_estimate(x, ".3f", "x") for x in p.memory.values())) for p in made
        ],
        f"bytes of {arm} over {reference}'s at equal loss, embedding included"
        + ("" if "ptq_int4" in fit.ensemble.arms else "; int4 as if rounding lost nothing"),
    )  # fmt: skip


def print_costs(fit: FitFile, asked: Question, prices: Prices) -> None:
    """Of a pair of runs at every size, and whether it would settle the question at the largest."""
    today, made = costs(
        fit.ensemble, asked.arm, asked.N, asked.D, asked.target, prices, asked.tolerance,
        asked.vocabulary,
    )  # fmt: skip
    rows = [("what is known now", "", "", "", "", "", f"{today.interval:.4f}", _yes(today.settled))]
    rows += [
        (f"{c.N:.3g}", f"{c.D:.3g}", f"{c.flops:.2e}", f"{c.hours:,.0f}", f"{c.dollars:,.0f}",
         terminal.size(c.memory), f"{c.outcome.interval:.4f}", _yes(c.outcome.settled))
        for c in made
    ]  # fmt: skip
    terminal.table(
        ("N", "tokens each", "FLOPs of both", "accelerator hours", "dollars", "memory to run",
         "interval of the gap then", "settled"),
        rows,
        f"a pair of runs, to know whether the gap at {asked.target[0]:.3g} is {asked.tolerance:g} "
        f"or less: at {prices.flops_per_second:.3g} FLOP/s, {prices.dollars_per_hour:g} dollars an "
        "hour",
    )  # fmt: skip


def print_next(fit: FitFile, asked: Question, budget: float | None) -> None:
    """Which run would tell most."""
    runs = fit.runs
    sizes = np.unique(np.append(runs.N, runs.N.max() * np.array([2.0, BEYOND_RUNS])))
    ratios = np.unique((runs.D / runs.N).round(1))
    ratios = np.unique(np.append(ratios[:: max(1, len(ratios) // 8)], 2 * ratios[-1]))
    limit = BUDGET * float((6 * runs.N * runs.D).max()) if budget is None else budget
    found = next_runs(
        fit.ensemble, asked.arm, asked.target, sizes.tolist(), ratios.tolist(), limit
    )  # fmt: skip
    terminal.table(
        ("arms", "N", "tokens", "FLOPs", "interval left"),
        [
            (" + ".join(c.arms), f"{c.N:.3g}", f"{c.D:.3g}", f"{c.flops:.2e}", f"{c.interval:.0%}")
            for c in found[:CANDIDATES]
        ],
        f"the next experiment, of at most {limit:.2g} FLOPs: what it leaves of the interval of the "
        f"gap at {asked.target[0]:.3g}",
    )  # fmt: skip


def print_published(fit: FitFile, arm: str) -> None:
    """Published pairs beside the fit's predictions."""
    terminal.table(
        ("source", "model", "N", "D", "gap published (%)", "gap predicted (%)", "inside",
         "parameters published", "predicted"),
        [
            (f"{c.point.source}, {c.point.at}", c.point.name, f"{c.point.N:.3g}",
             f"{c.point.D:.3g}", f"{100 * c.point.relative:+.2f}",
             _estimate(Estimate(*(100 * x for x in c.relative)), "+.2f"),
             _yes(c.agrees),
             "" if math.isnan(c.point.parameters) else f"{c.point.parameters:.2f}x",
             _estimate(c.parameters, ".2f", "x"))
            for c in confront(fit.ensemble, arm)
        ],
        "log of the losses' ratio, which has no unit: tokenizers and texts differ",
    )  # fmt: skip
    for other in published()["others"]:
        mark = "" if other["checked"] else " (second hand)"
        terminal.console.print(f"{other['source']}, {other['at']}{mark}: {other['says']}")


def _laws(fit: FitFile) -> str:
    return ", ".join(f"{m.law.form} {m.weight:.2f}" for m in fit.ensemble.members)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _interval(of: Estimate) -> str:
    return f"{_number(of.low)} .. {_number(of.high)}"


def _estimate(of: Estimate, form: str, unit: str = "") -> str:
    best, low, high = (f"{x:{form}}" if math.isfinite(x) else "inf" for x in of)
    return f"{best}{unit} [{low}, {high}]"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.2f} %"
