"""The demo's model alone: a byte-level b1.58 model on tiny Shakespeare.

Source of the recipe: the training tips of BitNet b1.58 (two-stage learning rate, weight decay 0.1
then 0), scaled down; learning rate and initial scale by a sweep on this text.

Command:   bitjax train configs/shakespeare.py --out runs/shakespeare
Twin:      add --set model.weights=float --set model.activations=float and the twin's own schedule,
           or take `shakespeare("float")` of bitjax.presets, as the demo does.
Time:      two minutes on two cores.
Number:    2.3825 bits per byte of the held-out tenth, mean of three seeds (2.377, 2.387, 2.384; +-
           0.011 each), the twin 2.3173: experiments/shakespeare_twins.
"""

from bitjax.config import RunConfig
from bitjax.presets import shakespeare


def get_config() -> RunConfig:
    """The ternary arm of `bitjax demo`."""
    return shakespeare("ternary")
