"""The demo's model at half the width, with the rates that the width asks for.

Source:    `bitjax.presets.widened`: rates in inverse proportion to the width, as measured in
           experiments/learning_rates; the demo's own come from a sweep at width 128.
Command:   bitjax train configs/shakespeare_narrow.py --out runs/narrow
Twin:      `widened(shakespeare("float"), 64)` of bitjax.presets.
Time:      72 s of one core.
Number:    2.570 +- 0.010 bits per byte of the held-out tenth (`bitjax eval runs/narrow`), one seed;
           at twice the width 2.382 (configs/shakespeare.py).
"""

from bitjax.config import RunConfig
from bitjax.presets import shakespeare, widened


def get_config() -> RunConfig:
    """The ternary arm, 64 wide."""
    return widened(shakespeare("ternary"), 64)
