"""Configurations: strict types and ranges, round trips, typed overrides."""

import dataclasses
import json
import re

import pytest

from bitjax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    RunConfig,
    TrainConfig,
    from_dict,
    from_json,
    override,
    to_json,
)

SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "rope_scaling": RopeScaling,
    "mesh": MeshConfig,
}
# Every field away from its default, so that a field lost on the way is noticed.
UNUSUAL = RunConfig(
    ModelConfig(
        vocab_size=300, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=6,
        num_kv_heads=2, head_dim=8, max_seq_len=77, activation="silu", sub_norm=False,
        inner_norm=True, float_layers=("blocks.0.*", "*.down"), tie_embeddings=False,
        rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.5, 3.0, 4096), norm_eps=1e-6,
        weights="binary", activations="float", weight_scale="group", weight_group=8,
        hadamard=True, init_std=0.1,
    ),
    DataConfig(text="a/ä \"quoted\" b.txt", documents="apart", valid_fraction=0.25),
    OptimizerConfig(
        learning_rate=0.1, stage_two_learning_rate=None, weight_decay=0.0,
        stage_two_weight_decay=None, stage_two_at=1.0,
        weight_decay_stage_two_at=0.3, falling="cosine", warmup_steps=0, b1=0.0, b2=0.5, eps=1e-6,
        clip_norm=2.5,
    ),
    TrainConfig(
        steps=7, batch_size=6, seq_len=77, accumulate=3, compute_dtype="bfloat16", seed=5,
        log_every=2, eval_every=0, checkpoint_every=3, keep_checkpoints=1, keep_best=False,
        on_spike="skip", spike_factor=9.5, spike_window=7, spike_limit=3,
        log_codes=False, tensorboard=True, wandb="ladder", peak_gflops=50.5,
        quantization_warmup_steps=4, remat=True, start_from="runs/a", objective="dpo",
        loss_reduction="sum", dpo_beta=0.4, stochastic_rounding="weights",
    ),
    MeshConfig(data=3, fsdp=2, tensor=5),
)  # fmt: skip
# And those that no configuration may have beside inner_norm and data.text.
NORMS = dataclasses.replace(
    UNUSUAL,
    model=dataclasses.replace(UNUSUAL.model, inner_norm=False, linear_norm_eps=1e-7),
    data=dataclasses.replace(UNUSUAL.data, text="", mixture=("a b=0.5", "c=2")),
)
# And what goes with neither bfloat16, nor a warm-up, nor a mesh.
PRODUCTS = RunConfig(train=TrainConfig(products="integer", attention="fused"))
ALL = (RunConfig(), UNUSUAL, NORMS, PRODUCTS)


def part(config, section):
    return getattr(config.model if section == "rope_scaling" else config, section)


def test_unusual_covers_every_field():
    for section in SECTIONS:
        for field in dataclasses.fields(part(RunConfig(), section)):
            values = {getattr(part(c, section), field.name) for c in ALL}
            assert len(values) == 2, f"{section}.{field.name}"


