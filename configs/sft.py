import dataclasses

from bitjax.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from bitjax.presets import shakespeare

VOCAB_SIZE = 512


def get_config() -> RunConfig:
    """The tuning; `start_from` is the base model's run."""
    model = dataclasses.replace(shakespeare("ternary").model, vocab_size=VOCAB_SIZE)
    optimizer = OptimizerConfig(
        learning_rate=1e-3, stage_two_learning_rate=None, weight_decay=0.0, warmup_steps=20
    )
    train = TrainConfig(
        steps=400, batch_size=8, seq_len=256, start_from="runs/base", loss_reduction="sum",
        eval_every=100, checkpoint_every=100,
    )  # fmt: skip
    return RunConfig(model, DataConfig(text="tuning/chat"), optimizer, train)
