"""The batch engine: many requests at once, each as if it were alone."""

from bitjax.config import EngineConfig
from bitjax.engine.engine import Engine
from bitjax.engine.request import (
    Choice,
    Completion,
    Constraint,
    Delta,
    Request,
    Sampling,
    Timings,
    TokenLogprob,
    Usage,
)

__all__ = [
    "Choice", "Completion", "Constraint", "Delta", "Engine", "EngineConfig", "Request", "Sampling",
    "Timings", "TokenLogprob", "Usage",
]  # fmt: skip
