r"""BitNet b1.58 2B4T, pre-training in two stages: cosine to the middle, then a low cooldown.

Source:    arXiv 2504.12285, section 2.2: the shape, the two stages, weight decay of 0.1 and then 0.
           It gives no rates, batch or warm-up: those below are the b1.58 paper's for 3B, and a
           cooldown at a quarter, which are guesses.
Data:      4T tokens of DCLM, FineWeb-EDU and others; Llama 3's tokenizer.
Command:   bitjax train configs/bitnet_2b4t.py --out runs/2b4t \
             --set data.text=CORPUS --set mesh.fsdp=N
Time:      not run here; 6 N D = 5.0e22 FLOPs are some 110,000 hours of an A100 at 40 % of its peak.
Number:    none for pre-training alone; the released model's average of 17 tasks is 54.19.
"""

from bitjax.config import OptimizerConfig, RunConfig, TrainConfig
from bitjax.presets import MODELS

TOKENS, SEQUENCES, SEQ_LEN = 4e12, 1024, 4096


def get_config() -> RunConfig:
    """The whole of pre-training."""
    return RunConfig(
        model=MODELS["b1.58-2b4t"],
        optimizer=OptimizerConfig(
            learning_rate=1.2e-3, stage_two_learning_rate=3e-4, falling="cosine", warmup_steps=375
        ),
        train=TrainConfig(
            steps=round(TOKENS / (SEQUENCES * SEQ_LEN)), batch_size=SEQUENCES, seq_len=SEQ_LEN,
            accumulate=16, remat=True, compute_dtype="bfloat16", eval_every=1000,
            checkpoint_every=1000,
        ),
    )  # fmt: skip
