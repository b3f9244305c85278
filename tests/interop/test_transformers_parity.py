"""The same logits as transformers, from its folders and from ours, and the same codes and scales.

Bounds. Two float32 evaluations of one network differ by rounding. Between two additions to the
residual there are some 25 operations, each wrong by at most 2^-22 of its result (transcendental
functions; the others 2^-24), in two programs and L = 2 blocks: 2 * 2L * 25 * 2^-22 < 5e-5 of the
size of a logit. Integer products are exact in both. But where an activation lies on a border
between two int8 codes, rounding decides, and then a code differs by one. From there on codes of
that position, and of those that attend to it, round independently at worst: two roundings of one
number differ by sqrt(1/6) codes (r.m.s.) where codes are about 45 (127 is the largest of some 32
normal numbers, 2.8 standard deviations): 0.9 % of a product; of 4L = 8 products, three times as
much behind ReLU^2 and its gate, 5 %; the largest of 96 logits, three standard deviations: 15 %.

So every position must agree within FLIPPED, and half of them, for flips are rare (one value in a
million of a few thousand is on a border), within ROUNDED. A matrix whose scale is wrong by a half,
or whose rows are permuted, changes every position by more than FLIPPED.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny import changed, tiny_model

torch = pytest.importorskip("torch", reason="the extra parity has torch")
pytest.importorskip("transformers", reason="the extra parity has transformers")
pytest.importorskip("accelerate", reason="the extra parity has accelerate")

import transformers_models as theirs  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers_models import TOKENS, Variant, rope  # noqa: E402

from bitjax.infer.generator import Generator  # noqa: E402
from bitjax.infer.sampling import SamplingParams  # noqa: E402
from bitjax.interop.checkpoint import Ternary, layer_of, tensor_shapes  # noqa: E402
from bitjax.interop.huggingface import read_huggingface, write_huggingface  # noqa: E402
from bitjax.interop.huggingface.names import BITNET, is_matrix, tensor_name  # noqa: E402
from bitjax.interop.model_file import build_model, checkpoint_of, matrices_of  # noqa: E402
from bitjax.model import bit_linears  # noqa: E402
from bitjax.quant import ternary  # noqa: E402
from bitjax.tokenizer import ByteTokenizer  # noqa: E402

ROUNDED, FLIPPED = 5e-5, 0.15
# The mean of up to 2048 numbers, summed in another order: 11 * 2^-24; two reciprocals.
SCALE = 13 * 2.0**-24

OFFLINE, ONLINE = (
    {"linear_class": "autobitlinear", "quantization_mode": mode} for mode in ("offline", "online")
)
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
LLAMA3 = {
    "rope_parameters": rope(rope_type="llama3", factor=4.0, low_freq_factor=1.0,
                            high_freq_factor=3.0, original_max_position_embeddings=16),
}  # fmt: skip
LINEAR = {"rope_parameters": rope(rope_type="linear", factor=2.5)}
NORMS = {"use_rms_norm": True, "rms_norm_eps": 3e-3}
KEPT = ["lm_head", "model.layers.0", "down_proj"]

VARIANTS = {
    # as microsoft/bitnet-b1.58-2B-4T and -bf16
    "bitnet-offline": Variant("bitnet", TIED, OFFLINE),
    "bitnet-online": Variant("bitnet", TIED, ONLINE),
    "bitnet-divided": Variant("bitnet", UNTIED | {"hidden_act": "silu"}, {}),
    # as HF1BitLLM/Llama3-8B-1.58 and tiiuae's Falcon3 and Falcon-E
    "llama-divided": Variant("llama", UNTIED | {"num_key_value_heads": 1}, {}),
    "llama-head-dim": Variant("llama", UNTIED | {"head_dim": 16}, {"linear_class": "bitlinear"}),
    "llama3-rope": Variant("llama", TIED | LLAMA3, OFFLINE),
    "norms-divided": Variant("llama", UNTIED, NORMS),
    "norms-online": Variant("llama", TIED, ONLINE | NORMS | {"modules_to_not_convert": KEPT}),
    "norms-offline": Variant("bitnet", TIED, OFFLINE | NORMS | {"modules_to_not_convert": KEPT}),
    "relu2-llama": Variant("llama", TIED | {"hidden_act": "relu2"}, OFFLINE),
    # full precision
    "plain": Variant("llama", UNTIED | LINEAR | {"num_key_value_heads": None}),
    "plain-tied": Variant("llama", TIED | LLAMA3 | {"head_dim": 4}),
    "plain-bitnet": Variant("bitnet", TIED),
}


def error(ours, expected):
    """Of each position: the largest error of a logit, in units of the r.m.s. logit."""
    return np.abs(np.asarray(ours) - expected).max(axis=-1) / np.sqrt(np.mean(expected**2))


def assert_agree(model, expected, exact=False):
    found = error(model(jax.numpy.asarray(TOKENS.numpy(), jax.numpy.int32)), expected)
    if exact:
        assert found.max() < ROUNDED, found
    else:
        assert found.max() < FLIPPED, found
        assert np.median(found) < ROUNDED, found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function that saves a variant once."""
    root, saved = tmp_path_factory.mktemp("theirs"), {}

    def folder_of(name):
        if name not in saved:
            (root / name).mkdir()
            saved[name] = root / name, theirs.save(root / name, VARIANTS[name])
        return saved[name]

    return folder_of


