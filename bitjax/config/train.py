"""How long a run takes, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass

from bitjax.config.fields import check_fields, require, require_positive
from bitjax.config.model import DType


@dataclass(frozen=True)
class TrainConfig:
    """How long and how often."""

    steps: int = 1000
    batch_size: int = 32  # sequences per optimiser step, all accumulation steps together
    seq_len: int = 128  # tokens predicted per sequence
    accumulate: int = 1  # gradient accumulation steps; divides batch_size
    compute_dtype: DType = "float32"  # of activations; master weights are always float32
    quantization_warmup_steps: int = 0  # lambda grows from 0 to 1 over as many: x + lambda (q(x) -
    # x) for weights and activations, so that a full-precision model becomes a quantised one
    seed: int = 0  # of initial weights and of the data order
    log_every: int = 10  # steps
    eval_every: int = 250  # steps; 0: only at the end
    checkpoint_every: int = 250  # steps; the last step is always kept
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(
            self, "steps", "batch_size", "seq_len", "accumulate", "log_every",
            "checkpoint_every", "keep_checkpoints",
        )  # fmt: skip
        require(self.eval_every >= 0, f"train.eval_every={self.eval_every} is negative")
        require(
            0 <= self.quantization_warmup_steps < self.steps,
            f"train.quantization_warmup_steps={self.quantization_warmup_steps} is not from 0 to "
            f"below train.steps={self.steps}",
        )
        require(self.seed >= 0, f"train.seed={self.seed} is negative")
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size={self.batch_size} is not a multiple of "
            f"train.accumulate={self.accumulate}",
        )
