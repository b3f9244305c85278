import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import packing_oracle
import pytest
from flax import nnx
from tiny import tiny_config

from bitjax.config import RopeScaling
from bitjax.model.layers import (
    BitLinear,
    FeedForward,
    RMSNorm,
    rotary_angles,
    rotary_frequencies,
)
from bitjax.ops.reference import rotate
from bitjax.packing import pack
from bitjax.quant import WEIGHT_QUANTIZERS, int8_per_token

STACKED = (16, 3, 5)  # rows of three matrices in one layer of 24


def linear(*segments, cols=20, **changes):
    """Stacked matrices of 1, 1/2, 1/4 ... of the initial scale, so that each scale is another."""
    segments = segments or (24,)
    config = tiny_config(init_std=0.5, **changes)
    layer = BitLinear(cols, *segments, config=config, rngs=nnx.Rngs(0))
    sizes = np.repeat(0.5 ** np.arange(len(segments)), segments)[:, None]
    layer.weight.set_value(layer.weight[...] * sizes.astype(np.float32))
    return layer


def pack_layer(layer, layout="ternary2"):
    """Replace the float weights by packed ones, as `pack_model` does."""
    codes, scale = WEIGHT_QUANTIZERS[layer.weights](layer.weight[...], layer.segments)
    scale = np.ravel(scale)
    layer.weight.set_value(pack(codes, scale if layer.segments else scale[0], layout))


def oracle_weights(layer):
    """Ternary codes and the scale of each row, every stacked matrix by itself."""
    w = np.asarray(layer.weight[...])
    ends = np.cumsum((0, *(layer.segments or (len(w),))))
    parts = [oracle.absmean_ternary(w[a:b]) for a, b in itertools.pairwise(ends)]
    codes = np.concatenate([codes for codes, _ in parts])
    return codes, np.concatenate([np.full(len(codes), scale) for codes, scale in parts])


def inputs(*shape):
    return jax.random.normal(jax.random.key(7), shape)


def test_ternary_forward_is_the_equation():
    layer, x = linear(), inputs(2, 3, 20)
    codes, scale = oracle.absmean_ternary(layer.weight[...])
    exact = oracle.ternary_product(x, codes, scale)
    # absmean within 2^-18 of the exact mean of 480 values; then three roundings.
    np.testing.assert_allclose(np.asarray(layer(x), np.float64), exact, rtol=2**-18)


def test_stacked_matrices_are_the_separate_ones():
    """The same initial weights, drawn in the same order; the same outputs to the bit."""
    rngs, config, x = nnx.Rngs(0), tiny_config(init_std=0.5), inputs(2, 3, 20)
    apart = [BitLinear(20, n, config=config, rngs=rngs) for n in STACKED]
    layer = BitLinear(20, *STACKED, config=config, rngs=nnx.Rngs(0))
    assert layer.segments == STACKED
    assert apart[0].segments == ()
    np.testing.assert_array_equal(
        layer.weight[...], jnp.concatenate([one.weight[...] for one in apart])
    )
    np.testing.assert_array_equal(layer(x), jnp.concatenate([one(x) for one in apart], -1))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("layout", ["ternary2", "ternary1.6"])
@pytest.mark.parametrize("weights", ["ternary", "binary"])
@pytest.mark.parametrize("segments", [(24,), STACKED])
def test_packed_layer_equals_the_trained_one_to_the_bit(segments, weights, layout, impl, fuse):
    layer, x = linear(*segments, weights=weights), inputs(2, 3, 20)
    trained = np.asarray(layer(x))
    pack_layer(layer, layout)
    layer.impl, layer.fuse = impl, fuse
    np.testing.assert_array_equal(np.asarray(layer(x)), trained)


@pytest.mark.parametrize("segments", [(24,), STACKED])
def test_packed_weights_with_float_activations(segments):
    layer, x = linear(*segments, activations="float"), inputs(5, 20)
    trained = np.asarray(layer(x))
    codes, scale = oracle_weights(layer)
    layer.weight.set_value(pack(codes, scale))
    # The same product with the scale inside or outside the sum of 20 terms.
    np.testing.assert_allclose(np.asarray(layer(x)), trained, rtol=1e-5, atol=1e-5)
    exact = np.asarray(x, np.float64) @ (codes * scale[:, None].astype(np.float64)).T
    np.testing.assert_allclose(np.asarray(layer(x)), exact, rtol=1e-5, atol=1e-5)


