"""Fits with their bootstraps, as one set of draws that predictions are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bitjax.scaling.laws import Law

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A value and its interval; inf where a quantity has no finite value."""

    best: float
    low: float
    high: float


@dataclass(frozen=True)
class Member:
    """A law of the ensemble.

    Attributes:
        theta: [P] best coordinates.
        draws: [R, P] of the bootstrap.
        weight: share of the ensemble's draws.
        noise: standard deviation of a run's log loss around the law.
        aicc, objective, held_out, held_out_gap: see `compare.Standing`.
    """

    law: Law
    theta: np.ndarray
    draws: np.ndarray
    weight: float
    noise: float
    aicc: float = 0.0
    objective: float = 0.0
    held_out: float = float("nan")
    held_out_gap: float = float("nan")


@dataclass(frozen=True)
class Ensemble:
    """Laws that share their arms. The first, which the runs speak for most, gives best values; the
    intervals are over all draws, so they hold what is unknown of the form as well."""

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        arms = {frozenset(m.law.arms) for m in self.members}
        if len(arms) != 1:
            raise ValueError(f"an ensemble of laws wants one set of arms, got {len(arms)}")

    @property
    def arms(self) -> tuple[str, ...]:
        """Of every law; the first is the reference."""
        return self.members[0].law.arms

    @property
    def noise(self) -> float:
        """Of the first law."""
        return self.members[0].noise

    def parts(self) -> list[tuple[Law, np.ndarray]]:
        """(law, thetas): the best of the first law as one row, then each law's draws, in all as
        many as the first has, shared out by weight. Same rows at every call."""
        total = len(self.members[0].draws)
        ends = np.round(np.cumsum([m.weight for m in self.members]) * total).astype(int)
        first = self.members[0]
        found = [(first.law, first.theta[None])]
        for member, begin, end in zip(self.members, [0, *ends[:-1]], ends, strict=True):
            found.append((member.law, member.draws[: end - begin]))
        return found

    def losses(self, N: Sequence[float] | np.ndarray, D: object, arm: str) -> np.ndarray:
        """[1 + R, n] nats: best values, then those of the draws.

        Args:
            N: [n] non-embedding parameters. D: [n] tokens, or one number.
        """
        n = np.atleast_1d(np.asarray(N, float))
        d = np.broadcast_to(np.asarray(D, float), n.shape)
        return np.concatenate([law.loss(thetas, n, d, arm) for law, thetas in self.parts()])

    def parameters_for(self, loss: np.ndarray, D: object, arm: str) -> np.ndarray:
        """[1 + R, n]: the size at which an arm has a loss [1 + R, n] after D tokens [n]; inf where
        no size has it, or where more parameters make it worse.

            loss = E + B / D^beta + A' N^(p - alpha)
        """
        d = np.broadcast_to(np.asarray(D, float), loss.shape[1:])
        found, row = np.empty(loss.shape), 0
        for law, thetas in self.parts():
            rows = slice(row, row := row + len(thetas))
            t = {name: v[:, None] for name, v in law.arm_terms(thetas, arm).items()}
            left = loss[rows] - t["E"] - t["B"] * d ** -t["beta"]
            n0, d0 = law.center
            log_A = np.log(t["A"]) - t["p"] * n0 + t["q"] * (np.log(d) - d0)
            power = t["p"] - t["alpha"]
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                N = np.exp((np.log(left) - log_A) / power)
            found[rows] = np.where((left > 0) & (power < 0), N, np.inf)
        return found


def estimates(values: np.ndarray, confidence: float = CONFIDENCE) -> list[Estimate]:
    """Of [1 + R, n]: the first row, and quantiles of the others (no interpolation: of inf there is
    none)."""
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(values[1:], ends, axis=0, method="closest_observation")
    return [Estimate(*map(float, row)) for row in zip(values[0], low, high, strict=True)]
