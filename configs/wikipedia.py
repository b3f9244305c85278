"""A small ternary model of Wikipedia's text, to be compared with its twin (wikipedia_float.py).

Source of the recipe: the training tips of BitNet b1.58 (two-stage learning rate, weight decay 0.1
then 0); the learning rate by the sweep of experiments/wikipedia, which also says what came of it.

Command:   python experiments/wikipedia/run.py ... makes the corpus and starts this, or
           bitjax train configs/wikipedia.py --out runs/ternary --set data.text=CORPUS
Hardware:  --set train.products=integer is faster on CPUs with AVX-512 BF16.
"""

from bitjax.config import RunConfig
from bitjax.presets import wikipedia


def get_config() -> RunConfig:
    """3.6M parameters; 8.2M tokens."""
    return wikipedia("ternary")
