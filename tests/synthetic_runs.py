"""Runs of a known law, for the tests of scaling laws."""

import numpy as np

from bitjax.scaling.laws import Law
from bitjax.scaling.runs import Runs

SIZES = np.array([1e5, 3e5, 1e6, 3e6])
RATIOS = (20, 80, 320)
E, ALPHA, BETA, ETA = 0.6, 0.30, 0.35, 0.55
A, B = 0.5 * 1e6**ALPHA, 0.25 * 8e7**BETA
ARMS = ("float", "ternary")
TRUTH = np.array([np.log(A), np.log(B), np.log(E), ALPHA, BETA, -ALPHA * np.log(ETA)])


def law():
    return Law("eta", ARMS)


def plain(N, D, eta=1.0, e=E, a=A, b=B, alpha=ALPHA, beta=BETA):
    """The formula as it is written down."""
    return e + a / (eta * np.asarray(N)) ** alpha + b / np.asarray(D) ** beta


def runs(noise=0.004, seed=0, sizes=SIZES, ratios=RATIOS, seeds=1, **others):
    """Twins of every size, ratio and seed; noise of log loss."""
    rows = [(n, n * r, s, arm) for n in sizes for r in ratios for s in range(seeds) for arm in ARMS]
    N, D, s, arm = (np.array(column) for column in zip(*rows, strict=True))
    loss = plain(N, D, np.where(arm == "ternary", ETA, 1.0))
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(N)))
    return Runs.of(N, D, loss, arm, seed=s, **others)
