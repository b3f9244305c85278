"""config.json to ModelConfig: both spellings, every family, every refusal."""

import time

import pytest

from bitjax.config import ModelConfig, RopeScaling
from bitjax.interop.huggingface.settings import parse_settings

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50,
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 5e5, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
}  # fmt: skip
MODEL = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, max_seq_len=64, activation="silu", sub_norm=False, tie_embeddings=False,
    rope_theta=5e5, norm_eps=1e-6, weights="float", activations="float",
)  # fmt: skip
BITNET = LLAMA | {
    "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_act": "relu2",
}  # fmt: skip
QUANTIZED = {"quant_method": "bitnet"}


def parse(values, **changes):
    values = {key: value for key, value in (values | changes).items() if value != "none"}
    return parse_settings(values, "folder/config.json")


def config_of(values, **changes):
    return parse(values, **changes).config


def test_a_full_precision_llama():
    assert config_of(LLAMA) == MODEL
    assert parse(LLAMA).linear_class is None


def test_what_may_be_left_out():
    short = ("architectures", "num_key_value_heads", "rope_theta", "tie_word_embeddings",
             "torch_dtype", "attention_bias", "mlp_bias", "pretraining_tp")  # fmt: skip
    config = config_of(LLAMA, **dict.fromkeys(short, "none"))
    assert (config.num_kv_heads, config.rope_theta, config.tie_embeddings) == (4, 1e4, False)
    assert config_of(BITNET, rope_theta="none").rope_theta == 5e5
    assert config_of(LLAMA, num_key_value_heads=None, head_dim=None).num_kv_heads == 4
    assert config_of(LLAMA, head_dim=14).head_dim == 14
    assert config_of(LLAMA, hidden_act="swish").activation == "silu"
    assert config_of(LLAMA, layer_types=["full_attention"] * 2) == MODEL


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("about", "scaling"),
    [
        ({"rope_type": "default"}, RopeScaling()),
        ({"type": "linear", "factor": 2}, RopeScaling("linear", 2.0)),
        ({"rope_type": "linear", "factor": 2.5}, RopeScaling("linear", 2.5)),
        (LLAMA3 | {"rope_type": "llama3"}, RopeScaling("llama3", 8.0, 1.0, 4.0, 32)),
        (LLAMA3 | {"type": "llama3", "original_max_position_embeddings": None},
         RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    ],
)  # fmt: skip
def test_rotary_positions_in_both_spellings(about, scaling):
    old = config_of(LLAMA, rope_scaling=about)
    new = config_of(LLAMA, rope_theta="none", rope_parameters=about | {"rope_theta": 5e5})
    assert old == new
    assert (old.rope_theta, old.rope_scaling) == (5e5, scaling)
    assert config_of(LLAMA, rope_parameters=about, rope_scaling=about).rope_scaling == scaling


@pytest.mark.parametrize(
    ("about", "linear_class", "online"),
    [
        ({}, "bitlinear", False),
        ({"quantization_mode": "online"}, "bitlinear", False),  # ignored, as by transformers
        ({"linear_class": "autobitlinear"}, "autobitlinear", False),
        ({"linear_class": "autobitlinear", "quantization_mode": "online"}, "autobitlinear", True),
    ],
)
def test_quantization(about, linear_class, online):
    settings = parse(BITNET, quantization_config=QUANTIZED | about)
    assert (settings.linear_class, settings.online) == (linear_class, online)
    assert (settings.config.weights, settings.config.activations) == ("ternary", "int8")
    assert settings.config.sub_norm
    assert settings.config.linear_norm_eps is None


def test_norms_of_every_matrix():
    about = QUANTIZED | {"use_rms_norm": True}
    assert config_of(LLAMA, quantization_config=about).linear_norm_eps == 1e-6
    about |= {"rms_norm_eps": 1e-4}
    assert config_of(LLAMA, quantization_config=about).linear_norm_eps == 1e-4


def test_the_reproduction_of_1bitllm():
    changes = {"architectures": ["BitnetForCausalLM"], "weight_bits": 1, "input_bits": 8}
    settings = parse(LLAMA, **changes)
    assert settings.online
    assert settings.config.weights == "ternary"
    assert settings.family.sub_norms["attention.sub_norm"] == "self_attn.inner_attn_ln"
    changes |= {"weight_bits": "none", "input_bits": "none"}
    assert parse(LLAMA, **changes) == settings


@pytest.mark.parametrize(
    ("patterns", "layers"),
    [
        (None, ()),
        ([], ()),
        (["lm_head"], ()),
        (["lm_head", "model.layers.1"],
         ("blocks.1.attention.qkv", "blocks.1.attention.o", "blocks.1.ffn.gate_up",
          "blocks.1.ffn.down")),
        (["lm_head", "down_proj"], ("blocks.0.ffn.down", "blocks.1.ffn.down")),
        (["lm_head", "model.layers.*.mlp"], ("blocks.0.ffn.gate_up", "blocks.0.ffn.down",
                                             "blocks.1.ffn.gate_up", "blocks.1.ffn.down")),
        (["lm_head", "gate_proj", "up_proj"], ("blocks.0.ffn.gate_up", "blocks.1.ffn.gate_up")),
        (["lm_head", "model.layers.1.self_attn.o_proj"], ("blocks.1.attention.o",)),
    ],
)  # fmt: skip
def test_modules_to_not_convert(patterns, layers):
    about = QUANTIZED | {"modules_to_not_convert": patterns}
    assert config_of(LLAMA, quantization_config=about).float_layers == layers


