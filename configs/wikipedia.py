"""A small ternary model of Wikipedia's text, to be compared with its twin (wikipedia_float.py).

Source of the recipe: the training tips of BitNet b1.58 (two-stage learning rate, weight decay 0.1
then 0); the learning rate by the sweep of experiments/wikipedia, which also says what came of it.

Command:   python experiments/wikipedia/run.py ... makes the corpus and starts this, or
           bitjax train configs/wikipedia.py --out runs/ternary --set data.text=CORPUS
Hardware:  --set train.products=integer is faster on CPUs with AVX-512 BF16.
"""

from bitjax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    """3.6M parameters, of which 1.0M are the embedding of 4,096 tokens; 12M tokens."""
    model = ModelConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_layers=3, num_heads=4,
        num_kv_heads=4, head_dim=64, max_seq_len=256, activation="relu2", init_std=0.05,
    )  # fmt: skip
    optimizer = OptimizerConfig(learning_rate=3e-3, stage_two_learning_rate=2e-3, warmup_steps=100)
    train = TrainConfig(
        steps=3000, batch_size=16, seq_len=256, eval_every=300, checkpoint_every=300
    )
    return RunConfig(model, DataConfig(text="corpus"), optimizer, train)
