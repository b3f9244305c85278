"""From 16 to 1.58 bits: the second half of a run is ternary, the first is full precision.

Source:    the order of training, arXiv 2502.11895 (continual quantisation-aware training); the
           growing strength of the quantisation, "Fine-tuning LLMs to 1.58bit" (Hugging Face, 2024).
           Rates are those of the ternary run from scratch.
Command:   bitjax train configs/shakespeare_float.py --out runs/float --set train.steps=1000
           bitjax train configs/continual.py --out runs/continual
Time:      five minutes for both on two cores that others used too; as many steps as
           configs/shakespeare.py has, and as long.
Number:    bits per byte of the held-out tenth (`bitjax eval runs/continual`), one seed: 2.358 +-
           0.011. From scratch, 2000 ternary steps (configs/shakespeare.py): 2.382. Without warm-up
           (train.quantization_warmup_steps=0): 2.375. The float run after its 1000 steps: 2.449.
"""

import dataclasses

from bitjax.config import RunConfig
from bitjax.presets import shakespeare


def get_config() -> RunConfig:
    """The ternary second half."""
    ternary = shakespeare("ternary")
    train = dataclasses.replace(
        ternary.train, steps=1000, start_from="runs/float", quantization_warmup_steps=200
    )
    return dataclasses.replace(ternary, train=train)
