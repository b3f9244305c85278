"""A small ternary model of Wikipedia's text, to be compared with its twin (wikipedia_float.py).

Source of the recipe: the training tips of BitNet b1.58 (two-stage learning rate, weight decay 0.1
then 0); the learning rate by the sweep of experiments/wikipedia, which also says what came of it.

Command:   python experiments/wikipedia/run.py ... makes the corpus and starts this, or
           bitjax train configs/wikipedia.py --out runs/ternary --set data.text=CORPUS
Time:      16 minutes of one core of an AMD EPYC (Zen 5), with the settings below.
Number:    1.930 +- 0.004 bits per byte of enwik8's last 5 MB, one seed; the twin 1.871.
Hardware:  --set train.products=integer --set train.attention=fused is faster on CPUs with
           AVX-512 BF16.
"""

from bitjax.config import RunConfig
from bitjax.presets import wikipedia


def get_config() -> RunConfig:
    """3.6M parameters; 8.2M tokens."""
    return wikipedia("ternary")
