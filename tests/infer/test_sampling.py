"""Sampling against a plain NumPy oracle, and draws against exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitjax.infer.sampling import (
    LARGEST,
    SamplingArrays,
    SamplingParams,
    exact_ranks,
    first_largest,
    keep,
    sample,
)

V = 12
# float32 softmax and cumulative sums of V terms err by less than V * 2**-23 = 2e-6; within this
# distance of a threshold either answer is right.
MARGIN = 1e-5

jit_keep, jit_sample = jax.jit(keep), jax.jit(sample)


def arrays(*params):
    return SamplingArrays.stack(params)


def kept(logits, **params):
    """Indices that `keep` leaves of one row of logits."""
    mask = jit_keep(jnp.asarray([logits], jnp.float32), arrays(SamplingParams(**params)))
    return np.flatnonzero(mask[0]).tolist()


def oracle_keep(logits, top_k, top_p, min_p):
    """For each token: kept, not kept, or (None) too close to a threshold to say; float64."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order_k = order[:top_k] if top_k else order
    p = {i: np.exp(np.float64(logits[i]) - np.float64(logits[order[0]])) for i in order_k}
    total = sum(p.values())
    answer, before = dict.fromkeys(order, False), 0.0
    for rank, i in enumerate(order_k):
        margins = []  # above 0: kept by that filter; the likeliest token passes all
        if rank and top_p < 1:
            margins.append(top_p - before / total)
        if rank and min_p > 0:
            margins.append(p[i] - min_p)
        closest = min(margins, default=1)
        answer[i] = None if abs(closest) <= MARGIN else closest > 0
        before += p[i]
    return [answer[i] for i in range(len(logits))]


