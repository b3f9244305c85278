"""Drawing against a NumPy oracle of the same equations; the noise against what noise must be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitjax.engine import Sampling
from bitjax.engine.sampler import (
    NOT_FINITE,
    NOTHING_ALLOWED,
    Draw,
    Edits,
    plain_settings,
    ranks_for,
    sample,
)
from bitjax.ops import ffi

pytestmark = pytest.mark.skipif(not ffi.available(), reason="the extension is not built")


def logits_of(vocab, seed=0):
    return (3 * np.random.default_rng(seed).standard_normal((1, vocab))).astype(np.float32)


def draws_of(sampling, count, edits=None, mask=None):
    return [Draw(0, sampling, 0, position, edits, mask) for position in range(count)]


def edited(logits, sampling, edits):
    """The equations of `Sampling`, token by token."""
    x = logits.astype(np.float64)
    for token, (seen, count, bias) in zip(*edits, strict=True):
        if seen:
            r = sampling.repetition_penalty
            x[token] = x[token] / r if x[token] > 0 else x[token] * r
        x[token] -= sampling.presence_penalty * (count > 0) + sampling.frequency_penalty * count
        x[token] = -np.inf if bias <= -100 else x[token] + bias
    return x


def distribution(x, sampling):
    """Probabilities that the filters leave, in float64."""
    x = x / sampling.temperature
    p = np.exp(x - x.max())
    order = np.argsort(-p, kind="stable")
    kept = np.zeros(len(p), bool)
    kept[order[: sampling.top_k or len(p)]] = True
    p = np.where(kept, p, 0) / p[kept].sum()
    before = np.cumsum(p[order]) - p[order]
    kept[order[before >= sampling.top_p]] = False
    kept &= p >= sampling.min_p * p.max()
    kept[order[0]] = True
    return np.where(kept, p, 0) / p[kept].sum()


FILTERS = [
    {}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.9},
    {"top_k": 9, "top_p": 0.95, "min_p": 0.02}, {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [50, 1500])
def test_frequencies_are_the_distributions(filters, vocab):
    sampling = Sampling(**{"temperature": 1.0, "seed": 5, **filters})
    logits, count = logits_of(vocab), 20_000 if vocab == 50 else 3000
    drawn, _ = sample(logits, draws_of(sampling, count))
    p = distribution(logits[0].astype(np.float64), sampling)
    assert (p[drawn] > 0).all()
    # Tokens with five and more to be expected; the rest together. Chi-squared has mean k - 1.
    often = p * count >= 5
    seen = np.bincount(drawn, minlength=vocab)
    observed = np.append(seen[often], seen[~often].sum())
    expected = np.append(p[often], p[~often].sum()) * count
    used = expected > 0
    statistic = (((observed - expected)[used]) ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    assert statistic <= freedom + 5 * np.sqrt(2 * freedom) + 5


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1.3, 1.0, 0.8]), st.sampled_from([0.0, 0.6, -0.4]),
    st.sampled_from([0.0, 0.3]),
    st.dictionaries(st.integers(0, 39), st.floats(-120, 5), max_size=5),
    st.lists(st.integers(0, 39), max_size=12), st.lists(st.integers(0, 39), max_size=12),
)  # fmt: skip
def test_edits_are_the_equations(seed, repetition, presence, frequency, bias, prompt, text):
    sampling = Sampling(
        temperature=0, repetition_penalty=repetition, presence_penalty=presence,
        frequency_penalty=frequency, logit_bias=bias,
    )  # fmt: skip
    edits = Edits(sampling, prompt)
    for token in text:
        edits.add(token)
    logits = logits_of(40, seed)
    counts = {token: text.count(token) for token in range(40)}
    wanted = edited(
        logits[0], sampling,
        (range(40), [(t in prompt + text and repetition != 1, counts[t], bias.get(t, 0.0))
                     for t in range(40)]),
    )  # fmt: skip
    (drawn,), _ = sample(logits, draws_of(sampling, 1, edits.arrays))
    assert wanted[drawn] >= wanted.max() - 1e-4


def test_a_copy_of_edits_leaves_the_original_alone():
    sampling = Sampling(repetition_penalty=1.2, frequency_penalty=0.5)
    edits = Edits(sampling, [1, 2])
    edits.add(3)
    before = [array.tolist() for array in edits.arrays]
    copied = edits.copy()
    assert [array.tolist() for array in copied.arrays] == before
    for token in (3, 4, 1, *range(10, 20)):
        copied.add(token)
    assert [array.tolist() for array in edits.arrays] == before
    assert len(copied.arrays[0]) == 3 + 1 + 10


def test_greedy_takes_the_first_of_the_largest():
    logits = np.zeros((1, 200), np.float32)
    logits[0, [70, 150]] = 2
    drawn, _ = sample(logits, draws_of(Sampling(temperature=0), 1))
    assert drawn.tolist() == [70]
    drawn, _ = sample(logits, draws_of(Sampling(temperature=1.0, top_k=1), 30))
    assert set(drawn.tolist()) == {70}


def test_log_probabilities():
    logits = logits_of(1000)
    sampling = Sampling(temperature=0.5, logprobs=4, logit_bias={3: 50.0})
    edits = Edits(sampling, [])
    (drawn,), (about,) = sample(logits, draws_of(sampling, 1, edits.arrays))
    x = logits[0].astype(np.float64)
    wanted = x - x.max() - np.log(np.exp(x - x.max()).sum())
    assert drawn == about.token == 3  # the bias decides, and is not in the number
    assert about.logprob == pytest.approx(wanted[3], abs=1e-5)
    best = np.argsort(-x)[:4]
    assert [token for token, _ in about.top] == best.tolist()
    assert [lp for _, lp in about.top] == pytest.approx(wanted[best], abs=1e-5)
    none = dataclasses.replace(sampling, logprobs=None)
    assert sample(logits, draws_of(none, 1))[1] == [None]


def test_masks():
    logits, mask = logits_of(100), np.zeros(4, np.uint32)
    mask[1] = 1 << 5 | 1 << 9
    drawn, _ = sample(logits, draws_of(Sampling(temperature=2.0), 200, None, mask))
    assert set(drawn.tolist()) == {37, 41}
    drawn, _ = sample(logits, draws_of(Sampling(temperature=0), 1, None, np.zeros(4, np.uint32)))
    assert drawn.tolist() == [NOTHING_ALLOWED]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(bad, temperature):
    logits = logits_of(100)
    logits[0, 77] = bad
    drawn, _ = sample(logits, draws_of(Sampling(temperature=temperature), 1))
    assert drawn.tolist() == [NOT_FINITE]


def test_a_row_does_not_know_its_company():
    """One by one, together, in another order, by one thread or several."""
    rng = np.random.default_rng(1)
    logits = (3 * rng.standard_normal((6, 9000))).astype(np.float32)
    draws = [
        Draw(row, Sampling(seed=row, logprobs=2, **{"temperature": 1.0, **filters}), 0, row)
        for row, filters in zip(range(6), FILTERS, strict=False)
    ]
    together, about = sample(logits, draws)
    backwards, _ = sample(logits, draws[::-1])
    before = ffi.set_threads(1)
    try:
        single, _ = sample(logits, draws)
    finally:
        ffi.set_threads(before)
    one_by_one = [sample(logits[d.row][None], [dataclasses.replace(d, row=0)]) for d in draws]
    assert together.tolist() == backwards[::-1].tolist() == single.tolist()
    assert together.tolist() == [int(tokens[0]) for tokens, _ in one_by_one]
    assert about == [found[0] for _, found in one_by_one]


@pytest.mark.parametrize("vocab", [1, 31, 9000, 300_000])
def test_a_program_draws_the_same(vocab):
    """`ops.ffi.sample_rows`, also of fewer rows than there are, beside logits that are none."""
    rng = np.random.default_rng(vocab)
    logits = (3 * rng.standard_normal((12, vocab))).astype(np.float32)
    logits[4, vocab // 2] = np.nan
    big = {"seed": 2**32 - 1, "top_k": 2**31 - 1}
    changes = [*FILTERS, {"temperature": 0.0}, big, {"temperature": 0.0, "seed": 7}]
    draws = [
        Draw(row, Sampling(**{"seed": row, **changed}), row % 3, 2**33 + row)
        for row, changed in enumerate(changes)
    ]
    expected, _ = sample(logits, draws)
    assert expected[4] == NOT_FINITE
    program = jax.jit(ffi.sample_rows)
    for count in (12, 5, 0):
        drawn = program(logits, *plain_settings(draws), np.array([count], np.int32))
        np.testing.assert_array_equal(drawn[:count], expected[:count])


@pytest.mark.parametrize(
    ("place", "operand", "message"),
    [
        (0, np.zeros((2, 0), np.float32), "logits"),
        (0, np.zeros((3, 9), np.float32), "floats"),
        (1, np.zeros((2, 6), np.float32), "floats"),
        (2, np.zeros((2, 7), np.uint32), "integers"),
        (2, np.zeros((2, 8), np.int32), "integers"),
        (3, np.zeros(2, np.int32), "rows"),
        (3, np.zeros(1, np.float32), "rows"),
    ],
)
def test_operands_that_do_not_fit(place, operand, message):
    operands = [
        np.zeros((2, 9), np.float32), np.zeros((2, 3), np.float32), np.zeros((2, 8), np.uint32),
        np.array([2], np.int32),
    ]  # fmt: skip
    operands[place] = operand
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"bitjax_sample: {message}"):
        jax.block_until_ready(ffi.sample_rows(*map(jnp.asarray, operands)))


def test_noise():
    """Uniform, and of neighbouring seeds, samples and positions independent."""
    u = np.array([[ffi.noise(s, 0, p) for p in range(400)] for s in range(40)])
    assert abs(u.mean() - 0.5) < 0.01
    assert abs((u < 0.1).mean() - 0.1) < 0.01
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.04
    assert len({ffi.noise(*key) for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))}) == 4


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({"temperature": 0}, 1),
        ({"temperature": 0, "logprobs": 0}, 64),
        ({"top_k": 9}, 9),
        ({}, 64),
        ({"temperature": 0, "repetition_penalty": 1.5}, 3),
        ({"temperature": 0, "repetition_penalty": 0.5}, 200),
        ({"temperature": 0, "logit_bias": {4: -5.0}}, 2),
        ({"temperature": 0, "logit_bias": {4: 5.0}}, 200),
    ],
)
def test_as_many_exact_logits_as_may_matter(changes, ranks):
    sampling = Sampling(**changes)
    draw = Draw(0, sampling, 0, 0, Edits(sampling, [7, 8]).arrays)
    assert ranks_for(draw, 200) == ranks
    masked = dataclasses.replace(draw, mask=np.zeros(7, np.uint32))
    assert ranks_for(masked, 200) == (ranks if sampling.logprobs is None else 200)
