"""The study's recipe: twins of 0.1M to 5.6M parameters on articles of Wikipedia, byte by byte.

Learning rates are swept for every size and arm (`StudyConfig`); those of `get_config` matter only
by the ratio of stage two to stage one, which is that of the b1.58 training tips.

Command: see README.md
Time:    the plan's predictions; plan.json
"""

from bitjax.config import Group, ModelConfig, OptimizerConfig, RunConfig, StudyConfig, TrainConfig

RETROFIT = ("continual", "ptq_ternary", "ptq_int4", "ptq_int8")
SMALL = ("64x2", "96x2", "96x4", "128x4")  # 0.11M, 0.22M, 0.44M and 0.85M


def get_config() -> RunConfig:
    """The ternary run; sequences of 128 bytes train about a quarter faster than those of 256.

    Attention is fused in every arm. Products of layers with codes are integer: their values are the
    same, backward gradients are rounded to bfloat16, which the full-precision twin is spared.
    """
    model = ModelConfig(
        hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, num_kv_heads=4,
        head_dim=32, max_seq_len=128, activation="relu2", init_std=0.06,
    )  # fmt: skip
    optimizer = OptimizerConfig(learning_rate=1.5e-3, stage_two_learning_rate=1e-3)
    train = TrainConfig(
        batch_size=8, seq_len=128, checkpoint_every=1000, products="integer", attention="fused"
    )
    return RunConfig(model, optimizer=optimizer, train=train)


def get_study() -> StudyConfig:
    """Pairs everywhere; three seeds on eight cells; other arms where their float runs are."""
    groups = (
        Group(SMALL, (10, 20, 40)),
        Group(SMALL[:3], (80,)),
        Group(("64x2",), (10, 20, 40, 80), seeds=3),
        Group(("96x2", "96x4"), (10, 20), seeds=3),
        Group(("64x2", "96x2"), (160, 320)),
        Group(("160x5",), (5, 10, 20)),
        Group(("192x7",), (5, 10)),
        Group(("256x7",), (5,)),
        Group(("64x2", "96x4"), (20, 80), arms=("binary", "ternary_float_activations")),
        Group(SMALL, (20, 40), arms=RETROFIT),
        Group(SMALL[:3], (80,), arms=RETROFIT),
    )
    return StudyConfig(groups, rates=(2e-3, 4e-3, 8e-3), sweep_tokens=2_000_000)
