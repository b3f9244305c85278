r"""BitNet b1.58 700M: 100B tokens, two stages.

Source:    arXiv 2402.17764; rates: "The Era of 1-bit LLMs: Training Tips, Code and FAQ", table 1.
Data:      the paper's is RedPajama; any corpus of a tokenizer of up to 32,002 tokens.
Command:   bitjax train configs/b158_700m.py --out runs/700m \
             --set data.text=CORPUS --set mesh.fsdp=DEVICES
Time:      not run here; 6 N D = 4.2e+20 FLOPs are some 935 hours of an A100 at 40 % of its peak.
Number:    the paper's validation perplexity is 12.87.
"""

from bitjax.config import RunConfig
from bitjax.presets import b158_paper


def get_config() -> RunConfig:
    """700M, ternary."""
    return b158_paper("b1.58-700m", "ternary")