# Neighbours: gate before, norm before, residual after

NEIGHBOURS = [
    ("none", False, False),
    ("none", True, False),
    ("none", False, True),
    ("none", True, True),
    ("relu2", False, False),
    ("relu2", True, True),
    ("silu", False, True),
    ("silu", True, False),
]


def neighbours(gate, normed, added, dtype=jnp.float32):
    """x and the arguments of a call of a layer 24 x 20."""
    x = (3 * inputs(4, 40 if gate != "none" else 20)).astype(dtype)
    norm = RMSNorm(20, 1e-5) if normed else None
    if norm is not None:
        norm.scale.set_value(jnp.linspace(0.5, 2, 20))
    residual = jax.random.normal(jax.random.key(9), (4, 24)).astype(dtype) if added else None
    return x, {"gate": gate, "norm": norm, "residual": residual}


@pytest.mark.parametrize("form", ["trained", "fused", "unfused", "fused reference"])
@pytest.mark.parametrize(("gate", "normed", "added"), NEIGHBOURS)
def test_gate_norm_and_residual(form, gate, normed, added):
    layer = linear(*STACKED)
    codes, scale = oracle_weights(layer)
    if form != "trained":
        pack_layer(layer)
        layer.fuse = form != "unfused"
        layer.impl = "reference" if form == "fused reference" else "auto"
    x, call = neighbours(gate, normed, added)
    # Gate, norm and weight scale round a few dozen times in all: three short chains, and sums of
    # 20 squares and of at most 320 weights, summed in parts.
    exact, error = packing_oracle.bounded(
        np.asarray(x), codes, scale, units=64, gate=gate, eps=1e-5,
        norm=None if call["norm"] is None else np.asarray(call["norm"].scale[...], np.float64),
        residual=None if call["residual"] is None else np.asarray(call["residual"]),
    )  # fmt: skip
    assert np.median(error) < 1e-4
    y = np.asarray(layer(x, **call), np.float64)
    assert y.shape == (4, 24)
    np.testing.assert_array_less(np.abs(y - exact), error)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("gate", "normed", "added"), NEIGHBOURS)
def test_unfused_neighbours_equal_the_trained_layers_to_the_bit(gate, normed, added, dtype):
    layer = linear(*STACKED)
    x, call = neighbours(gate, normed, added, dtype)
    trained = layer(x, **call)
    assert trained.dtype == dtype
    pack_layer(layer)
    layer.fuse = False
    packed = layer(x, **call)
    assert packed.dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(packed.astype(jnp.float32)), np.asarray(trained.astype(jnp.float32))
    )
    layer.fuse = True
    fused = np.asarray(layer(x, **call).astype(jnp.float32))
    # Of int8 codes at a tie, of a bfloat16 output, and of the gate in bfloat16 or float32.
    limit = (0.02 if dtype == jnp.float32 else 0.1) * np.abs(fused).max()
    assert np.abs(fused - np.asarray(trained.astype(jnp.float32))).max() < limit


