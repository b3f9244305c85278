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
