r"""Direct preference optimisation: the model of configs/sft.py learns to say you for thou.

Source:    arXiv 2305.18290; beta 0.1 as BitNet b1.58 2B4T (arXiv 2504.12285), whose rate of 2e-7
           is for a model 2000 times as large.
Data:      bitjax corpus build tuning/pairs.jsonl --pairs --template tuning/template.jinja \
               --tokenizer tuning/tokenizer.json --valid-fraction 0.1 -o tuning/pairs
Command:   bitjax train configs/dpo.py --out runs/dpo
Time:      48 s of one core, the reference's likelihoods included.
Number:    of held-out pairs (one seed): loss 0.693 before, 0.489, 0.377 and 0.357 after 20, 40 and
           60 steps; margin of rewards 0, 0.52, 1.05, 1.17; accuracy 1 from 20 steps on.
           `python experiments/tuning/preferred.py tuning/pairs runs/sft runs/dpo`: the chosen
           answer is the likelier one in 74.1 +- 4.2 % of 108 pairs before, 99.1 +- 0.9 % after.
"""

import dataclasses

from bitjax.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from bitjax.presets import shakespeare

VOCAB_SIZE = 512


def get_config() -> RunConfig:
    """The tuning; `start_from` is the run of configs/sft.py."""
    model = dataclasses.replace(shakespeare("ternary").model, vocab_size=VOCAB_SIZE)
    optimizer = OptimizerConfig(
        learning_rate=1e-4, stage_two_learning_rate=None, weight_decay=0.0, warmup_steps=10
    )
    train = TrainConfig(
        steps=60, batch_size=16, seq_len=256, start_from="runs/sft", objective="dpo",
        dpo_beta=0.1, eval_every=20, checkpoint_every=60,
    )  # fmt: skip
    return RunConfig(model, DataConfig(text="tuning/pairs"), optimizer, train)