def plain(value):
    """What JSON makes of a configuration's fields."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("config", [*ALL, ModelConfig(), UNUSUAL.optimizer])
def test_json_round_trip(config):
    text = to_json(config)
    assert from_json(type(config), text) == config
    assert hash(from_json(type(config), text)) == hash(config)
    assert json.loads(text) == plain(dataclasses.asdict(config))


def test_left_out_keys_take_defaults():
    assert from_dict(RunConfig, {}) == RunConfig()
    assert from_dict(RunConfig, {"train": {"steps": 3}}) == RunConfig(train=TrainConfig(steps=3))


@pytest.mark.parametrize("config", [UNUSUAL, *(part(UNUSUAL, s) for s in SECTIONS)])
def test_frozen(config):
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{field}'"):
        setattr(config, field, getattr(config, field))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ModelConfig is not valid JSON: Expecting value: line 1"),
        ('{"vocab_size": 5', "ModelConfig is not valid JSON: Expecting ',' delimiter"),
        ("[" * 100_000, "ModelConfig is not valid JSON: .*recursion"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "ModelConfig is not valid JSON: .*4300 digits"),
        ("[1, 2]", r"ModelConfig is not an object of settings: \[1, 2\]"),
        ("null", "ModelConfig is not an object of settings: None"),
        ('{"vocab": 5}', "unknown setting vocab; ModelConfig has vocab_size, hidden_size,"),
        ('{"norm_eps": NaN}', "model.norm_eps=nan is not of type float"),
        ('{"norm_eps": 1e999}', "model.norm_eps=inf is not of type float"),
    ],
)
def test_json_errors(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(ModelConfig, text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"modle": {}},
            "unknown setting modle; RunConfig has model, data, optimizer, train, mesh$",
        ),
        ({"model": {"depth": 2}}, "unknown setting model.depth; model has vocab_size, "),
        ({"train": 5}, "train is not an object of settings: 5"),
        ({"train": None}, "train is not an object of settings: None"),
        ({"model": {"hidden_size": "64"}}, "model.hidden_size='64' is not of type int"),
        (
            {"model": {"rope_scaling": {"kind": "yarn"}}},
            "rope_scaling.kind='yarn' is not one of none, linear, llama3$",
        ),
        (
            {"model": {"rope_scaling": {"base": 1}}},
            "unknown setting model.rope_scaling.base; model.rope_scaling has kind, factor,",
        ),
        ({"model": {"rope_scaling": 8}}, "model.rope_scaling is not an object of settings: 8"),
        ({"model": {"float_layers": [1]}}, r"model.float_layers=\(1,\) is not a list of strings"),
        ({"model": {"float_layers": "*"}}, r"model.float_layers='\*' is not a list of strings"),
    ],
)
def test_section_errors(data, message):
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, data)


def test_a_section_of_the_wrong_class_is_refused():
    with pytest.raises(ValueError, match=r"run\.model=TrainConfig\(.* is not of type ModelConfig"):
        RunConfig(model=TrainConfig())


# For every declared type, values that are not of it, and how the type is called.
WRONG = {
    "int": ((1.0, "1", None, True, float("nan"), [1]), "of type int"),
    "float": (("1", None, True, float("nan"), float("inf"), -float("inf"), 10**400, 1j, [1.0]),
              "of type float"),
    "float | None": (("1", True, float("nan"), float("inf")), "of type float or None"),
    "bool": ((0, 1, "true", None), "of type bool"),
    "str": ((b"x", None, 3), "of type str"),
    "Products": ((3, "float32"), "one of xla, integer"),
    "TrainAttention": ((3, "integer"), "one of xla, fused"),
    "DType": (("float16", None, 32), "one of float32, bfloat16"),
    "WeightQuantizer": (("int4", None, []),
                        "one of ternary, ternary_median, ternary_learned, binary, float"),
    "WeightScale": (("column", None), "one of tensor, row, group"),
    "ActivationQuantizer": (("int2", None), "one of int8, int4, float"),
    'Literal["silu", "relu2"]': (("gelu", None), "one of silu, relu2"),
    'Literal["linear", "cosine"]': (("square", None), "one of linear, cosine"),
    'Literal["joined", "apart"]': (("mixed", None), "one of joined, apart"),
    'Literal["next_token", "dpo"]': (("ppo", None), "one of next_token, dpo"),
    'Literal["none", "weights", "activations", "both"]': (
        ("all", None), "one of none, weights, activations, both",
    ),
    'Literal["mean", "sum"]': (("max", None), "one of mean, sum"),
    'Literal["stop", "skip", "rewind"]': (("pray", None), "one of stop, skip, rewind"),
    'Literal["none", "linear", "llama3"]': (("yarn", None), "one of none, linear, llama3"),
    "RopeScaling": (({}, None, ModelConfig()), "of type RopeScaling"),
    "tuple[str, ...]": (("*", None, ["*"], (1,), ("a", None)), "a list of strings"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("section", "field"),
    [(s, f.name) for s, kind in SECTIONS.items() for f in dataclasses.fields(kind)],
)
def test_wrong_types_are_refused(section, field):
    declared = {f.name: f.type for f in dataclasses.fields(SECTIONS[section])}[field]
    values, wanted = WRONG[declared.replace("'", '"')]
    for value in values:
        shown = re.escape(f"{section}.{field}={value!r} is not {wanted}")
        with pytest.raises(ValueError, match=f"^{shown}$"):
            SECTIONS[section](**{field: value})


def test_an_int_is_a_fine_float():
    assert ModelConfig(rope_theta=10_000) == ModelConfig()


POSITIVE = {
    "model": ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
              "num_kv_heads", "head_dim", "max_seq_len", "rope_theta", "norm_eps", "init_std"),
    "rope_scaling": ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"),
    "optimizer": ("learning_rate", "eps", "clip_norm"),
    "train": ("steps", "batch_size", "seq_len", "accumulate", "log_every", "checkpoint_every",
              "keep_checkpoints"),
}  # fmt: skip


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(("section", "field"), [(s, f) for s in POSITIVE for f in POSITIVE[s]])
def test_positive(section, field, value):
    with pytest.raises(ValueError, match=f"^{section}.{field}={value} must be above 0$"):
        SECTIONS[section](**{field: value})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ModelConfig, {"weights": "float", "weight_scale": "row"},
         "model.weight_scale='row' is for quantised weights; model.weights='float' has no scales"),
        (ModelConfig, {"weight_group": 8}, "model.weight_group=8 with "
         "model.weight_scale='tensor'; groups have a size above 0, other "
         "scales have 0"),
        (ModelConfig, {"weight_scale": "group"}, "model.weight_group=0 with "
         "model.weight_scale='group'; groups have a size above 0, other "
         "scales have 0"),
        (ModelConfig, {"weight_scale": "group", "weight_group": 48},
         "model.hidden_size=128 is not a multiple of model.weight_group=48"),
        (ModelConfig, {"hadamard": True, "intermediate_size": 33},
         "model.intermediate_size=33 is odd; model.hadamard needs it even"),
        (ModelConfig, {"hadamard": True, "weights": "float", "activations": "float"},
         "model.hadamard is for quantised models; weights and activations are float"),
        (TrainConfig, {"quantization_warmup_steps": 1000},
         "train.quantization_warmup_steps=1000 is not from 0 to below train.steps=1000"),
        (TrainConfig, {"quantization_warmup_steps": -1}, "train.quantization_warmup_steps=-1 is "
         "not from 0 to below train.steps=1000"),
        (ModelConfig, {"num_heads": 4, "num_kv_heads": 3},
         "model.num_heads=4 is not a multiple of model.num_kv_heads=3"),
        (ModelConfig, {"num_heads": 2, "num_kv_heads": 4},
         "model.num_heads=2 is not a multiple of model.num_kv_heads=4"),
        (ModelConfig, {"head_dim": 7}, "model.head_dim=7 is odd; rotary embedding needs it even"),
        (ModelConfig, {"linear_norm_eps": 0}, "model.linear_norm_eps=0 must be above 0"),
        (ModelConfig, {"linear_norm_eps": 1e-6, "inner_norm": True},
         "model.inner_norm and model.linear_norm_eps both put a norm before every matrix; choose "
         "one"),
        (ModelConfig, {"num_layers": 1, "float_layers": ("*",) * 5},
         "model.float_layers has 5 patterns for 4 linear layers"),
        (RopeScaling, {"low_freq_factor": 4.0},
         "rope_scaling.low_freq_factor=4.0 is not below rope_scaling.high_freq_factor=4.0"),
        (DataConfig, {"valid_fraction": 0}, "data.valid_fraction=0 is not between 0 and 1"),
        (DataConfig, {"valid_fraction": 1.0}, "data.valid_fraction=1.0 is not between 0 and 1"),
        (OptimizerConfig, {"stage_two_learning_rate": -1e-3},
         "optimizer.stage_two_learning_rate=-0.001 is negative"),
        (OptimizerConfig, {"weight_decay": -1}, "optimizer.weight_decay=-1 is negative"),
        (OptimizerConfig, {"stage_two_weight_decay": -1},
         "optimizer.stage_two_weight_decay=-1 is negative"),
        (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps=-1 is negative"),
        (OptimizerConfig, {"b1": 1.0}, r"optimizer.b1 is not in \[0, 1\)"),
        (OptimizerConfig, {"b1": -0.1}, r"optimizer.b1 is not in \[0, 1\)"),
        (OptimizerConfig, {"b2": 1.0}, r"optimizer.b2 is not in \[0, 1\)"),
        (OptimizerConfig, {"stage_two_at": 0.0}, r"optimizer.stage_two_at is not in \(0, 1\]"),
        (OptimizerConfig, {"stage_two_at": 1.1}, r"optimizer.stage_two_at is not in \(0, 1\]"),
        (TrainConfig, {"products": "integer", "compute_dtype": "bfloat16"},
         "train.products='integer' wants train.compute_dtype='float32' and "
         "train.quantization_warmup_steps=0; got 'bfloat16' and 0"),
        (TrainConfig, {"products": "integer", "stochastic_rounding": "both"},
         "train.products='integer' rounds activations to nearest; got "
         "train.stochastic_rounding='both'"),
        (TrainConfig, {"products": "integer", "quantization_warmup_steps": 2},
         "train.products='integer' wants train.compute_dtype='float32' and "
         "train.quantization_warmup_steps=0; got 'float32' and 2"),
        (RunConfig, {"train": TrainConfig(products="integer"),
                     "model": ModelConfig(activations="int4")},
         "train.products='integer' wants quantised weights with a scale a tensor or row, and int8 "
         "activations; got model.weights='ternary', model.weight_scale='tensor', "
         "model.activations='int4'"),
        (RunConfig, {"train": TrainConfig(products="integer"), "mesh": MeshConfig(data=2)},
         "train.products='integer' runs on one device; the mesh has 2"),
        (TrainConfig, {"attention": "fused", "compute_dtype": "bfloat16"},
         "train.attention='fused' wants train.compute_dtype='float32'; got 'bfloat16'"),
        (RunConfig, {"train": TrainConfig(attention="fused"), "mesh": MeshConfig(data=2)},
         "train.attention='fused' runs on one device; the mesh has 2"),
        (RunConfig, {"train": TrainConfig(attention="fused"), "model": ModelConfig(head_dim=24)},
         "train.attention='fused' wants heads of a multiple of 16 dimensions, 512 at most; got "
         "model.head_dim=24"),
        (TrainConfig, {"eval_every": -1}, "train.eval_every=-1 is negative"),
        (TrainConfig, {"seed": -1}, "train.seed=-1 is negative"),
        (TrainConfig, {"batch_size": 10, "accumulate": 4},
         "train.batch_size=10 is not a multiple of train.accumulate=4"),
        (RunConfig, {"train": TrainConfig(seq_len=257)},
         "train.seq_len=257 exceeds model.max_seq_len=256"),
    ],
)  # fmt: skip
def test_ranges(kind, settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind(**settings)


def test_full_precision_twin_changes_nothing_but_the_quantisers():
    twin = UNUSUAL.model.full_precision_twin()
    assert (twin.weights, twin.activations) == ("float", "float")
    assert (
        dataclasses.replace(
            twin, weights="binary", weight_scale="group", weight_group=8, hadamard=True
        )
        == UNUSUAL.model
    )


@pytest.mark.parametrize(
    ("setting", "section", "value"),
    [
        ("train.steps=12", "train", {"steps": 12}),
        ("optimizer.learning_rate=3e-4", "optimizer", {"learning_rate": 3e-4}),
        ("optimizer.learning_rate=1", "optimizer", {"learning_rate": 1.0}),
        ("optimizer.stage_two_learning_rate=None", "optimizer", {"stage_two_learning_rate": None}),
        ("optimizer.stage_two_learning_rate=null", "optimizer", {"stage_two_learning_rate": None}),
        ("optimizer.stage_two_learning_rate=0.5", "optimizer", {"stage_two_learning_rate": 0.5}),
        ("model.sub_norm=false", "model", {"sub_norm": False}),
        ("model.inner_norm=True", "model", {"inner_norm": True}),
        ("model.weights=binary", "model", {"weights": "binary"}),
        ("model.linear_norm_eps=1e-6", "model", {"linear_norm_eps": 1e-6}),
        (
            "model.float_layers=blocks.0.*,*.down",
            "model",
            {"float_layers": ("blocks.0.*", "*.down")},
        ),
        ("model.float_layers=", "model", {"float_layers": ()}),
        ("model.rope_scaling.factor=8", "model", {"rope_scaling": RopeScaling(factor=8.0)}),
        ("train.compute_dtype=bfloat16", "train", {"compute_dtype": "bfloat16"}),
        ("data.text=5", "data", {"text": "5"}),
        ("data.text=none", "data", {"text": "none"}),
        ("data.text=a=b c.txt", "data", {"text": "a=b c.txt"}),
        ("data.text=", "data", {"text": ""}),
        (" train.steps = 9 ", "train", {"steps": 9}),
    ],
)
def test_override_is_typed_by_the_field(setting, section, value):
    base = RunConfig()
    wanted = dataclasses.replace(
        base, **{section: dataclasses.replace(getattr(base, section), **value)}
    )
    got = override(base, [setting])
    assert got == wanted
    (name,) = value
    assert type(getattr(getattr(got, section), name)) is type(value[name])
    assert base == RunConfig()


def test_overrides_apply_together_and_the_last_wins():
    # Neither setting alone would be valid: seq_len must not exceed max_seq_len.
    config = override(
        UNUSUAL, ["train.seq_len=500", "model.max_seq_len=400", "model.max_seq_len=500"]
    )
    assert (config.train.seq_len, config.model.max_seq_len) == (500, 500)
    assert override(UNUSUAL, []) == UNUSUAL
    assert override(ModelConfig(), ["num_layers=9"]) == ModelConfig(num_layers=9)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps", "setting 'train.steps' is not of the form section.key=value"),
        ("", "setting '' is not of the form section.key=value"),
        ("=5", "unknown setting ; known here: model, data, optimizer, train"),
        ("steps=5", "unknown setting steps; known here: model, data, optimizer, train"),
        ("train.step=5", "unknown setting train.step; known here: steps, batch_size"),
        ("trian.steps=5", "unknown setting trian.steps: no section 'trian'"),
        ("train.steps.x=5", "unknown setting train.steps.x: no section 'steps'"),
        ("model=5", "model=5 is not of type ModelConfig"),
        ("train.steps=1.5", "train.steps=1.5 is not of type int"),
        ("train.steps=ten", "train.steps=ten is not of type int"),
        ("train.steps=none", "train.steps=none is not of type int"),
        ("train.steps=0", "train.steps=0 must be above 0"),
        ("optimizer.b1=high", "optimizer.b1=high is not of type float"),
        ("optimizer.b1=nan", "optimizer.b1=nan is not of type float"),
        ("optimizer.stage_two_weight_decay=x",
         "optimizer.stage_two_weight_decay=x is not of type float or None"),
        ("model.sub_norm=1", "model.sub_norm=1 is not of type bool"),
        ("model.weights=int4", "model.weights=int4 is not one of ternary, ternary_median, "),
    ],
)  # fmt: skip
def test_override_errors(setting, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        override(RunConfig(), [setting])


def test_a_large_integer_for_a_float_becomes_one():
    config = from_json(ModelConfig, '{"init_std": 4611686018427387903}')
    assert (config.init_std, type(config.init_std)) == (2.0**62, float)
