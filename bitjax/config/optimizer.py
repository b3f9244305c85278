"""How weights follow their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitjax.config.fields import check_fields, require, require_positive


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the two-stage schedule of the b1.58 training tips.

    At step t of n: `lr(t) = peak(t) * min(1, (t + 1) / warmup_steps) * falling(t / n)`, with
    `falling(x) = 1 - x` (linear) or `(1 + cos(pi x)) / 2` (cosine). `peak` is `learning_rate`, and
    the weight decay `weight_decay`, before `stage_two_at * n`; `stage_two_learning_rate` and
    `stage_two_weight_decay` from there on. TriLM (arXiv 2407.12327) ends weight decay later, at
    `weight_decay_stage_two_at`.
    Source: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024), section 2.
    """

    learning_rate: float = 1.5e-3
    stage_two_learning_rate: float | None = 1.0e-3  # None: learning_rate throughout
    weight_decay: float = 0.1
    stage_two_weight_decay: float | None = 0.0  # None: weight_decay throughout
    stage_two_at: float = 0.5  # fraction of all steps
    weight_decay_stage_two_at: float | None = None  # None: stage_two_at
    falling: Literal["linear", "cosine"] = "linear"
    warmup_steps: int = 50
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # global gradient norm

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "learning_rate", "eps", "clip_norm")
        for name in ("stage_two_learning_rate", "weight_decay", "stage_two_weight_decay"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"optimizer.{name}={value} is negative")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps} is negative")
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} is not in [0, 1)")
        for name in ("stage_two_at", "weight_decay_stage_two_at"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, f"optimizer.{name} is not in (0, 1]")
