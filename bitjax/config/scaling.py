"""A scaling study: which runs, of which shapes, and how their learning rates are found."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from bitjax.config.fields import require

# Neighbours differ by about 2 in non-embedding parameters: 0.11M, 0.22M, 0.44M, 0.85M, 1.6M, 3.1M,
# 5.6M, 10M, 20M, 44M.
LADDER = (
    "64x2", "96x2", "96x4", "128x4", "160x5", "192x7", "256x7", "320x8", "416x9", "576x11",
)  # fmt: skip
Design = Literal["ratios", "factorial", "isoflop"]


@dataclass(frozen=True)
class Group:
    """Every arm at every size, ratio and seed; a study is the union of its groups.

    Args:
        sizes: "HIDDENxLAYERS" each.
        ratios: training tokens per non-embedding parameter.
        arms: names in `bitjax.scaling.arms.ARMS`.
        seeds: so many, from 0.
    """

    sizes: tuple[str, ...] = LADDER
    ratios: tuple[float, ...] = (10, 20, 40, 80)
    arms: tuple[str, ...] = ("ternary", "float")
    seeds: int = 1

    def __post_init__(self) -> None:
        for size in self.sizes:
            require(
                re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) is not None,
                f"size {size!r} is not HIDDENxLAYERS, e.g. 128x4",
            )
        for ratio in self.ratios:
            require(0 < ratio < math.inf, f"{ratio} tokens per parameter is not a number above 0")
        require(self.seeds >= 1, f"{self.seeds} seeds; a group has 1 or more")
        require(all((self.sizes, self.ratios, self.arms)), "a group without sizes, ratios or arms")


@dataclass(frozen=True)
class StudyConfig:
    """What all groups share.

    A shape follows from its name and the recipe: `intermediate_size` is the smallest multiple of 64
    that is 8/3 of the hidden size or more, `head_dim` is the recipe's, there are as many key-value
    heads as heads, and `init_std` is the recipe's times sqrt(its hidden size / this one).

    Learning rates: for every size and trained arm, one short run for each of `rates`; while the
    best is at an edge the grid grows there by one more factor, `extensions` times at most. The
    schedule's shape is the recipe's; stage two keeps its ratio to stage one.
    """

    groups: tuple[Group, ...] = (Group(),)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    extensions: int = 3
    sweep_ratio: float = 10.0  # tokens per parameter of a run of a sweep
    sweep_tokens: int = 4_000_000  # and at most so many
    warmup_fraction: float = 0.05  # of a run's steps: learning-rate warm-up
    continual_fraction: float = 0.5  # of the tokens of `continual`, trained in full precision
    lambda_fraction: float = 0.2  # of its ternary steps, over which quantisation grows to full

    def __post_init__(self) -> None:
        require(bool(self.groups), "a study without groups")
        rates = self.rates
        require(
            len(rates) >= 2 and all(0 < a < b < math.inf for a, b in pairwise(rates)),
            f"rates={rates} are not two or more learning rates above 0 in ascending order",
        )
        require(self.extensions >= 0, f"extensions={self.extensions} is negative")
        for name in ("sweep_ratio", "sweep_tokens"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0")
        for name in ("warmup_fraction", "continual_fraction", "lambda_fraction"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name}={value} is not between 0 and 1")