def test_patterns_mean_what_they_mean_to_transformers():
    check = pytest.importorskip(
        "transformers.quantizers.quantizers_utils", reason="the extra parity has transformers"
    )
    names = ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj",
             "model.layers.1.self_attn.q_proj"]  # fmt: skip
    from bitjax.interop.huggingface.settings import _matcher

    for pattern in ("model.layers.1", "model.layers.1.", "layers.1", "mlp", "up_proj", "_proj",
                    "model.layers.*", "model.layers.1$", "model.layers.1.mlp.up", ".*", "^lm",
                    r"model\.layers\.\d+\.mlp", "lm_head.weight"):  # fmt: skip
        text, expression = _matcher(pattern, "")
        for name in names:
            ours = name.endswith(text) or bool(expression.match(name))
            assert ours is not check.should_convert_module(name, [pattern]), (pattern, name)


def quantized(**about):
    return {"quantization_config": QUANTIZED | about}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
         "the architecture is GPT2LMHeadModel, model_type gpt2; bitjax reads LlamaForCausalLM of"),
        ({"architectures": None, "model_type": "mamba"}, "the architecture is not named, model_ty"),
        ({"architectures": None, "model_type": None}, "the architecture is not named, model_ty"),
        ({"model_type": "granite"}, "LlamaForCausalLM, model_type granite; bitjax reads"),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "the architecture is LlamaForCausalLM, X"),
        ({"architectures": [["LlamaForCausalLM"]]}, "the architecture is"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaFor.*; wanted a list"),
        ({"attention_bias": True}, "attention_bias is True, which bitjax's model does not have"),
        ({"mlp_bias": True}, "mlp_bias is True, which"),
        ({"sliding_window": 4096}, "sliding_window is 4096, which"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has attention that is not full"),
        ({"layer_types": 3}, "layer_types is 3; wanted a list"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; bitjax has silu, swish, relu2"),
        ({"hidden_act": "none"}, "hidden_act is missing; wanted a name"),
        ({"vocab_size": "none"}, "vocab_size is missing; wanted an integer"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5; wanted an integer"),
        ({"vocab_size": True}, "vocab_size is True; wanted an integer"),
        ({"vocab_size": "50"}, "vocab_size is '50'; wanted an integer"),
        ({"vocab_size": -1}, "model.vocab_size=-1 must be above 0"),
        ({"num_attention_heads": 0}, "must be above 0"),
        ({"num_attention_heads": 3}, "num_heads=3 is not a multiple of model.num_kv_heads=2"),
        ({"head_dim": 7}, "model.head_dim=7 is odd"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; more than 4096 are refu"),
        ({"rms_norm_eps": "none"}, "rms_norm_eps is missing; wanted a number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is beyond all floating-point numbers"),
        ({"rms_norm_eps": float("inf")}, "model.norm_eps=inf is not of type float"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; wanted true or false"),
        ({"rope_theta": "big"}, "rope_theta is 'big'; wanted a number"),
        ({"rope_theta": 0}, "model.rope_theta=0.0 must be above 0"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; wanted an object"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}},
         "rope_scaling: rope_type is 'yarn'; bitjax has default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'; bitjax"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing; wanted a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor=0.0 must be"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 4}},
         "rope_scaling: rope_scaling.low_freq_factor=4.0 is not below"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "default"}},
         "rope_parameters and rope_scaling contradict each other"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
         "rope_parameters: partial_rotary_factor is 0.25, which"),
        ({"quantization_config": {}}, "quantization_config: quant_method is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'; bitjax"),
        ({"quantization_config": "bitnet"}, "quantization_config is 'bitnet'; wanted an object"),
        (quantized(linear_class="linear"), "linear_class is 'linear' and quantization_mode"),
        (quantized(quantization_mode="on"), "quantization_mode 'on'; wanted bitlinear or autobit"),
        (quantized(use_rms_norm=1), "use_rms_norm is 1; wanted true or false"),
        (quantized(use_rms_norm=True, rms_norm_eps=-1), "linear_norm_eps=-1.0 must be above"),
        (quantized(modules_to_not_convert="lm_head"), "modules_to_not_convert is 'lm_head'; want"),
        (quantized(modules_to_not_convert=[1]), "modules_to_not_convert holds 1; wanted names"),
        (quantized(modules_to_not_convert=["(a*)*b"]), "names of modules with at most 2 wildcards"),
        (quantized(modules_to_not_convert=["a*b*c*"]), "names of modules with at most 2 wildcards"),
        (quantized(modules_to_not_convert=["*a"]), "holds '\\*a': nothing to repeat"),
        (quantized(modules_to_not_convert=["lm_head", "q_proj"]),
         "keeps only some of the matrices of blocks.0.attention.qkv, which bitjax stacks as one"),
        (quantized(modules_to_not_convert=["up_proj"]), "of blocks.0.ffn.gate_up, which"),
        (quantized(modules_to_not_convert=["x"] * 200_000), "200,000 entries; that is more than"),
        (quantized(modules_to_not_convert=["q_proj"], linear_class="autobitlinear",
                   quantization_mode="online"), "leaves lm_head out, which makes the head ternary"),
        ({"weight_bits": 2, "input_bits": 8}, "weight_bits is 2 and input_bits 8; bitjax reads 1"),
        ({"weight_bits": 1, "input_bits": 4}, "weight_bits is 1 and input_bits 4; bitjax reads 1"),
    ],
)  # fmt: skip
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(LLAMA, **changes)
    assert str(caught.value).startswith("folder/config.json: ")
    assert str(caught.value).count("config.json") == 1
    assert len(str(caught.value)) < 400


def test_patterns_take_no_time():
    """The most that is accepted, each made to be tried in many ways."""
    patterns = ["lm_head"] + [f".*.*{'x' * i}" for i in range(60)]
    about = QUANTIZED | {"modules_to_not_convert": patterns}
    started = time.process_time()
    config_of(LLAMA, num_hidden_layers=4096, quantization_config=about)
    assert time.process_time() - started < 20