def test_a_fused_product_is_one_custom_call():
    layer = linear(*STACKED)
    pack_layer(layer)
    layer.impl = "ffi"
    x, call = neighbours("relu2", True, True)

    def lowered():
        run = jax.jit(lambda x, norm, residual: layer(
            x, gate="relu2", norm=norm, residual=residual
        ))  # fmt: skip
        return run.lower(x, call["norm"], call["residual"]).as_text()

    fused = lowered()
    layer.fuse = False
    unfused = lowered()
    assert fused.count("@bitjax_packed_matmul") == unfused.count("@bitjax_packed_matmul") == 1
    assert "rsqrt" not in fused  # the norm is inside
    assert "rsqrt" in unfused


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("with_outer", [True, False])
def test_inner_norm_of_a_packed_layer(with_outer, fuse):
    """Its own norm is fused; beside a second one nothing is, so all is equal to the bit."""
    layer = linear(*STACKED, inner_norm=True)
    layer.norm.scale.set_value(jnp.linspace(2, 0.25, 20))
    x, call = neighbours("relu2", with_outer, True)
    trained = np.asarray(layer(x, **call))
    pack_layer(layer)
    layer.fuse = fuse
    packed = np.asarray(layer(x, **call))
    if fuse and not with_outer:
        np.testing.assert_allclose(packed, trained, atol=0.02 * np.abs(trained).max())
        assert np.median(np.abs(packed - trained)) < 1e-5
    else:
        np.testing.assert_array_equal(packed, trained)


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_neighbours_of_a_layer_with_float_weights(activations):
    layer = linear(weights="float", activations=activations)
    x, call = neighbours("silu", True, True)
    first, second = np.split(np.asarray(x, np.float64), 2, axis=1)
    h = first / (1 + np.exp(-first)) * second
    h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * np.linspace(0.5, 2, 20)
    if activations == "int8":
        codes, scale = oracle.absmax_int8(h)
        h = codes * scale
    exact = h @ np.asarray(layer.weight[...], np.float64).T + np.asarray(call["residual"])
    np.testing.assert_allclose(np.asarray(layer(x, **call)), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu2", "silu"])
@pytest.mark.parametrize("sub_norm", [True, False])
def test_feed_forward_splits_gate_and_up(activation, sub_norm):
    """Gate is the first half: with float layers, the equation in float64."""
    config = tiny_config(
        weights="float", activations="float", activation=activation, sub_norm=sub_norm
    )
    ffn, x = FeedForward(config, rngs=nnx.Rngs(0)), inputs(2, 3, 32)
    norm = RMSNorm(32, 1e-5)
    norm.scale.set_value(jnp.linspace(0.5, 2, 32))
    exact = np.asarray(x, np.float64)
    n = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * np.linspace(0.5, 2, 32)
    w = np.asarray(ffn.gate_up.weight[...], np.float64)
    gate, up = n @ w[:24].T, n @ w[24:].T
    h = (gate / (1 + np.exp(-gate)) if activation == "silu" else np.maximum(gate, 0) ** 2) * up
    if sub_norm:
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
    down = h @ np.asarray(ffn.down.weight[...], np.float64).T
    np.testing.assert_allclose(np.asarray(ffn(x, norm)), exact + down, rtol=1e-4, atol=1e-4)
    h = np.asarray(ffn(x, None))  # without a norm the input itself is read
    assert np.abs(h - (exact + down)).max() > 0.1


def test_float_layer_is_a_plain_product():
    layer, x = linear(weights="float", activations="float"), inputs(4, 20)
    exact = np.asarray(x, np.float64) @ np.asarray(layer.weight[...], np.float64).T
    np.testing.assert_allclose(np.asarray(layer(x)), exact, rtol=1e-5, atol=1e-5)


def test_inner_norm_comes_before_quantisation():
    layer, x = linear(inner_norm=True), inputs(4, 20) * 50
    normed = RMSNorm(20, 1e-5)(x)
    plain = linear()
    plain.weight.set_value(layer.weight[...])
    np.testing.assert_array_equal(np.asarray(layer(x)), np.asarray(plain(normed)))


@pytest.mark.parametrize("weights", ["ternary", "binary", "float"])
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("segments", [(24,), STACKED])
def test_gradients_are_straight_through(segments, weights, activations):
    """dL/dx = dy @ dequant(W) and dL/dW = dy.T @ dequant(x), as if the quantisers were identity."""
    layer = linear(*segments, weights=weights, activations=activations)
    x = inputs(6, 20)
    graph, params = nnx.split(layer)
    upstream = jax.random.normal(jax.random.key(8), (6, 24))

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params)(x) * upstream)

    by_params, by_x = jax.grad(loss, argnums=(0, 1))(params, x)
    w = layer.weight[...]
    w_real = w if weights == "float" else WEIGHT_QUANTIZERS[weights](
        w, layer.segments
    ).dequantize()  # fmt: skip
    x_real = x if activations == "float" else int8_per_token(x).dequantize()
    np.testing.assert_allclose(
        np.asarray(by_x), np.asarray(upstream @ w_real), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        np.asarray(by_params["weight"][...]), np.asarray(upstream.T @ x_real), rtol=1e-4, atol=1e-4
    )


