"""A request gives the same bits whatever runs beside it, however it is cut, on any threads.

Requests run alone first, one row at a time. Then they run together under random schedules: order
and moment of arrival, sequences at once, tokens a step, pages (so that some are taken back), shared
beginnings, guesses, threads. Texts, log-probabilities and every row of logits must be the same.
"""

import random

import pytest
from engines import CONTEXT, engine_of, rescheduled, watched, what

import bitjax
from bitjax.engine import Request, Sampling
from bitjax.ops import ffi

pytestmark = pytest.mark.skipif(not ffi.available(), reason="the extension is not built")

HEADER = "You are a small model. Answer in one word, or in two. "  # 54 tokens, nearly a page
SIZES = {"max_sequences": 8, "step_tokens": 32}


def requests():
    """Of every kind of setting, short and long, some that begin alike, some that repeat."""
    settings = [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 1.0},
        {"temperature": 0.9, "top_k": 5, "logprobs": 3},
        {"temperature": 1.2, "top_p": 0.8, "frequency_penalty": 0.7},
        {"temperature": 0.7, "min_p": 0.1, "logit_bias": {101: 2.0, 32: -100.0}},
    ]
    prompts = ["a", HEADER + "Sky?", HEADER + "Sea?", "ab" * 40, HEADER + "Sky? Sky? ", "xyz" * 3]
    return [
        Request(
            f"{i}",
            prompts[i % len(prompts)],
            Sampling(
                max_new_tokens=4 + 9 * (i % 4), seed=i, n=2 if i == 3 else 1,
                **settings[(i * 5 + i // 6) % len(settings)],
            ),
        )
        for i in range(9)
    ]  # fmt: skip


def run(engine, schedule, rng=None):
    """Results by id, and hashes of logits; requests arrive in lots between steps."""
    done, left = {}, list(schedule)
    with watched(engine) as rows:
        while left or engine.pending:
            for _ in range(len(left) if rng is None else rng.choice([0, 1, 3])):
                if left:
                    engine.submit(left.pop(0))
            for delta in engine.step():
                if delta.completion:
                    done[delta.id] = what(delta.completion)
    return done, rows


def alone(engine, wanted):
    """Every request by itself, a token at a time, nothing shared or guessed."""
    done, rows = {}, {}
    with rescheduled(engine, max_sequences=1, step_tokens=1, sharing=False, lookup=0):
        for request in wanted:
            result, seen = run(engine, [request])
            done |= result
            rows |= seen
    return done, rows


def assert_same(got, wanted):
    (done, rows), (wanted_done, wanted_rows) = got, wanted
    assert done == wanted_done
    different = [key for key, digest in wanted_rows.items() if rows[key] != digest]
    assert not different


@pytest.mark.parametrize(
    ("form", "cache", "schedules"),
    [
        ("int4", "float32", 4),
        ("screened", "bfloat16", 3),
        ("bfloat16", "int8", 2),
        ("float", "float32", 2),
        ("own norms", "float32", 1),
        ("float activations", "float32", 1),
    ],
)
def test_any_schedule_gives_the_same_bits(form, cache, schedules):
    engine = engine_of(form, cache_dtype=cache, **SIZES)
    wanted = alone(engine, requests())
    assert len(wanted[1]) > 100
    assert all(not error for *_, error in wanted[0].values())
    before = engine.stats
    for number in range(schedules):
        rng = random.Random(number)
        order = requests()
        rng.shuffle(order)
        sizes = {
            "max_sequences": 8 if number % 2 else rng.choice([2, 3, 8]),
            "step_tokens": rng.choice([3, 7, 32]),
            "sharing": number % 3 != 2, "lookup": rng.choice([0, 2, 5]), "lookup_rows": 8,
            "spare": 4 if number % 2 else None,
        }  # fmt: skip
        threads = bitjax.set_threads(rng.choice([None, 1, 2]))
        try:
            with rescheduled(engine, **sizes):
                assert_same(run(engine, order, rng), wanted)
        finally:
            bitjax.set_threads(threads)
    after = engine.stats
    if schedules >= 4:  # all that could have made a difference has happened
        assert after.preempted > before.preempted
        assert after.cached_tokens > before.cached_tokens
        assert after.guessed > after.accepted > 0


def test_another_engine_gives_the_same_bits():
    """As after a restart, with other sizes of everything: other programs, too."""
    first = engine_of("int4", **SIZES)
    wanted = alone(first, requests()[:6])
    other = engine_of("int4", max_sequences=3, step_tokens=300, context=CONTEXT - 20)
    assert_same(run(other, requests()[:6]), wanted)


@pytest.mark.parametrize("kernel", ffi.kernels() if ffi.available() else ())
def test_on_every_kernel(kernel):
    some = [requests()[i] for i in (1, 2, 3)]
    engine = kernels_engine()
    ffi.force_kernel(kernel)
    try:
        wanted = alone(engine, some)
        with rescheduled(engine, step_tokens=32):
            assert_same(run(engine, some), wanted)
    finally:
        ffi.force_kernel(None)


def kernels_engine(made=[]):  # noqa: B006
    if not made:
        made.append(engine_of("screened", cache_dtype="int8", **SIZES))
    return made[0]


def test_the_hash_tells_rows_apart():
    """Rows of different requests differ, so that agreement is no accident."""
    engine = kernels_engine()
    _, rows = run(engine, [requests()[i] for i in (1, 2, 3)])
    assert len(set(rows.values())) > 0.9 * len(rows)
