"""How often the intervals of scaling laws hold the truth.

    python experiments/scaling_coverage/run.py

makes data sets of known laws with the designs of a study, fits each, and counts how often the 95 %
intervals of parameters and of predictions hold the true values. Rewrites `results.json` and the
tables in `README.md` beside this file.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np

from bitjax.scaling.ensemble import CONFIDENCE, estimates
from bitjax.scaling.fit import Fit, fit_law
from bitjax.scaling.intervals import RESAMPLINGS, bootstrap, profile
from bitjax.scaling.laws import Form, Law
from bitjax.scaling.runs import Runs
from bitjax.scaling.study import fit_runs

HERE = Path(__file__).parent
START, END = "<!-- results -->", "<!-- end of results -->"
SETS = 200  # the share covered is then known to 1.5 %
RESAMPLES = 300
ARMS = ("float", "ternary")
RATIOS = (20, 80, 320)
CENTER = (float(np.log(1e6)), float(np.log(8e7)))
# Losses of about 2.5 nats at 0.1M parameters and 1.0 at 6M, of which 0.6 stays.
BASE = (np.log(0.5 * 1e6**0.30), np.log(0.25 * 8e7**0.35), np.log(0.6), 0.30, 0.35)
ETA = -0.30 * np.log(0.55)  # offset of a ternary weight worth 0.55 of a float one
TRUTHS: dict[Form, tuple[float, ...]] = {
    "eta": (*BASE, ETA),
    "drift": (*BASE, ETA, -0.30 * 0.05, -0.30 * -0.05),
    "separate": (*BASE, ETA, 0.05, 0.0, 0.01, 0.0),
}


@dataclass(frozen=True)
class Scenario:
    """Data sets of one kind.

    Attributes:
        design: "study": 6 sizes x 3 ratios, three seeds of 6 of these cells; "small": 4 sizes x 3
            ratios, a seed each. Twins everywhere.
        form: of the truth, and of the fit unless `ensemble`.
        own, shared: standard deviations of log loss, of a run's own noise and of what twins share.
        tails: whether the own noise is Student's with 3 degrees of freedom.
        ensemble: forms that are fitted together, in place of the true one alone.
        profiles: whether intervals by profile are counted too.
    """

    name: str
    design: str
    form: Form
    own: float = 0.005
    shared: float = 0.0
    tails: bool = False
    ensemble: tuple[Form, ...] = ()
    profiles: bool = False


FORMS: tuple[Form, ...] = ("eta", "drift", "eta-e")
PROFILED = ("E", "log eta", "loss at 60M", "gap at 1B")
SCENARIOS = (
    Scenario("normal noise", "study", "eta", profiles=True),
    Scenario("noise shared by twins", "study", "eta", 0.004, 0.003),
    Scenario("noise with heavy tails", "study", "eta", tails=True),
    Scenario("nothing shared by the arms", "study", "separate"),
    Scenario("12 cells", "small", "eta"),
    Scenario("12 cells, eta drifts", "small", "drift"),
    Scenario("laws weighted, truth eta", "study", "eta", ensemble=FORMS),
    Scenario("laws weighted, truth drift", "study", "drift", ensemble=FORMS),
)


def draw(scenario: Scenario, seed: int) -> Runs:
    """One data set."""
    sizes = np.array([1e5, 2.5e5, 6e5, 1.4e6, 3e6, 6e6])
    if scenario.design == "small":
        sizes = sizes[[0, 1, 3, 5]]
    cells = [
        (N, N * ratio, s)
        for i, N in enumerate(sizes) for ratio in RATIOS
        for s in range(3 if scenario.design == "study" and i in (0, 2, 3) and ratio < 320 else 1)
    ]  # fmt: skip
    N, D, seeds = (np.repeat(column, 2) for column in zip(*cells, strict=True))
    arm = np.tile(ARMS, len(cells))
    rng = np.random.default_rng(seed)
    own = rng.standard_t(3, len(N)) / np.sqrt(3) if scenario.tails else rng.standard_normal(len(N))
    both = np.repeat(rng.standard_normal(len(cells)), 2)
    law = Law(scenario.form, ARMS, CENTER)
    loss = law.loss(np.array(TRUTHS[scenario.form]), N, D, list(arm))[0]
    return Runs.of(
        N, D, loss * np.exp(scenario.own * own + scenario.shared * both), arm, seed=seeds
    )


Quantity = Callable[[Law, np.ndarray], np.ndarray]


def _gap(N: float) -> Quantity:
    def gap(law: Law, theta: np.ndarray) -> np.ndarray:
        return (law.loss(theta, N, 20 * N, "ternary") - law.loss(theta, N, 20 * N, "float"))[:, 0]

    return gap


def _loss(N: float) -> Quantity:
    return lambda law, theta: np.log(law.loss(theta, N, 20 * N, "ternary")[:, 0])


PREDICTED: dict[str, Quantity] = {
    "loss at 60M": _loss(6e7), "loss at 100B": _loss(1e11),
    "gap at 60M": _gap(6e7), "gap at 1B": _gap(1e9), "gap at 100B": _gap(1e11),
}  # fmt: skip
PARAMETERS: dict[str, Quantity] = {
    "E": lambda law, theta: theta[:, 2], "alpha": lambda law, theta: theta[:, 3],
    "beta": lambda law, theta: theta[:, 4],
}  # fmt: skip


def quantities(scenario: Scenario) -> dict[str, Quantity]:
    """What is counted: parameters of the true form, and predictions."""
    if scenario.ensemble:
        return PREDICTED
    found = dict(PARAMETERS)
    if scenario.form == "eta":
        found["log eta"] = lambda law, theta: -theta[:, 5] / theta[:, 3]
    return found | PREDICTED


def intervals(
    scenario: Scenario, runs: Runs, seed: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """Of every method and quantity."""
    wanted = quantities(scenario)
    if scenario.ensemble:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ensemble = fit_runs(runs, scenario.ensemble, ARMS, resamples=RESAMPLES, seed=seed)[0]
        parts = ensemble.ensemble.parts()
        return {"weighted laws": {
            name: _interval(np.concatenate([q(law, theta) for law, theta in parts]))
            for name, q in wanted.items()
        }}  # fmt: skip
    fit = fit_law(runs, scenario.form, ARMS)
    found = {}
    for method in RESAMPLINGS:
        theta = np.concatenate([fit.theta[None], bootstrap(fit, RESAMPLES, method, seed)])
        found[method] = {name: _interval(q(fit.law, theta)) for name, q in wanted.items()}
    if scenario.profiles:
        found["profile"] = {name: _profile(fit, wanted[name]) for name in PROFILED}
    return found


def _interval(values: np.ndarray) -> tuple[float, float]:
    (found,) = estimates(values[:, None])
    return found.low, found.high


def _profile(fit: Fit, q: Quantity) -> tuple[float, float]:
    return profile(fit, lambda theta: q(fit.law, theta))[:2]


def _one(task: tuple[Scenario, int]) -> dict[str, dict[str, tuple[float, float]]]:
    scenario, seed = task
    return intervals(scenario, draw(scenario, seed), seed)


def measure(scenario: Scenario, sets: int, workers: Pool) -> dict[str, Any]:
    """Coverage and median width of every method and quantity."""
    law, theta = Law(scenario.form, ARMS, CENTER), np.array(TRUTHS[scenario.form])[None]
    truth = {name: float(q(law, theta)[0]) for name, q in quantities(scenario).items()}
    made = workers.map(_one, [(scenario, s) for s in range(sets)], chunksize=5)
    found: dict[str, Any] = {}
    for method in made[0]:
        for name in made[0][method]:
            low, high = np.array([m[method][name] for m in made]).T
            found.setdefault(method, {})[name] = {
                "covered": float(((low <= truth[name]) & (truth[name] <= high)).mean()),
                "width": float(np.median(high - low)),
            }
    return found


def markdown(results: dict[str, Any]) -> str:
    """The tables."""
    names = [*PARAMETERS, "log eta", *PREDICTED]
    lines = [
        f"{results['sets']} data sets each, {results['resamples']} resamples; share of "
        f"{CONFIDENCE:.0%} intervals that hold the truth (+- 1.5 %), in brackets median widths.",
        "", "| data | intervals | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|",
    ]  # fmt: skip
    for name, methods in results["scenarios"].items():
        for method, found in methods.items():
            cells = [
                f"{found[n]['covered']:.0%} ({found[n]['width']:.2g})" if n in found else ""
                for n in names
            ]
            lines.append(f"| {name} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every scenario and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--sets", type=int, default=SETS, help=f"data sets of each (default: {SETS})"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and README")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help="these scenarios; those of results.json stay",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    results: dict[str, Any] = {"sets": chosen.sets, "resamples": RESAMPLES, "scenarios": {}}
    if chosen.only and (chosen.out / "results.json").exists():
        known = json.loads((chosen.out / "results.json").read_text())
        if {name: known[name] for name in ("sets", "resamples")} != {
            name: results[name] for name in ("sets", "resamples")
        }:
            parser.error("results.json has other numbers of data sets or resamples")
        results = known
    with get_context("spawn").Pool(chosen.workers) as workers:
        for scenario in SCENARIOS:
            if chosen.only and scenario.name not in chosen.only:
                continue
            begin = time.perf_counter()
            results["scenarios"][scenario.name] = measure(scenario, chosen.sets, workers)
            print(f"{scenario.name}: {time.perf_counter() - begin:.0f} s", flush=True)
            _write(chosen.out, results)


def _write(folder: Path, results: dict[str, Any]) -> None:
    """Results so far, and their table in the README."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    readme = folder / "README.md"
    if readme.exists():
        before, _, rest = readme.read_text().partition(START)
        after = rest.partition(END)[2]
        readme.write_text(f"{before}{START}\n{markdown(results)}\n{END}{after}")


if __name__ == "__main__":
    main()
