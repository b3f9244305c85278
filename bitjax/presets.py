"""Named shapes and runs: published ternary models, bitnet.cpp's benchmark sizes, the demo's run.

`MODELS[name]` is a `ModelConfig`; `.full_precision_twin()` gives the same shape in float.
"""

from __future__ import annotations

from bitjax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    WeightQuantizer,
)


def _b158(
    hidden: int, intermediate: int, heads: int, layers: int, vocab: int = 32_002
) -> ModelConfig:
    """BitNet b1.58 (arXiv 2402.17764; training tips, table 1; vocabulary of 1bitLLM's files)."""
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate,
        num_layers=layers, num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads,
        max_seq_len=2048, activation="silu", sub_norm=True, tie_embeddings=True,
    )  # fmt: skip


MODELS: dict[str, ModelConfig] = {
    "b1.58-700m": _b158(1536, 4096, 24, 24),
    "b1.58-1.3b": _b158(2048, 5460, 32, 24),
    "b1.58-3b": _b158(3200, 8640, 32, 26),
    "b1.58-3.9b": _b158(3200, 12_800, 32, 26),
    # BitNet b1.58 2B4T, arXiv 2504.12285
    "b1.58-2b4t": ModelConfig(
        vocab_size=128_256, hidden_size=2560, intermediate_size=6912, num_layers=30,
        num_heads=20, num_kv_heads=5, head_dim=128, max_seq_len=4096, activation="relu2",
        sub_norm=True, tie_embeddings=True, rope_theta=500_000.0,
    ),
    # Llama-shaped: no sub-norms, separate head
    "llama3-8b-1.58": ModelConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32,
        num_heads=32, num_kv_heads=8, head_dim=128, max_seq_len=8192, activation="silu",
        sub_norm=False, tie_embeddings=False, rope_theta=500_000.0,
    ),
    "falcon3-10b-1.58": ModelConfig(
        vocab_size=131_072, hidden_size=3072, intermediate_size=23_040, num_layers=40,
        num_heads=12, num_kv_heads=4, head_dim=256, max_seq_len=32_768, activation="silu",
        sub_norm=False, tie_embeddings=False, rope_theta=1_000_042.0, norm_eps=1e-6,
    ),
    # Sizes bitnet.cpp is benchmarked at: microsoft/BitNet, utils/generate-dummy-bitnet-model.py
    "7b": _b158(4096, 12_032, 32, 32, 32_000),
    "13b": _b158(5120, 13_824, 40, 40, 32_000),
    "30b": _b158(6656, 16_384, 52, 60, 32_000),
    "70b": _b158(8192, 24_576, 64, 80, 32_000),
    "100b": _b158(8192, 45_568, 64, 72, 32_000),
}  # fmt: skip


def shakespeare(weights: WeightQuantizer, text: str = "", seed: int = 0) -> RunConfig:
    """A 0.9M-parameter byte model that trains in about two minutes on two cores.

    Args:
        weights: "ternary" (or "binary") with int8 activations, or "float": the full-precision twin
            with its own schedule (one stage, constant weight decay).
        text: path of another text; empty for the packaged Shakespeare.
        seed: of initial weights and data order, shared by twins.
    """
    quantized = ModelConfig(
        hidden_size=128, intermediate_size=384, num_layers=4, num_heads=2, num_kv_heads=2,
        head_dim=64, max_seq_len=256, activation="relu2", init_std=0.06, weights=weights,
    )  # fmt: skip
    if weights == "float":
        model = quantized.full_precision_twin()
        optimizer = OptimizerConfig(
            learning_rate=2e-3, stage_two_learning_rate=None, stage_two_weight_decay=None
        )
    else:
        model = quantized
        optimizer = OptimizerConfig(learning_rate=2.5e-3, stage_two_learning_rate=1.7e-3)
    schedule = TrainConfig(
        steps=2000, batch_size=4, seq_len=256, seed=seed, eval_every=250, checkpoint_every=250
    )
    return RunConfig(model, DataConfig(text=text), optimizer, schedule)