def test_bfloat16_products_of_codes_are_exact():
    """Codes up to 128 and their sums survive bfloat16 inputs: only the output is rounded."""
    layer, x = linear(), inputs(3, 20).astype(jnp.bfloat16)
    narrow, wide = layer(x), layer(x.astype(jnp.float32))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(narrow.astype(jnp.float32)),
        np.asarray(wide.astype(jnp.bfloat16).astype(jnp.float32)),
    )


def test_rms_norm():
    norm = RMSNorm(8, 1e-5)
    norm.scale.set_value(jnp.arange(8.0))
    x = np.asarray(inputs(2, 3, 8), np.float64)
    exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.arange(8)
    np.testing.assert_allclose(np.asarray(norm(jnp.asarray(x, jnp.float32))), exact, rtol=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(),
        RopeScaling("linear", 4.0),
        RopeScaling("llama3", 8.0),
        RopeScaling("llama3", 32.0, 2.0, 5.0, 4096),
    ],
    ids=str,
)
def test_rotary_frequencies_are_those_of_transformers(scaling):
    rope = pytest.importorskip("transformers.modeling_rope_utils", reason="no transformers")
    from transformers import LlamaConfig

    parameters = {"rope_theta": 500_000.0, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        parameters |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    if scaling.kind == "none":  # 1 / theta^(2i/h), which has no entry there
        theirs = 500_000.0 ** (-np.arange(64) / 64)
    else:
        config = LlamaConfig(head_dim=128, rope_parameters=parameters)
        theirs = rope.ROPE_INIT_FUNCTIONS[scaling.kind](config)[0].numpy()
    ours = rotary_frequencies(128, 500_000.0, scaling)
    assert ours.dtype == np.float32
    # Theirs are float32 throughout: an exponent of up to 13 (of e) rounded, and a few operations.
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)


def test_rotary_turns_pairs_and_keeps_relative_angles():
    x = inputs(1, 1, 1, 8)
    frequencies = rotary_frequencies(8, 10_000.0, RopeScaling())
    at = lambda p: rotate(x, rotary_angles(jnp.array([[p]]), frequencies))[0, 0, 0]  # noqa: E731
    np.testing.assert_array_equal(np.asarray(at(0)), np.asarray(x[0, 0, 0]))
    pair = np.array([x[0, 0, 0, 1], x[0, 0, 0, 5]])  # elements i and i + h/2 for i = 1
    angle = 3 * 10_000.0 ** (-1 / 4)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(np.asarray(at(3))[[1, 5]], turn @ pair, rtol=1e-5)
    np.testing.assert_allclose(float(at(9) @ at(4)), float(at(105) @ at(100)), rtol=1e-4)


def test_groups_int4_and_hadamard_in_one_layer_are_their_equations():
    config = tiny_config(
        weight_scale="group", weight_group=8, activations="int4", hadamard=True, init_std=0.5
    )
    layer, x = BitLinear(16, 6, config=config, rngs=nnx.Rngs(0), transform=True), inputs(3, 16)
    h = (
        np.array([[1.0 - 2 * (bin(i & j).count("1") % 2) for j in range(16)] for i in range(16)])
        / 4
    )
    turned = np.asarray(x, np.float64) @ h
    step = np.abs(turned).mean(axis=1, keepdims=True) / np.sqrt(7)
    x_real = np.clip(np.rint(turned / step), -8, 7) * step
    w = np.asarray(layer.weight[...], np.float64).reshape(6, 2, 8)
    size = np.abs(w).mean(axis=2, keepdims=True)
    w_real = (np.clip(np.rint(w / size), -1, 1) * size).reshape(6, 16)
    np.testing.assert_allclose(np.asarray(layer(x)), x_real @ w_real.T, rtol=1e-4, atol=1e-5)
