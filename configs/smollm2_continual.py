r"""From 16 to 1.58 bits with a real model: SmolLM2-135M becomes ternary by training on.

Source:    SmolLM2-135M(-Instruct), Hugging Face, Apache-2.0; continual training of its kind, arXiv
           2502.11895 and "Fine-tuning LLMs to 1.58bit" (Hugging Face, 2024). The rate by the sweep
           of experiments/wikipedia/smollm2.py, which also says what came of it.
Command:   python experiments/wikipedia/smollm2.py ... makes model file and corpus and starts this,
           or bitjax train configs/smollm2_continual.py --out runs/smollm2 \
               --set train.start_from=float.safetensors --set data.text=CORPUS
Time:      18 minutes of one core of an AMD EPYC (Zen 5), 12 GB of memory at the most.
Number:    nats per token of held-out articles: 7.43 after 60 steps, 6.65 after 120; 6.59 bits per
           byte of WikiText-2 when only rounded, 2.92 afterwards, 1.11 in full precision.
Hardware:  --set train.products=integer --set train.attention=fused is faster on CPUs with AVX-512
           BF16. train.quantization_warmup_steps, which integer products do not have, is not used.
"""

from bitjax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    """134.5M parameters, 106M of them ternary; 0.25M tokens."""
    model = ModelConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, max_seq_len=8192, activation="silu", sub_norm=False,
        tie_embeddings=True, rope_theta=100_000.0,
    )  # fmt: skip
    optimizer = OptimizerConfig(
        learning_rate=1e-3, stage_two_learning_rate=None, weight_decay=0.0,
        stage_two_weight_decay=None, warmup_steps=20,
    )  # fmt: skip
    train = TrainConfig(
        steps=120, batch_size=8, seq_len=256, start_from="float.safetensors", eval_every=60,
        checkpoint_every=60, keep_checkpoints=1, keep_best=False, log_codes=False,
    )  # fmt: skip
    return RunConfig(model, DataConfig(text="corpus"), optimizer, train)
