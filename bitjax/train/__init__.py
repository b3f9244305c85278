"""Training: data, optimiser, step, loop and checkpoints."""

from bitjax.corpus.loader import Batch
from bitjax.train.loop import Diverged, Interrupted, train
from bitjax.train.loss import cross_entropy
from bitjax.train.metrics import Report, read_metrics
from bitjax.train.step import Trainer, TrainState

__all__ = [
    "Batch", "Diverged", "Interrupted", "Report", "TrainState", "Trainer", "cross_entropy",
    "read_metrics", "train",
]  # fmt: skip
