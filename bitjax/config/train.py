"""How long a run takes, what it keeps, what it does when the loss jumps, and what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitjax.config.fields import check_fields, require, require_positive
from bitjax.config.model import DType

Products = Literal["xla", "integer"]
TrainAttention = Literal["xla", "fused"]

# Settings that change nothing a run computes: they may differ from those it was started with.
WATCHING = (
    "keep_checkpoints", "keep_best", "log_codes", "tensorboard", "wandb", "peak_gflops", "remat",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """How long and how often, and what is learned.

    A step is a spike if its loss or gradient norm is NaN or infinite, or above `spike_factor` times
    the median of the last `spike_window` steps that were none. What happens then is `on_spike`:

        stop     the run ends; its last checkpoint is from before
        skip     the step's update is not applied
        rewind   the run goes back to its last checkpoint and on with data it has not seen
    """

    steps: int = 1000
    batch_size: int = 32  # sequences per optimiser step, all accumulation steps together
    seq_len: int = 128  # tokens predicted per sequence
    accumulate: int = 1  # gradient accumulation steps; divides batch_size
    compute_dtype: DType = "float32"  # of activations; master weights are always float32
    products: Products = "xla"  # of quantised layers. integer: on CPUs with AVX-512 BF16 and VNNI,
    # exact forward; backward with gradients rounded to bfloat16 (bitjax/ops/training.py)
    attention: TrainAttention = "xla"  # fused: on CPU, float32, the same by custom calls that keep
    # no scores in memory (bitjax/ops/training_attention.py)
    quantization_warmup_steps: int = 0  # lambda grows from 0 to 1 over as many: x + lambda (q(x) -
    # x) for weights and activations, so that a full-precision model becomes a quantised one
    stochastic_rounding: Literal["none", "weights", "activations", "both"] = "none"  # of what is
    # quantised, drawn anew at each step; evaluation always rounds to nearest
    remat: bool = False  # blocks are computed again backwards, instead of keeping what is in them
    start_from: str = ""  # a run, or a model file of float weights, whose weights a new run starts
    # with; empty: random ones
    objective: Literal["next_token", "dpo"] = "next_token"  # bitjax/train/next_token.py, dpo.py
    loss_reduction: Literal["mean", "sum"] = "mean"  # of a step's losses in what is descended;
    # 2B4T (arXiv 2504.12285) was tuned with sum; reports always show the mean
    dpo_beta: float = 0.1  # of objective="dpo": how dear it is to leave the reference model
    seed: int = 0  # of initial weights and of the data order
    log_every: int = 10  # steps
    eval_every: int = 250  # steps; 0: only at the end
    checkpoint_every: int = 250  # steps; the last step is always kept
    keep_checkpoints: int = 2  # the newest ones
    keep_best: bool = True  # and that of the lowest validation loss, saved when it is measured
    on_spike: Literal["stop", "skip", "rewind"] = "stop"
    spike_factor: float | None = None  # None: only NaN and infinity are spikes
    spike_window: int = 32  # steps; nothing finite is a spike before there were as many
    spike_limit: int = 10  # the run stops at so many skips or rewinds in a row
    log_codes: bool = True  # fractions of -1, 0, 1, flip rate and the inputs' absmax of every layer
    # at each report
    tensorboard: bool = False  # metrics to DIR/tensorboard as well
    wandb: str = ""  # a project of Weights & Biases, which gets them too; empty: none
    peak_gflops: float | None = None  # what MFU is a fraction of; None: measured once a process

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(
            self, "dpo_beta", "steps", "batch_size", "seq_len", "accumulate", "log_every",
            "checkpoint_every", "keep_checkpoints", "spike_window", "spike_limit",
        )  # fmt: skip
        require(self.eval_every >= 0, f"train.eval_every={self.eval_every} is negative")
        require(
            0 <= self.quantization_warmup_steps < self.steps,
            f"train.quantization_warmup_steps={self.quantization_warmup_steps} is not from 0 to "
            f"below train.steps={self.steps}",
        )
        require(
            self.objective != "dpo" or bool(self.start_from),
            "train.objective=dpo needs train.start_from: the model to be tuned, which is also the "
            "reference",
        )
        require(
            self.objective != "dpo" or self.batch_size // self.accumulate % 2 == 0,
            f"train.objective=dpo needs pairs: train.batch_size={self.batch_size} / "
            f"train.accumulate={self.accumulate} is odd",
        )
        require(
            self.products == "xla"
            or (self.compute_dtype, self.quantization_warmup_steps) == ("float32", 0),
            "train.products='integer' wants train.compute_dtype='float32' and "
            "train.quantization_warmup_steps=0; got "
            f"{self.compute_dtype!r} and {self.quantization_warmup_steps}",
        )
        require(
            self.products == "xla" or self.stochastic_rounding not in ("activations", "both"),
            "train.products='integer' rounds activations to nearest; got "
            f"train.stochastic_rounding={self.stochastic_rounding!r}",
        )
        require(
            self.attention == "xla" or self.compute_dtype == "float32",
            "train.attention='fused' wants train.compute_dtype='float32'; got "
            f"{self.compute_dtype!r}",
        )
        require(self.seed >= 0, f"train.seed={self.seed} is negative")
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size={self.batch_size} is not a multiple of "
            f"train.accumulate={self.accumulate}",
        )
        require(
            self.spike_factor is None or self.spike_factor > 1,
            f"train.spike_factor={self.spike_factor} must be above 1, or None",
        )
        require(
            self.peak_gflops is None or self.peak_gflops > 0,
            f"train.peak_gflops={self.peak_gflops} must be above 0, or None",
        )
