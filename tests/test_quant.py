import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitjax import quant
from bitjax.quant import WEIGHT_QUANTIZERS, quantize_matrix

finite = st.floats(-1e6, 1e6, width=32)
matrices = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=finite
)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@settings(deadline=None, max_examples=60)
@given(matrices)
def test_ternary_follows_the_equation(w):
    codes, scale = quant.ternary(jnp.asarray(w))
    # The float32 mean of at most 81 values is within 81 roundings of the exact one.
    exact = max(np.abs(w.astype(np.float64)).mean(), 1e-5)
    np.testing.assert_allclose(float(scale[0, 0]), exact, rtol=81 * 2**-24)
    wanted = np.clip(np.rint(w * (np.float32(1) / np.float32(scale[0, 0]))), -1, 1)
    np.testing.assert_array_equal(np.asarray(codes), wanted)


@settings(deadline=None, max_examples=60)
@given(matrices)
def test_int8_follows_the_equation_and_its_error_bound(x):
    codes, scale = quant.int8_per_token(jnp.asarray(x))
    wanted, exact_scale = oracle.absmax_int8(x)
    np.testing.assert_array_equal(np.asarray(codes), wanted)
    np.testing.assert_allclose(np.asarray(scale), exact_scale, rtol=2**-22)
    # Half a step, and a few float32 roundings of values up to 127 steps.
    error = np.abs(np.asarray(codes * scale, np.float64) - x)
    assert (error <= np.asarray(scale, np.float64) * (0.5 + 127 * 2**-21)).all()


def test_binary_signs_are_about_the_mean_and_zero_is_negative():
    w = jnp.array([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])  # mean 2
    codes, scale = quant.binary(w)
    np.testing.assert_array_equal(np.asarray(codes), [[-1, -1, 1], [-1, -1, -1]])
    assert float(scale[0, 0]) == 2.0


def test_ties_round_to_even():
    # scale 1: the absmean of these is exactly 1.
    w = jnp.array([[0.5, -0.5, 1.5, -1.5]])
    codes, scale = quant.ternary(w)
    assert float(scale[0, 0]) == 1.0
    np.testing.assert_array_equal(np.asarray(codes), [[0, 0, 1, -1]])
    x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    np.testing.assert_array_equal(
        np.asarray(quant.int8_per_token(x).codes), [[127, 0, 2, 2, 0, -2, -126]]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ternary", "binary", "int8_per_token"])
def test_zeros_and_one_element_rows_stay_finite(name, dtype):
    for values in (np.zeros((3, 4)), np.zeros((1, 1)), np.array([[7.0]]), np.array([[-1e-8]])):
        codes, scale = getattr(quant, name)(jnp.asarray(values, dtype))
        assert codes.dtype == scale.dtype == jnp.float32
        assert np.isfinite(np.asarray(codes)).all()
        assert (np.asarray(scale) > 0).all()
    if name != "binary":
        codes, _ = getattr(quant, name)(jnp.zeros((3, 4), dtype))
        assert not np.asarray(codes).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["ternary", "int8_per_token"])
def test_narrow_inputs_are_quantised_in_float32(name, dtype):
    x = jax.random.normal(jax.random.key(1), (5, 33)).astype(dtype)
    narrow, wide = getattr(quant, name)(x), getattr(quant, name)(x.astype(jnp.float32))
    np.testing.assert_array_equal(np.asarray(narrow.codes), np.asarray(wide.codes))
    np.testing.assert_array_equal(np.asarray(narrow.scale), np.asarray(wide.scale))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_activation_marks_its_own_token_only(bad):
    x = jnp.ones((3, 4)).at[1, 2].set(bad)
    real = np.asarray(quant.int8_per_token(x).dequantize())
    assert np.isnan(real[1]).all()
    np.testing.assert_allclose(real[[0, 2]], 1.0, rtol=2**-22)