def probabilities(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    return p / p.sum()


row = st.tuples(
    st.lists(st.floats(-8, 8, width=32, allow_subnormal=False), min_size=V, max_size=V),
    st.integers(0, V + 3),
    st.one_of(st.just(1.0), st.floats(0.01, 1)),
    st.one_of(st.just(0.0), st.floats(0, 0.99, allow_subnormal=False)),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(row, min_size=3, max_size=3))
def test_keep_is_the_oracles(rows):
    params = arrays(*(SamplingParams(top_k=k, top_p=p, min_p=m) for _, k, p, m in rows))
    got = np.asarray(jit_keep(jnp.asarray([r[0] for r in rows], jnp.float32), params))
    for mask, (logits, k, p, m) in zip(got, rows, strict=True):
        wanted = oracle_keep(np.float32(logits), k, p, m)
        assert all(w is None or w == g for w, g in zip(wanted, mask, strict=True)), wanted


WIDE = 12 * LARGEST + 5
PEAKED, FLAT, TIED = (
    np.random.default_rng(3).standard_normal(WIDE) * 4,
    np.random.default_rng(4).standard_normal(WIDE) * 0.01,
    np.random.default_rng(5).integers(-3, 3, WIDE).astype(float),
)


@pytest.mark.parametrize("logits", [PEAKED, FLAT, TIED], ids=["peaked", "flat", "tied"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 40},
        {"top_k": LARGEST - 1},
        {"top_k": LARGEST},
        {"top_k": LARGEST + 1},
        {"top_k": WIDE - 1},
        {"top_p": 0.3},
        {"top_p": 0.999},
        {"min_p": 0.02},
        {"min_p": 1e-6},
        {"top_k": 700, "top_p": 0.6},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_keep_of_a_vocabulary_beyond_what_is_looked_at_first(logits, params):
    """Beside a row that keeps everything and one that keeps one token."""
    both = [SamplingParams(**params), SamplingParams(), SamplingParams(top_k=1)]
    rows = jnp.asarray(np.stack([logits, PEAKED, PEAKED]), jnp.float32)
    mask = np.asarray(jit_keep(rows, arrays(*both)))
    p = both[0]
    wanted = oracle_keep(np.float32(logits), p.top_k, p.top_p, p.min_p)
    wrong = [i for i, w in enumerate(wanted) if w is not None and w != mask[0, i]]
    assert not wrong
    assert mask[1].all()
    assert np.flatnonzero(mask[2]).tolist() == [PEAKED.argmax()]


@pytest.mark.parametrize(
    ("params", "seen", "ranks"),
    [
        ({"temperature": 0}, 9, 1),
        ({"temperature": 0, "top_k": 5}, 0, 1),
        ({}, 9, 64),
        ({"top_k": 5}, 9, 5),
        ({"top_k": 2**31 - 1}, 9, 100),
        ({"top_p": 0.5}, 0, 64),
        ({"temperature": 0, "repetition_penalty": 1.3}, 9, 10),
        ({"top_k": 5, "repetition_penalty": 1.3}, 9, 14),
        ({"top_k": 99, "repetition_penalty": 1.3}, 9, 100),
        ({"temperature": 0, "repetition_penalty": 0.7}, 0, 100),
    ],
)
def test_how_many_logits_must_be_exact(params, seen, ranks):
    mask = jnp.asarray([[False] * 100, np.arange(100) < seen])
    got = exact_ranks(mask, arrays(SamplingParams(temperature=0), SamplingParams(**params)))
    assert (got.dtype, got.tolist()) == (jnp.int32, [1, ranks])


FALLING = np.log([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("params", "indices"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 2**31 - 1}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [0]),
        ({"top_p": 1e-60}, [0]),  # 0 in float32
        ({"top_p": 0.39}, [0]),
        ({"top_p": 0.41}, [0, 1]),
        ({"top_p": 0.69}, [0, 1]),
        ({"top_p": 0.71}, [0, 1, 2]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"min_p": 0.24}, [0, 1, 2, 3]),
        ({"min_p": 0.26}, [0, 1, 2]),
        ({"min_p": 0.51}, [0, 1]),
        ({"min_p": 0.999}, [0]),
        # top_p counts the probability left by top_k: 0.4 and 0.3 of 0.7 are 0.571 and 0.429.
        ({"top_k": 2, "top_p": 0.56}, [0]),
        ({"top_k": 2, "top_p": 0.58}, [0, 1]),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.6}, [0, 1]),
    ],
)
def test_keep_thresholds(params, indices):
    assert kept(FALLING, **params) == indices
    # The order of the tokens does not matter.
    assert sorted(3 - i for i in kept(FALLING[::-1], **params)) == indices


def test_top_p_of_one_keeps_the_unlikeliest():
    # The cumulative sum of these reaches 1 in float32 long before the last token.
    logits = [0.0] + [-30.0] * 5
    assert kept(logits, top_p=1.0) == [0, 1, 2, 3, 4, 5]
    assert kept(logits, top_p=1.0, min_p=1e-9) == [0]


def test_ties_go_to_the_lower_token():
    assert kept([1.0, 2.0, 2.0, 2.0], top_k=2) == [1, 2]
    assert kept([0.0] * 5, top_k=3) == [0, 1, 2]
    assert kept([0.0] * 4, top_p=0.6) == [0, 1, 2]
    assert kept([0.0] * 4, min_p=0.999) == [0, 1, 2, 3]


def draw(logits_BxV, params, positions=None, seen=None):
    logits_BxV = jnp.asarray(logits_BxV, jnp.float32)
    seen = jnp.zeros(logits_BxV.shape, bool) if seen is None else jnp.asarray(seen)
    positions = jnp.zeros(len(params), jnp.int32) if positions is None else jnp.asarray(positions)
    return np.asarray(jit_sample(logits_BxV, seen, positions, arrays(*params)))


