r"""BitNet b1.58 1.3B: 100B tokens, two stages.

Source:    arXiv 2402.17764; rates: "The Era of 1-bit LLMs: Training Tips, Code and FAQ", table 1.
Data:      the paper's is RedPajama; any corpus of a tokenizer of up to 32,002 tokens.
Command:   bitjax train configs/b158_1_3b.py --out runs/1.3b \
             --set data.text=CORPUS --set mesh.fsdp=DEVICES
Time:      not run here; 6 N D = 7.8e+20 FLOPs are some 1,736 hours of an A100 at 40 % of its peak.
Number:    the paper's validation perplexity is 11.29.
"""

from bitjax.config import RunConfig
from bitjax.presets import b158_paper


def get_config() -> RunConfig:
    """1.3B, ternary."""
    return b158_paper("b1.58-1.3b", "ternary")
