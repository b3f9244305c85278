r"""The full-precision twin of BitNet b1.58 3B: 100B tokens.

Source:    arXiv 2402.17764; rates: "The Era of 1-bit LLMs: Training Tips, Code and FAQ", table 1.
Data:      the paper's is RedPajama; any corpus of a tokenizer of up to 32,002 tokens.
Command:   bitjax train configs/b158_3b_float.py --out runs/3b-float \
             --set data.text=CORPUS --set mesh.fsdp=DEVICES
Time:      not run here; 6 N D = 1.8e+21 FLOPs are some 4,006 hours of an A100 at 40 % of its peak.
Number:    the paper's validation perplexity is 10.04.
"""

from bitjax.config import RunConfig
from bitjax.presets import b158_paper


def get_config() -> RunConfig:
    """3B, full precision."""
    return b158_paper("b1.58-3b", "float")
