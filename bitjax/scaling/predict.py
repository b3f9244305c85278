"""What a fit says of sizes that nobody has trained: gaps, equal-loss factors, what settles them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bitjax.config.prices import Prices
from bitjax.scaling.ensemble import CONFIDENCE, Ensemble, Estimate, estimates
from bitjax.scaling.shapes import INT4_BITS, TABLE_BITS, VOCABULARY, model_bytes, stored_bits

SIZES = (1e9, 7e9, 13e9, 70e9, 100e9)
TOKENS_PER_PARAMETER = 20.0  # about compute-optimal (Hoffmann et al., arXiv 2203.15556)
TOLERANCE = 0.01  # nats per token: about what two seeds differ by
RIVAL_BITS = {"bf16": 16.0, "int4": INT4_BITS}


@dataclass(frozen=True)
class Prediction:
    """An arm against the reference at one size; losses in nats per token.

    Attributes:
        gap: loss of the arm less the reference's.
        relative: log of the losses' ratio, which the unit (token, byte) does not change.
        closed: probability that the gap is at most the tolerance.
        parameters: N_arm / N at which the arm has the reference's loss after as many tokens.
        memory: bytes of the arm at that size over the reference's, by (rival, the arm's bits). The
            rival "int4" stores the reference's weights so; it has its own loss where the fit has
            an arm ptq_int4, else the reference's, which flatters it.
    """

    N: float
    D: float
    reference: Estimate
    arm: Estimate
    gap: Estimate
    relative: Estimate
    closed: float
    parameters: Estimate
    memory: dict[tuple[str, float], Estimate]


def predict(
    ensemble: Ensemble, arm: str, N: Sequence[float], D: Sequence[float],
    tolerance: float = TOLERANCE, vocabulary: int = VOCABULARY,
) -> list[Prediction]:  # fmt: skip
    """Predictions at sizes N [n] after tokens D [n].

    Raises:
        ValueError: an arm that the fit does not have, or the reference itself.
    """
    reference = ensemble.arms[0]
    if arm == reference:
        raise ValueError(f"arm {arm!r} is the reference; compare another of {ensemble.arms[1:]}")
    d = np.asarray(D, float)
    base = ensemble.losses(N, d, reference)
    own = ensemble.losses(N, d, arm)
    gap = own - base
    factor = ensemble.parameters_for(base, d, arm) / np.asarray(N)
    memory = {}
    for rival, bits in RIVAL_BITS.items():
        has = rival == "int4" and "ptq_int4" in ensemble.arms
        needed = (
            ensemble.parameters_for(ensemble.losses(N, d, "ptq_int4"), d, arm) / np.asarray(N)
            if has else factor
        )  # fmt: skip
        for own_bits in stored_bits(arm):
            memory[rival, own_bits] = estimates(
                _memory(np.asarray(N), needed, own_bits, bits, vocabulary)
            )
    parts = [estimates(x) for x in (base, own, gap, np.log(own / base), factor)]
    closed = (gap[1:] <= tolerance).mean(0)
    return [
        Prediction(
            float(N[i]), float(d[i]), parts[0][i], parts[1][i], parts[2][i], parts[3][i],
            float(closed[i]), parts[4][i], {key: values[i] for key, values in memory.items()},
        )
        for i in range(len(d))
    ]  # fmt: skip


def closing(
    ensemble: Ensemble, arm: str, N: Sequence[float], D: Sequence[float]
) -> tuple[float, float]:
    """Probabilities that the relative gap is smaller at the last of the sizes, by N, than at the
    first, and that it is 0 or less there."""
    order = np.argsort(N)[[0, -1]]
    sizes, tokens = np.asarray(N, float)[order], np.asarray(D, float)[order]
    gap = np.log(
        ensemble.losses(sizes, tokens, arm) / ensemble.losses(sizes, tokens, ensemble.arms[0])
    )[1:]
    return float((gap[:, 1] < gap[:, 0]).mean()), float((gap[:, 1] <= 0).mean())


def _memory(
    N: np.ndarray, factor: np.ndarray, bits: float, rival_bits: float, vocabulary: int
) -> np.ndarray:
    """Ratios of bytes [1 + R, n] for factors [1 + R, n]; a table of bytes over sizes is made once
    and read by interpolation."""
    sizes = np.exp(np.linspace(math.log(N.min()) - 12, math.log(N.max()) + 25, 400))
    weigh = np.log([model_bytes(x, bits, vocabulary, TABLE_BITS) for x in sizes])
    rival = np.array([model_bytes(x, rival_bits, vocabulary, TABLE_BITS) for x in N])
    wanted = np.log(np.clip(factor, 1e-12, None) * N)
    inside = np.exp(np.interp(wanted, np.log(sizes), weigh)) / rival
    return np.where(wanted <= math.log(sizes[-1]), inside, np.inf)


class Outcome(NamedTuple):
    """What is known of the gap at a target: the width of its interval, and whether that leaves the
    tolerance outside."""

    interval: float
    settled: bool


@dataclass(frozen=True)
class Cost:
    """Of training an arm and its twin to D tokens, and of running the arm.

    Attributes:
        flops: 6 N D for each of the two.
        hours: of one accelerator.
        memory: bytes of the arm's weights and embedding.
        outcome: expected, once this pair's gap is known.
    """

    N: float
    D: float
    flops: float
    hours: float
    dollars: float
    memory: float
    outcome: Outcome


def costs(
    ensemble: Ensemble, arm: str, N: Sequence[float], D: Sequence[float],
    target: tuple[float, float], prices: Prices, tolerance: float = TOLERANCE,
    vocabulary: int = VOCABULARY,
) -> tuple[Outcome, list[Cost]]:  # fmt: skip
    """What is known today; what a pair of runs costs at sizes N [n], and whether it would settle
    the question of the gap at the target (N, D).

    The pair's own gap is known but for the noise of two runs; what it tells of the target's follows
    from how the two gaps go together over the draws (as in a linear Gaussian model).
    """
    reference = ensemble.arms[0]
    sizes, tokens = np.append(N, target[0]), np.append(D, target[1])
    gaps = ensemble.losses(sizes, tokens, arm) - ensemble.losses(sizes, tokens, reference)
    loss = ensemble.losses(N, D, reference)[0]
    goal = gaps[1:, -1]
    middle, half = float(np.median(goal)), _z()

    def outcome(variance: float) -> Outcome:
        reach = half * math.sqrt(variance)
        return Outcome(2 * reach, reach < abs(middle - tolerance))

    found = []
    for i, (n, d) in enumerate(zip(N, D, strict=True)):
        noise = np.array([2 * (ensemble.noise * loss[i]) ** 2])
        flops = 2 * 6 * n * d
        hours = flops / prices.flops_per_second / 3600
        found.append(
            Cost(
                float(n), float(d), flops, hours, hours * prices.dollars_per_hour,
                model_bytes(n, stored_bits(arm)[0], vocabulary),
                outcome(_left(goal, gaps[1:, i : i + 1], noise)),
            )
        )  # fmt: skip
    return outcome(float(np.var(_winsorised(goal), ddof=1))), found


@dataclass(frozen=True)
class Candidate:
    """A run that might come next.

    Attributes:
        arms: of the run, or of the pair.
        interval: expected width of the interval of the gap at the target after it, over today's.
    """

    arms: tuple[str, ...]
    N: float
    D: float
    flops: float
    interval: float


def next_runs(
    ensemble: Ensemble, arm: str, target: tuple[float, float], N: Sequence[float],
    ratios: Sequence[float], budget: float,
) -> list[Candidate]:  # fmt: skip
    """Candidates of sizes N and tokens per parameter `ratios`, of either arm or both, that cost at
    most `budget` FLOPs; those that shrink the gap's interval at the target most come first.

    Raises:
        ValueError: the budget pays for none.
    """
    reference = ensemble.arms[0]
    at = ([target[0]], target[1])
    goal = (ensemble.losses(*at, arm) - ensemble.losses(*at, reference))[1:, 0]
    now = math.sqrt(float(np.var(_winsorised(goal), ddof=1)))
    found = []
    for n in N:
        for ratio in ratios:
            logs = {a: np.log(ensemble.losses([n], n * ratio, a))[1:, 0] for a in (reference, arm)}
            for arms in ((reference,), (arm,), (reference, arm)):
                if (flops := 6 * n * n * ratio * len(arms)) > budget:
                    continue
                seen = np.stack([logs[a] for a in arms], 1)
                left = _left(goal, seen, np.full(len(arms), ensemble.noise**2))
                found.append(Candidate(arms, n, n * ratio, flops, math.sqrt(left) / now))
    if not found:
        raise ValueError(f"a budget of {budget:.2g} FLOPs pays for none of the candidate runs")
    return sorted(found, key=lambda c: (c.interval, c.flops))


def _left(goal: np.ndarray, seen: np.ndarray, noise: np.ndarray) -> float:
    """Variance of goal [R] left once seen [R, k] is measured with noise of variances [k]."""
    both = np.concatenate([_winsorised(goal)[:, None], _winsorised(seen)], 1)
    C = np.atleast_2d(np.cov(both, rowvar=False))
    gain = C[0, 1:] @ np.linalg.solve(C[1:, 1:] + np.diag(noise), C[0, 1:])
    return max(float(C[0, 0] - gain), 0.0)


def _winsorised(values: np.ndarray) -> np.ndarray:
    """With the outermost 1 % to each side brought to its edge: resamples that hardly decide a law
    would rule every variance."""
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    return np.clip(values, low, high)


def _z() -> float:
    from scipy.stats import norm

    return float(norm.ppf((1 + CONFIDENCE) / 2))