@pytest.mark.parametrize("name", VARIANTS)
def test_theirs_into_ours(name, folder):
    path, _ = folder(name)
    expected, checkpoint = theirs.logits(path), read_huggingface(path)
    model = build_model(checkpoint)
    exact = VARIANTS[name].quantized is None
    assert_agree(model, expected, exact)
    if VARIANTS[name].online:
        assert_agree(unpacked(checkpoint), expected)
    elif name in ("bitnet-offline", "norms-offline"):
        assert_agree(changed(model, impl="reference", fuse=False), expected)


def unpacked(checkpoint):
    """The model that holds master weights."""
    model = build_model(checkpoint)
    for name, layer in bit_linears(model):
        values = [np.asarray(checkpoint.read(matrix)) for matrix in matrices_of(name)]
        layer.weight.set_value(jax.numpy.asarray(np.concatenate(values)))
    return model


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.quantized is not None])
def test_codes_and_scales_are_those_of_the_master_weights(name, folder):
    path, masters = folder(name)
    checkpoint = read_huggingface(path)
    for matrix in filter(is_matrix, tensor_shapes(checkpoint.config)):
        master = masters[tensor_name(matrix, BITNET)].numpy()
        value = checkpoint.read(matrix)
        if VARIANTS[name].online or checkpoint.config.is_float_layer(layer_of(matrix)):
            np.testing.assert_array_equal(value, master)
            continue
        codes, scale = ternary(master)
        np.testing.assert_array_equal(value.codes, codes)
        np.testing.assert_allclose(value.scale, np.reshape(scale, ()), rtol=SCALE)


@pytest.mark.parametrize("name", VARIANTS)
def test_ours_into_theirs(name, folder, tmp_path):
    """What we make of their folder, written by us, is the same model to them."""
    path, _ = folder(name)
    checkpoint = read_huggingface(path)
    form = "float32" if checkpoint.config.weights == "float" else "packed"
    write_huggingface(tmp_path / "ours", checkpoint, form, rest="float32")
    expected = theirs.logits(path)
    found = error(theirs.logits(tmp_path / "ours"), expected)
    assert found.max() < (ROUNDED if form == "float32" else FLIPPED)
    assert np.median(found) < ROUNDED
    again = read_huggingface(tmp_path / "ours")
    assert again.config == checkpoint.config
    for tensor in tensor_shapes(checkpoint.config):
        assert_same_tensor(again.read(tensor), quantized(checkpoint, tensor))


def quantized(checkpoint, name):
    """The tensor of a name, ternary if the configuration says so."""
    value, config = checkpoint.read(name), checkpoint.config
    floats = config.weights == "float" or not is_matrix(name)
    if isinstance(value, Ternary) or floats or config.is_float_layer(layer_of(name)):
        return value
    codes, scale = ternary(np.asarray(value, np.float32))
    return Ternary(np.asarray(codes, np.int8), np.reshape(scale, ()))


def assert_same_tensor(found, expected):
    if isinstance(expected, Ternary):
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scale, expected.scale)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["bitnet-online", "norms-online"])
def test_master_weights_into_theirs(name, folder, tmp_path):
    path, _ = folder(name)
    checkpoint = read_huggingface(path)
    write_huggingface(tmp_path / "ours", checkpoint, "bfloat16")  # they are bfloat16 numbers
    np.testing.assert_array_equal(theirs.logits(tmp_path / "ours"), theirs.logits(path))


def test_bfloat16_folders_as_released(folder, tmp_path):
    """Everything bfloat16, scales too: read without loss, and run by transformers as it is."""
    theirs.save(tmp_path, VARIANTS["bitnet-offline"], torch.bfloat16)
    checkpoint, whole = read_huggingface(tmp_path), read_huggingface(folder("bitnet-offline")[0])
    for name in tensor_shapes(checkpoint.config):
        value, expected = checkpoint.read(name), whole.read(name)
        if isinstance(expected, Ternary):
            rounded = torch.tensor(expected.scale).bfloat16().float().numpy()
            expected = Ternary(expected.codes, rounded)
        assert_same_tensor(value, expected)
    write_huggingface(tmp_path / "ours", checkpoint)
    np.testing.assert_array_equal(
        theirs.logits(tmp_path / "ours", torch.bfloat16), theirs.logits(tmp_path, torch.bfloat16)
    )


