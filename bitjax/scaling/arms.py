"""Arms of a study, and the whole configuration of one run of an arm.

ternary                    weights ternary, activations int8: the recipe's own
float                      its full-precision twin: one stage, constant weight decay
binary                     weights binary, activations int8
ternary_float_activations  weights ternary, activations in float
continual                  starts from the float run with `continual_fraction` of its tokens,
                           goes on ternary with the rest, quantisation growing over its first
                           `lambda_fraction`; learning rate of `ternary`
ptq_ternary                the float run of as many tokens, rounded: weights ternary,
                           activations int8; nothing is trained
ptq_int8, ptq_int4         the same, weights rounded to 8 bits (absmax rows) or 4 (groups of 32
                           columns, `bitjax.quant.int4_grouped`); activations stay float
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from bitjax.config import (
    ActivationQuantizer,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    WeightQuantizer,
)
from bitjax.config.scaling import StudyConfig
from bitjax.train.flops import multiplying_weights

FFN_MULTIPLE = 64  # of the FFN's width: whole blocks of every packed layout
REPORTS = 50  # of a run's curve
# Data order and initial weights follow the seed; a continual run's second part reads others.
CONTINUAL_SEED = 1_000_000
Rounding = Literal["", "ternary", "int8", "int4"]


@dataclass(frozen=True)
class Arm:
    """What an arm is.

    Attributes:
        weights, activations: of the model that is scored.
        rounded: how a float run's weights are rounded; empty: the arm is trained.
        continued: whether it starts from a float run.
    """

    weights: WeightQuantizer
    activations: ActivationQuantizer = "int8"
    rounded: Rounding = ""
    continued: bool = False

    @property
    def rate_of(self) -> str:
        """The arm whose sweep gives the learning rate; empty if nothing is trained."""
        return "" if self.rounded else "ternary" if self.continued else _name_of(self)


ARMS: dict[str, Arm] = {
    "ternary": Arm("ternary"),
    "float": Arm("float", "float"),
    "binary": Arm("binary"),
    "ternary_float_activations": Arm("ternary", "float"),
    "continual": Arm("ternary", continued=True),
    "ptq_ternary": Arm("ternary", rounded="ternary"),
    "ptq_int8": Arm("float", "float", rounded="int8"),
    "ptq_int4": Arm("float", "float", rounded="int4"),
}


def _name_of(arm: Arm) -> str:
    return next(name for name, known in ARMS.items() if known == arm)


def arm_named(name: str) -> Arm:
    """An arm.

    Raises:
        ValueError: no such arm.
    """
    if name not in ARMS:
        raise ValueError(f"no arm {name!r}; there are {', '.join(ARMS)}")
    return ARMS[name]


def shape(base: ModelConfig, size: str) -> ModelConfig:
    """The recipe's model in another size; see `StudyConfig`.

    Raises:
        ValueError: a hidden size that is not whole heads.
    """
    hidden, layers = map(int, size.split("x"))
    if hidden % base.head_dim:
        raise ValueError(
            f"size {size}: a hidden size of {hidden} is not a multiple of the recipe's "
            f"model.head_dim={base.head_dim}"
        )
    heads = hidden // base.head_dim
    return dataclasses.replace(
        base,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        intermediate_size=FFN_MULTIPLE * math.ceil(8 * hidden / 3 / FFN_MULTIPLE),
        init_std=base.init_std * math.sqrt(base.hidden_size / hidden),
    )


def non_embedding(model: ModelConfig) -> int:
    """N: weights of all linear layers but the head; norms, under 1 %, are not counted."""
    return multiplying_weights(model) - model.vocab_size * model.hidden_size


def embedding(model: ModelConfig) -> int:
    """Parameters of the embedding and, where it has its own, the head."""
    return model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)


def whole_steps(base: RunConfig, tokens: float) -> int:
    """Steps nearest to so many tokens, at least 2."""
    return max(2, round(tokens / (base.train.batch_size * base.train.seq_len)))


def configuration(
    base: RunConfig, study: StudyConfig, name: str, size: str, steps: int, seed: int,
    rate: float, start_from: str = "",
) -> RunConfig:  # fmt: skip
    """The training run of an arm.

    Args:
        base: the recipe's, of the ternary model.
        study: fractions of the schedule.
        name: of a trained arm.
        size: of the model.
        steps: that this run takes; of a continual run its ternary part's.
        seed: of the cell.
        rate: the peak learning rate.
        start_from: of a continual run, the directory of its float part.
    """
    arm = arm_named(name)
    model = dataclasses.replace(
        shape(base.model, size), weights=arm.weights, activations=arm.activations
    )
    if arm.weights == "float":
        model = model.full_precision_twin()
    # While quantisation warms up, as in a continual run, products are of real numbers.
    exact = model.has_integer_products and not arm.continued
    train = dataclasses.replace(
        base.train, steps=steps, seed=seed, eval_every=0, keep_best=False, keep_checkpoints=1,
        log_every=max(1, steps // REPORTS), quantization_warmup_steps=0, start_from=start_from,
        products=base.train.products if exact else "xla",
    )  # fmt: skip
    if arm.continued:
        train = dataclasses.replace(
            train, seed=seed + CONTINUAL_SEED,
            quantization_warmup_steps=math.ceil(study.lambda_fraction * steps),
        )  # fmt: skip
    warmup = math.ceil(study.warmup_fraction * steps)
    return RunConfig(model, base.data, _optimizer(base.optimizer, arm, rate, warmup), train)


def _optimizer(base: OptimizerConfig, arm: Arm, rate: float, warmup: int) -> OptimizerConfig:
    """The recipe's schedule at another rate; the twin has one stage and constant weight decay,
    which both tricks do not help ("The Era of 1-bit LLMs: Training Tips, Code and FAQ")."""
    two = base.stage_two_learning_rate
    staged = arm.weights != "float"
    return dataclasses.replace(
        base, learning_rate=rate, warmup_steps=warmup,
        stage_two_learning_rate=rate * two / base.learning_rate if staged and two else None,
        stage_two_weight_decay=base.stage_two_weight_decay if staged else None,
    )  # fmt: skip