def test_temperature_zero_is_argmax():
    logits = np.random.default_rng(0).normal(size=(16, V)).astype(np.float32)
    drawn = draw(logits, [SamplingParams(temperature=0, seed=s) for s in range(16)])
    assert drawn.dtype == np.int32
    assert drawn.tolist() == logits.argmax(-1).tolist()
    tied = np.where(np.arange(V) % 3 == 2, 3.0, 1.0)
    drawn = draw(np.tile(tied, (16, 1)), [SamplingParams(temperature=0)] * 16)
    assert drawn.tolist() == [2] * 16


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37])
def test_a_tiny_temperature_is_argmax_too(temperature):
    # Divided by 1e-37, several of them are beyond float32.
    logits = np.random.default_rng(1).normal(size=(16, V)).astype(np.float32) * 100
    drawn = draw(logits, [SamplingParams(temperature=temperature, seed=s) for s in range(16)])
    assert drawn.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.9999}])
def test_a_filter_of_one_token_is_argmax(params):
    logits = np.random.default_rng(2).normal(size=(16, V)).astype(np.float32)
    drawn = draw(logits, [SamplingParams(temperature=5, seed=s, **params) for s in range(16)])
    assert drawn.tolist() == logits.argmax(-1).tolist()


# A right sampler exceeds it with probability 1e-6 at most, by the inequality of Laurent and Massart
# (2000), lemma 1: P(X >= d + 2 sqrt(d t) + 2 t) <= exp(-t) for X chi-square with d degrees of
# freedom. Seeds fix the draws, so a pass is a pass for ever.
def chi_square_bound(degrees):
    t = np.log(1e6)
    return degrees + 2 * np.sqrt(degrees * t) + 2 * t


def chi_square(counts, p):
    expected = p * counts.sum()
    assert expected[p > 0].min() >= 5  # the usual condition for the chi-square approximation
    assert (counts[p == 0] == 0).all()
    return ((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum(), (p > 0).sum() - 1


LOGITS = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -0.5])
DRAWS = 4096


@pytest.mark.parametrize(
    ("params", "indices"),
    [
        ({"temperature": 1.0}, range(6)),
        ({"temperature": 0.7}, range(6)),
        ({"temperature": 1.5}, range(6)),
        ({"temperature": 1.5, "top_k": 3}, (1, 3, 4)),
        ({"temperature": 1.0, "top_p": 0.7}, (1, 3)),
        ({"temperature": 1.0, "min_p": 0.2}, (1, 3, 4)),
    ],
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_distribution(params, indices, vary):
    p = probabilities(LOGITS, params["temperature"])
    p = np.where(np.isin(np.arange(6), list(indices)), p, 0)
    p /= p.sum()
    seeds = np.arange(DRAWS) if vary == "seed" else np.full(DRAWS, 7)
    positions = np.arange(DRAWS, dtype=np.int32) if vary == "position" else np.full(DRAWS, 3)
    drawn = draw(
        np.tile(LOGITS, (DRAWS, 1)),
        [SamplingParams(seed=int(s), **params) for s in seeds],
        positions.astype(np.int32),
    )
    statistic, degrees = chi_square(np.bincount(drawn, minlength=6).astype(float), p)
    assert statistic < chi_square_bound(degrees)
    # Neighbours are independent: equal as often as two draws are. Of a mean of DRAWS - 1 such
    # indicators, the standard deviation is at most 1 / sqrt(DRAWS): neighbours share a draw.
    repeats = (drawn[1:] == drawn[:-1]).mean()
    assert abs(repeats - (p**2).sum()) < 5 / np.sqrt(DRAWS)


def test_the_chi_square_test_can_fail():
    uniform = np.full(6, DRAWS / 6)
    statistic, degrees = chi_square(uniform, probabilities(LOGITS))
    assert statistic > 10 * chi_square_bound(degrees)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 2.0, 0.5])
def test_repetition_penalty_equation(penalty):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(64, V)).astype(np.float32)
    seen = rng.random((64, V)) < 0.4
    logits[32:] -= 3  # rows whose best is negative
    logits[0, 0], seen[0, 0] = 0.0, True
    wanted = [
        int(np.argmax([
            float(x) if not s else float(x) / penalty if x > 0 else float(x) * penalty
            for x, s in zip(row, mask, strict=True)
        ]))
        for row, mask in zip(logits, seen, strict=True)
    ]  # fmt: skip
    greedy = SamplingParams(temperature=0, repetition_penalty=penalty)
    drawn = draw(logits, [greedy] * 64, seen=seen)
    assert drawn.tolist() == wanted
    assert (penalty == 1) == (wanted == logits.argmax(-1).tolist())