def test_require_finite_names_the_array_and_the_place():
    quant.require_finite("w", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"blocks.0 holds 2 values that are not finite.*\(0, 1\)"):
        quant.require_finite("blocks.0", np.array([[0, np.inf], [np.nan, 0]]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("at", [(0, 0), (511, 1023), (512, 5), (999, 1023)])
def test_require_finite_looks_at_every_part(dtype, at):
    w = np.zeros((1000, 1024), dtype)
    quant.require_finite("w", w)
    w[at] = -np.inf
    with pytest.raises(ValueError, match=rf"w holds 1 values .* index \({at[0]}, {at[1]}\)"):
        quant.require_finite("w", w)


@pytest.mark.parametrize("name", ["ternary", "binary", "int8_per_token"])
def test_gradient_is_straight_through(name):
    x = jax.random.normal(jax.random.key(0), (4, 6))
    upstream = jax.random.normal(jax.random.key(1), (4, 6))
    gradient = jax.grad(lambda x: jnp.sum(getattr(quant, name)(x).dequantize() * upstream))(x)
    # scale * (1 / scale) is 1 within three roundings.
    np.testing.assert_allclose(np.asarray(gradient), np.asarray(upstream), rtol=2**-21)


def test_straight_through_is_exact_in_the_forward_pass():
    value, target = jnp.array([1e8, 3e-8, -7.3]), jnp.array([1.0, -1.0, 0.0])
    np.testing.assert_array_equal(np.asarray(quant.straight_through(value, target)), target)


SEGMENTS = [(3, 2, 1), (1, 5), (4, 4), (6,)]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("name", ["ternary", "binary"])
def test_stacked_tensors_are_quantised_each_on_its_own(name, segments):
    """To the bit as each alone, scales and gradient included."""
    quantizer = getattr(quant, name)
    rng = np.random.default_rng(len(segments))
    parts = [
        jnp.asarray(rng.normal(i, 4.0**i, (n, 7)), jnp.float32) for i, n in enumerate(segments)
    ]
    stacked = jnp.concatenate(parts)
    codes, scale = quantizer(stacked, segments)
    assert codes.shape == stacked.shape
    assert scale.shape == (sum(segments), 1)
    assert codes.dtype == scale.dtype == jnp.float32
    alone = [quantizer(part) for part in parts]
    np.testing.assert_array_equal(codes, jnp.concatenate([a.codes for a in alone]))
    np.testing.assert_array_equal(
        scale, jnp.repeat(jnp.concatenate([a.scale for a in alone]), jnp.array(segments), axis=0)
    )
    assert len(set(np.ravel(scale).tolist())) == len(segments)
    upstream = jnp.asarray(rng.standard_normal(stacked.shape), jnp.float32)
    gradient = jax.grad(lambda w: jnp.sum(quantizer(w, segments).dequantize() * upstream))(stacked)
    # scale * (1 / scale) is 1 within three roundings.
    np.testing.assert_allclose(np.asarray(gradient), np.asarray(upstream), rtol=2**-21)


@pytest.mark.parametrize("name", ["ternary", "binary"])
def test_an_all_zero_tensor_in_a_stack_stays_finite(name):
    w = jnp.concatenate([jnp.zeros((2, 4)), jnp.ones((3, 4))])
    codes, scale = getattr(quant, name)(w, (2, 3))
    np.testing.assert_array_equal(np.ravel(scale), np.float32([1e-5, 1e-5, 1, 1, 1]))
    if name == "ternary":
        np.testing.assert_array_equal(codes, w)


# Tables


def dequantized(codes, multipliers, scale, group):
    """float64, by the equation of `int4_grouped`."""
    columns = np.repeat(multipliers, group, axis=1)[:, : codes.shape[1]]
    return codes.astype(np.float64) * columns * scale.astype(np.float64)[:, None]


@settings(deadline=None, max_examples=60)
@given(matrices)
def test_int8_per_row_follows_the_equation_and_its_error_bound(w):
    codes, scale = quant.int8_per_row(w)
    assert (codes.dtype, codes.shape) == (np.int8, w.shape)
    assert (scale.dtype, scale.shape) == (np.float32, w.shape[:1])
    assert np.abs(codes.astype(int)).max() <= 127
    absmax = np.abs(w.astype(np.float64)).max(axis=1)
    np.testing.assert_allclose(scale, np.maximum(absmax, 1e-5) / 127, rtol=2**-22)
    # Half a step, and a few float32 roundings of values up to 127 steps.
    error = np.abs(codes * scale.astype(np.float64)[:, None] - w)
    assert (error <= scale[:, None] * (0.5 + 127 * 2**-21)).all()
    largest = codes[np.arange(len(w)), np.abs(w).argmax(axis=1)]
    assert (np.abs(largest.astype(int))[absmax >= 1e-5] == 127).all()


def test_int8_per_row_rounds_ties_to_even():
    w = np.float32([[127, 0.5, 1.5, -2.5, -127], [12.7, 0.05, 0.149, 0, -0.151]])
    codes, scale = quant.int8_per_row(w)
    np.testing.assert_array_equal(codes[0], [127, 0, 2, -2, -127])
    np.testing.assert_array_equal(codes[1, 2:], [1, 0, -2])
    assert scale[0] == 1


def random_table(kind, rows, cols):
    rng = np.random.default_rng(rows * cols)
    w = {
        "normal": rng.standard_normal((rows, cols)),
        "long tails": rng.standard_t(3, (rows, cols)),
        "uniform": rng.uniform(-1, 1, (rows, cols)),
        "rows and groups of all sizes": rng.standard_normal((rows, cols))
        * 10 ** rng.uniform(-6, 6, (rows, 1))
        * 10 ** np.repeat(rng.uniform(-2, 0, (rows, -(-cols // 8))), 8, axis=1)[:, :cols],
    }[kind]
    return w.astype(np.float32)


def group_errors(w, unit, group):
    """Summed squared error `[V, groups]` of the best 4-bit codes for one unit a group, float64."""
    v, d = w.shape
    w = np.pad(w.astype(np.float64), ((0, 0), (0, -d % group))).reshape(v, -1, group)
    codes = np.clip(np.rint(w / unit[..., None]), -8, 7)
    return np.square(codes * unit[..., None] - w).sum(axis=2)


@pytest.mark.parametrize(("cols", "group"), [(96, 32), (33, 32), (31, 32), (40, 8), (7, 8)])
@pytest.mark.parametrize(
    "kind", ["normal", "long tails", "uniform", "rows and groups of all sizes"]
)
def test_int4_grouped_against_a_brute_force_search(kind, cols, group):
    w = random_table(kind, 80, cols)
    codes, multipliers, scale = quant.int4_grouped(w, group)
    groups = -(-cols // group)
    assert (codes.dtype, codes.shape) == (np.int8, w.shape)
    assert (multipliers.dtype, multipliers.shape) == (np.uint8, (80, groups))
    assert (scale.dtype, scale.shape) == (np.float32, (80,))
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert multipliers.min() >= 1
    assert multipliers.max() <= 15

    row_absmax = np.abs(w.astype(np.float64)).max(axis=1)
    np.testing.assert_allclose(scale, np.maximum(row_absmax, 7e-5) / 105, rtol=2**-21)
    padded = np.pad(w.astype(np.float64), ((0, 0), (0, -cols % group)))
    absmax = np.abs(padded).reshape(80, groups, group).max(axis=2)
    every = np.stack(
        [group_errors(w, np.full((80, groups), m) * scale[:, None], group) for m in range(1, 16)]
    )
    near = np.clip(np.rint(absmax / 7 / scale[:, None]), 1, 15).astype(int)
    candidates = np.clip(near + np.arange(-2, 2)[:, None, None], 1, 15)
    of_candidates = np.take_along_axis(every, candidates - 1, axis=0)
    difference = dequantized(codes, multipliers, scale, group) - w
    error = np.pad(difference**2, ((0, 0), (0, -cols % group))).reshape(80, groups, group).sum(2)
    # The search compares float32 errors: to 2^-20 of the group's squares, it found the least.
    slack = 2**-20 * group * absmax**2
    assert (error <= of_candidates.min(axis=0) + slack).all()
    # The codes are the best of the chosen multipliers, multipliers further off are rarely better,
    # and the nearest is often worse; rows count relative to their absmax.
    chosen = np.take_along_axis(every, multipliers[None].astype(int) - 1, axis=0)[0]
    assert (error <= chosen + slack).all()
    nearest = np.take_along_axis(every, near[None] - 1, axis=0)[0]
    per_row = 1 / row_absmax[:, None] ** 2
    assert (error * per_row).sum() <= 1.1 * (every.min(axis=0) * per_row).sum()
    assert (error * per_row).sum() < 0.99 * (nearest * per_row).sum()


def test_int4_grouped_by_hand():
    # Scale 1: the largest of the row is 7 * 15. Small groups take small multipliers.
    w = np.float32([[105, -15, 7, 0], [105, 0, -21, 6], [105, 105, -8, 7]])
    codes, multipliers, scale = quant.int4_grouped(w, 2)
    np.testing.assert_array_equal(scale, [1, 1, 1])
    np.testing.assert_array_equal(multipliers, [[15, 1], [15, 3], [15, 1]])
    np.testing.assert_array_equal(codes, [[7, -1, 7, 0], [7, 0, -7, 2], [7, 7, -8, 7]])


def test_all_zero_rows_and_groups_of_tables():
    w = np.zeros((3, 40), np.float32)
    w[1, 35] = 2
    codes, scale = quant.int8_per_row(w)
    assert codes[[0, 2]].max() == codes[[0, 2]].min() == 0
    np.testing.assert_allclose(scale, [1e-5 / 127, 2 / 127, 1e-5 / 127], rtol=2**-22)
    codes, multipliers, scale = quant.int4_grouped(w, 32)
    assert np.flatnonzero(codes).tolist() == [40 + 35]
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert multipliers.min() >= 1
    np.testing.assert_allclose(dequantized(codes, multipliers, scale, 32), w, rtol=2**-20)


@pytest.mark.parametrize("dtype", [np.float64, jnp.bfloat16, np.float16])
def test_tables_of_other_dtypes_are_quantised_in_float32(dtype):
    w = np.random.default_rng(3).standard_normal((5, 40)).astype(dtype)
    for quantizer in (quant.int8_per_row, lambda w: quant.int4_grouped(w, 32)):
        for narrow, wide in zip(quantizer(w), quantizer(w.astype(np.float32)), strict=True):
            np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("kind", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_matrix_by_itself_is_quantised_to_the_bit(kind, dtype):
    rng = np.random.default_rng(5)
    for shape in ((1, 1), (16, 32), (33, 100), (1025, 40)):  # 1,025 rows are two parts
        w = np.asarray(jnp.asarray(rng.normal(0.01, 0.02, shape), dtype))
        before = w.copy()
        codes, scale = quantize_matrix(kind, w)
        wanted = WEIGHT_QUANTIZERS[kind](jnp.asarray(w))
        assert (codes.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, ())
        np.testing.assert_array_equal(codes, wanted.codes)
        assert scale == wanted.scale[0, 0]
        np.testing.assert_array_equal(w, before)
