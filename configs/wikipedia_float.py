"""The full-precision twin of wikipedia.py: the same shape, tokens and order, a rate of its own.

Source of the recipe: one stage and constant weight decay, as configs/shakespeare_float.py; the
learning rate by the sweep of experiments/wikipedia.

Command:   as wikipedia.py's.
"""

from bitjax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    """As wikipedia.py's, without quantisers."""
    model = ModelConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_layers=3, num_heads=4,
        num_kv_heads=4, head_dim=64, max_seq_len=256, activation="relu2", init_std=0.05,
    ).full_precision_twin()  # fmt: skip
    optimizer = OptimizerConfig(
        learning_rate=2e-3, stage_two_learning_rate=None, stage_two_weight_decay=None,
        warmup_steps=100,
    )  # fmt: skip
    train = TrainConfig(
        steps=3000, batch_size=16, seq_len=256, eval_every=300, checkpoint_every=300
    )
    return RunConfig(model, DataConfig(text="corpus"), optimizer, train)
