"""The full-precision twin of `shakespeare.py`: what `continual.py` starts from.

Source of the recipe: a sweep of constant-decay schedules on this text; b1.58's two tricks (two
stages, no late weight decay) do not help float models.

Command:   bitjax train configs/shakespeare_float.py --out runs/float
Time:      two minutes on two cores.
Number:    2.3173 bits per byte of the held-out tenth, mean of three seeds (2.286, 2.329, 2.337; +-
           0.012 each): experiments/shakespeare_twins.
"""

from bitjax.config import RunConfig
from bitjax.presets import shakespeare


def get_config() -> RunConfig:
    """The float arm of `bitjax demo`."""
    return shakespeare("float")
