"""TriLM 99M: ternary weights alone; the rate drops at half, weight decay ends at two thirds.

Source:    Spectra (arXiv 2407.12327): shape, rates 2.4e-3 and 1.5e-3, 300B tokens. Batch and
           warm-up are those of the b1.58 paper, for want of theirs.
Data:      SlimPajama with GPT-NeoX's tokenizer there; any corpus of up to 50,304 tokens.
Command:   bitjax train configs/trilm_99m.py --out runs/trilm --set data.text=CORPUS
Twin:      FloatLM: --set model.weights=float --set optimizer.learning_rate=4e-4
           --set optimizer.stage_two_learning_rate=none --set optimizer.stage_two_weight_decay=none
Time:      not run here; 6 N D = 1.8e20 FLOPs are some 400 hours of an A100 at 40 % of its peak.
Number:    their fit over sizes at 300B tokens: a loss of 185 / N^0.26 + 1.76, N the parameters in
           millions as they count them.
"""

from bitjax.config import OptimizerConfig, RunConfig, TrainConfig
from bitjax.presets import MODELS

TOKENS, SEQUENCES, SEQ_LEN = 300e9, 512, 2048


def get_config() -> RunConfig:
    """The ternary arm."""
    return RunConfig(
        model=MODELS["trilm-99m"],
        optimizer=OptimizerConfig(
            learning_rate=2.4e-3, stage_two_learning_rate=1.5e-3, weight_decay_stage_two_at=2 / 3,
            warmup_steps=375,
        ),
        train=TrainConfig(
            steps=round(TOKENS / (SEQUENCES * SEQ_LEN)), batch_size=SEQUENCES, seq_len=SEQ_LEN,
            accumulate=8, compute_dtype="bfloat16", eval_every=1000, checkpoint_every=1000,
        ),
    )  # fmt: skip
