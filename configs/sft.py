r"""Tuning on conversations: a small ternary model learns to answer a speech with the next one.

Source:    the sum over answers' tokens, and rates above full precision's: BitNet b1.58 2B4T (arXiv
           2504.12285). The gradient's norm is clipped all the same, so that the sum only weighs
           batches by the tokens of their answers.
Data:      python experiments/tuning/dialogues.py tuning
           bitjax corpus tokenizer tuning/plays.txt --vocab-size 512 -o tuning/tokenizer.json
           bitjax corpus build tuning/plays.txt --separator '\n\n' -o tuning/plays \
               --tokenizer tuning/tokenizer.json
           bitjax corpus build tuning/dialogues.jsonl --chat --template tuning/template.jinja \
               --tokenizer tuning/tokenizer.json --valid-fraction 0.05 -o tuning/chat
Base:      bitjax train configs/shakespeare.py --out runs/base --set data.text=tuning/plays \
               --set model.vocab_size=512 --set train.steps=800
Command:   bitjax train configs/sft.py --out runs/sft
Time:      54 s on two cores that others used too; 30 s of one core.
Number:    nats per token of held-out answers, in two runs (one seed; the base was trained anew for
           each): 3.635 and 3.560 after 50 steps, 3.589 and 3.507 after 100; of the answers trained
           on 3.697 and 3.622 over the first ten steps.
"""

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
        steps=100, batch_size=8, seq_len=256, start_from="runs/base", loss_reduction="sum",
        eval_every=50, checkpoint_every=100,
    )  # fmt: skip
    return RunConfig(model, DataConfig(text="tuning/chat"), optimizer, train)