def test_repetition_penalty_changes_the_distribution_before_the_temperature():
    seen = np.array([True, False, True, True, False, False])
    scores = np.where(seen, np.where(LOGITS > 0, LOGITS / 1.7, LOGITS * 1.7), LOGITS)
    params = [SamplingParams(temperature=0.9, repetition_penalty=1.7, seed=s) for s in range(DRAWS)]
    drawn = draw(np.tile(LOGITS, (DRAWS, 1)), params, seen=np.tile(seen, (DRAWS, 1)))
    statistic, degrees = chi_square(
        np.bincount(drawn, minlength=6).astype(float), probabilities(scores, 0.9)
    )
    assert statistic < chi_square_bound(degrees)


def test_a_draw_does_not_depend_on_the_rest_of_the_batch():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(6, V)).astype(np.float32)
    seen, positions = rng.random((6, V)) < 0.3, np.arange(6, dtype=np.int32) + 10
    params = [
        SamplingParams(temperature=1.5, seed=1),
        SamplingParams(temperature=0, repetition_penalty=1.5),
        SamplingParams(temperature=2.0, top_k=4, seed=1),
        SamplingParams(temperature=1.0, top_p=0.5, seed=2**32 - 1),
        SamplingParams(temperature=1.0, min_p=0.1, repetition_penalty=1.2, seed=9),
        SamplingParams(temperature=1.5, seed=1),
    ]
    together = draw(logits, params, positions, seen)
    alone = [
        draw(logits[i : i + 1], params[i : i + 1], positions[i : i + 1], seen[i : i + 1])[0]
        for i in range(6)
    ]
    assert together.tolist() == alone
    backwards = draw(logits[::-1], params[::-1], positions[::-1], seen[::-1])
    assert backwards[::-1].tolist() == alone


def test_same_seed_same_draw_and_another_seed_another():
    logits = np.zeros((3, 512), np.float32)
    seeds = [SamplingParams(seed=s) for s in (5, 5, 6)]
    first, second, other = draw(logits, seeds)
    assert first == second != other
    moved, same, _ = draw(logits, seeds, np.array([1, 0, 0], np.int32))
    assert same == first != moved


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is below 1"),
        ({"temperature": -0.1}, r"temperature=-0.1 is not in \[0, inf\)"),
        ({"temperature": float("nan")}, r"temperature=nan is not in \[0, inf\)"),
        ({"temperature": float("inf")}, r"temperature=inf is not in \[0, inf\)"),
        ({"top_k": -1}, r"top_k=-1 is not in \[0, 2\*\*31\)"),
        ({"top_k": 2**31}, r"top_k=2147483648 is not in \[0, 2\*\*31\)"),
        ({"top_p": 0}, r"top_p=0 is not in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p=1.01 is not in \(0, 1\]"),
        ({"top_p": float("nan")}, r"top_p=nan is not in \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p=-0.1 is not in \[0, 1\)"),
        ({"min_p": 1.0}, r"min_p=1.0 is not in \[0, 1\)"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is not above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf is not above 0"),
        ({"seed": -1}, r"seed=-1 is not in \[0, 2\*\*32\)"),
        ({"seed": 2**32}, r"seed=4294967296 is not in \[0, 2\*\*32\)"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_params_errors(params, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        SamplingParams(**params)


@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 65, 1000])
def test_first_largest_is_argmax(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.integers(-3, 3, (50, vocab)).astype(np.float32)  # ties
    logits[0] = -np.inf
    logits[1, -1] = np.inf
    assert first_largest(jnp.asarray(logits)).tolist() == np.argmax(logits, axis=-1).tolist()
    logits[:, vocab // 2] = np.nan
    assert np.isin(first_largest(jnp.asarray(logits)), np.arange(vocab)).all()