def test_master_weights_of_divided_layers(folder):
    """As the prequantized revisions of Falcon-E would be; transformers runs them online."""
    path, _ = folder("bitnet-online")
    theirs_online = theirs.logits(path)
    settings = json.loads((path / "config.json").read_text())
    changed_settings = settings | {"quantization_config": {"quant_method": "bitnet"}}
    (path / "config.json").write_text(json.dumps(changed_settings))
    try:
        assert_agree(build_model(read_huggingface(path)), theirs_online)
    finally:
        (path / "config.json").write_text(json.dumps(settings))


def test_the_reproduction_of_1bitllm(folder, tmp_path):
    """Other names for the sub-norms, float16 masters and no quantization_config."""
    variant = Variant("bitnet", TIED | {"hidden_act": "silu", "rope_parameters": rope(1e4)}, ONLINE)
    theirs.save(tmp_path, variant, torch.float16)
    expected = theirs.logits(tmp_path)
    held = theirs.tensors_of(tmp_path)
    names = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
    renamed = {n.replace(old, new): t for old, new in names.items()
               for n, t in held.items() if old in n}  # fmt: skip
    theirs.change(
        tmp_path, renamed, remove=[n for n in held if "sub_norm" in n],
        architectures=["BitnetForCausalLM"], model_type="llama", weight_bits=1, input_bits=8,
        quantization_config=None, rope_parameters=None,
    )  # fmt: skip
    checkpoint = read_huggingface(tmp_path)
    assert checkpoint.read("blocks.1.ffn.up").dtype == np.float16
    assert_agree(build_model(checkpoint), expected)


@pytest.mark.parametrize("shards", [1, 2])
def test_ternary_weights_in_floats(shards, tmp_path):
    """As TriLM: float16, exactly ternary, one scale for each shard of a training machine.

    Two shards hold a key-value head each, and the two heads that read it.
    """
    variant = Variant("llama", UNTIED)
    masters = theirs.save(tmp_path, variant, torch.float16)
    split = {
        name: sharded(tensor, int(name.endswith(("o_proj.weight", "down_proj.weight"))), shards)
        for name, tensor in masters.items()
        if "_proj" in name
    }
    theirs.change(tmp_path, split)
    checkpoint = read_huggingface(tmp_path)
    assert (checkpoint.config.weights, checkpoint.config.activations) == ("ternary", "float")
    up = checkpoint.read("blocks.0.ffn.up")
    assert up.scale.shape == (() if shards == 1 else (48,))
    expected = theirs.logits(tmp_path)
    assert_agree(build_model(checkpoint), expected, exact=True)
    if shards == 1:  # their scales are no bfloat16 numbers
        write_huggingface(tmp_path / "ours", checkpoint, "float32")
        assert error(theirs.logits(tmp_path / "ours"), expected).max() < ROUNDED
        assert read_huggingface(tmp_path / "ours").config == checkpoint.config


def sharded(weight, dim, shards):
    """Ternary parts, each with a scale of its own, as float16."""
    parts = []
    for i, part in enumerate(weight.chunk(shards, dim)):
        scale = (part.abs().mean() * (1 + i / 2)).half()
        parts.append((part / scale).round().clamp(-1, 1).half() * scale)
    return torch.cat(parts, dim)


def test_our_own_model_into_theirs(tmp_path):
    """A model made here, not read from them, with every matrix of another shape."""
    model = tiny_model(head_dim=8, intermediate_size=48, vocab_size=96, rope_theta=300.0)
    checkpoint = checkpoint_of(model)
    for form, rest in (("packed", "float32"), ("float32", "bfloat16")):
        write_huggingface(tmp_path / form, checkpoint, form, rest=rest)
        assert_agree(model, theirs.logits(tmp_path / form))
    assert dataclasses.replace(read_huggingface(tmp_path / "packed").config, init_std=0.3) == (
        model.config
    )


def test_greedy_text_of_our_model(tmp_path):
    """Transformers, with the tokenizer in the folder, continues a prompt as our generator does."""
    model = tiny_model(head_dim=8, intermediate_size=48)
    params = SamplingParams(max_new_tokens=24, temperature=0)
    ours = Generator(model).generate(["Grüße"], params)[0].text
    write_huggingface(tmp_path, checkpoint_of(model), rest="float32", overwrite=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("Grüße", return_tensors="pt").input_ids
    with torch.no_grad():
        found = theirs.load(tmp_path).generate(
            prompt, max_new_tokens=24, do_sample=False, pad_token_id=0
        )
    assert ByteTokenizer().decode(found[0, prompt.shape[1] :].tolist()) == ours
