"""Named shapes and runs: published ternary models, bitnet.cpp's benchmark sizes, the demo's run.

`MODELS[name]` is a `ModelConfig`; `.full_precision_twin()` gives the same shape in float.
"""

from __future__ import annotations

import dataclasses
import math

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
    # TriLM 99M (arXiv 2407.12327): ternary weights, float activations, Llama's blocks
    "trilm-99m": ModelConfig(
        vocab_size=50_304, hidden_size=512, intermediate_size=1280, num_layers=16, num_heads=8,
        num_kv_heads=8, head_dim=64, max_seq_len=2048, activation="silu", sub_norm=False,
        tie_embeddings=False, activations="float",
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


# Peak rates of BitNet b1.58: stage one, stage two, and of the full-precision twin where it was
# trained (training tips, table 1).
_B158_RATES: dict[str, tuple[float, float, float | None]] = {
    "b1.58-700m": (1.5e-3, 1.0e-3, 2.5e-4),
    "b1.58-1.3b": (1.2e-3, 8e-4, 2.0e-4),
    "b1.58-3b": (1.2e-3, 8e-4, 2.0e-4),
    "b1.58-3.9b": (1.2e-3, 8e-4, None),
}


def b158_paper(name: str, weights: WeightQuantizer) -> RunConfig:
    """A run of the BitNet b1.58 paper: 100B tokens in batches of 1M, as the training tips have it.

    The twin has one stage and constant weight decay, which both tricks do not help.

    Args:
        name: of a model in `MODELS`, "b1.58-700m" to "b1.58-3.9b".
        weights: "ternary", or "float" for the full-precision twin.

    Raises:
        ValueError: a twin that the paper does not have.
    """
    first, second, twin = _B158_RATES[name]
    seq_len, sequences = 2048, 512  # 1,048,576 tokens
    if weights == "float":
        if twin is None:
            raise ValueError(f"no rate of a full-precision {name} was published")
        model = MODELS[name].full_precision_twin()
        optimizer = OptimizerConfig(
            learning_rate=twin, stage_two_learning_rate=None, stage_two_weight_decay=None,
            warmup_steps=375,
        )  # fmt: skip
    else:
        model = MODELS[name]
        optimizer = OptimizerConfig(
            learning_rate=first, stage_two_learning_rate=second, warmup_steps=375
        )
    steps = round(100e9 / (seq_len * sequences))
    train = TrainConfig(
        steps=steps, batch_size=sequences, seq_len=seq_len, accumulate=8, remat=True,
        compute_dtype="bfloat16", eval_every=1000, checkpoint_every=1000,
    )  # fmt: skip
    return RunConfig(model, DataConfig(), optimizer, train)


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


def wikipedia(weights: WeightQuantizer) -> RunConfig:
    """A 3.6M-parameter model, 1.0M of them the embedding of 4,096 tokens; 8.2M tokens of a corpus.

    Args:
        weights: "ternary" with int8 activations, or "float": the full-precision twin with its own
            schedule (one stage, constant weight decay). The rates are those that the sweep of
            experiments/wikipedia chose.
    """
    model = ModelConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_layers=3, num_heads=4,
        num_kv_heads=4, head_dim=64, max_seq_len=256, activation="relu2", init_std=0.05,
        weights=weights,
    )  # fmt: skip
    if weights == "float":
        model = model.full_precision_twin()
        optimizer = OptimizerConfig(
            learning_rate=6e-3, stage_two_learning_rate=None, stage_two_weight_decay=None,
            warmup_steps=50,
        )  # fmt: skip
    else:
        optimizer = OptimizerConfig(
            learning_rate=1.2e-2, stage_two_learning_rate=8e-3, warmup_steps=50
        )
    train = TrainConfig(
        steps=2000, batch_size=16, seq_len=256, eval_every=250, checkpoint_every=250
    )
    return RunConfig(model, DataConfig(text="corpus"), optimizer, train)


def widened(run: RunConfig, width: int) -> RunConfig:
    """A run whose model has another width, with initial weights and rates as they transfer:

        num_heads, intermediate_size ~ D      init_std ~ 1 / sqrt(D)      learning rates ~ 1 / D

    Measured for both arms from D = 32 to 128 at four layers: rates ~ D^-1.12 +- 0.15 (ternary) and
    D^-1.06 +- 0.12 (full precision); see experiments/learning_rates. The same powers as muP has for
    hidden weights under Adam (arXiv 2203.03466, table 8); norms and embedding share the rate here.

    Args:
        run: to change.
        width: D, with a whole number of key and value heads.

    Raises:
        ValueError: another width.
    """
    old, optimizer = run.model, run.optimizer
    step = old.hidden_size // old.num_kv_heads
    if width < 1 or width % step:
        raise ValueError(f"width={width} is not a multiple of {step}, which one key head goes with")
    model = dataclasses.replace(
        old, hidden_size=width, intermediate_size=old.intermediate_size * width // old.hidden_size,
        num_heads=old.num_heads * width // old.hidden_size,
        num_kv_heads=old.num_kv_heads * width // old.hidden_size,
        init_std=old.init_std * math.sqrt(old.hidden_size / width),
    )  # fmt: skip
    second, narrower = optimizer.stage_two_learning_rate, old.hidden_size / width
    rates = dataclasses.replace(
        optimizer, learning_rate=optimizer.learning_rate * narrower,
        stage_two_learning_rate=None if second is None else second * narrower,
    )  # fmt: skip
    return dataclasses.replace(run, model=model, optimizer=rates)
