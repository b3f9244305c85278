"""The demo's model alone: a byte-level b1.58 model on tiny Shakespeare.

Source of the recipe: the training tips of BitNet b1.58 (two-stage learning rate, weight decay 0.1
then 0), scaled down; learning rate and initial scale by a sweep on this text.

Command:   bitjax train configs/shakespeare.py --out runs/shakespeare
Twin:      add --set model.weights=float --set model.activations=float and the twin's own schedule,
           or take `shakespeare("float")` of bitjax.presets, as the demo does.
"""

from bitjax.config import RunConfig
from bitjax.presets import shakespeare


def get_config() -> RunConfig:
    """The ternary arm of `bitjax demo`."""
    return shakespeare("ternary")
