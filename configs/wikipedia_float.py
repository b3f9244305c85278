"""The full-precision twin of wikipedia.py: the same shape, tokens and order, a rate of its own.

Source of the recipe: one stage and constant weight decay, as configs/shakespeare_float.py; the
learning rate by the sweep of experiments/wikipedia.

Command:   as wikipedia.py's.
Time:      21 minutes of one core of an AMD EPYC (Zen 5), with --set train.attention=fused.
Number:    1.871 +- 0.004 bits per byte of enwik8's last 5 MB, one seed.
"""

from bitjax.config import RunConfig
from bitjax.presets import wikipedia


def get_config() -> RunConfig:
    """As wikipedia.py's, without quantisers."""
    return wikipedia("float")
