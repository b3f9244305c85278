"""What requests give: against the model without a cache, and rule by rule.

That company, sizes and guesses change nothing is tests/engine/test_reproducible.py's.
"""

import contextlib
import dataclasses
import threading

import numpy as np
import pytest
from engines import CONTEXT, engine_of, full_logits, model_of, rescheduled, watched
from flax import nnx

from bitjax.engine import Engine, EngineConfig, Request, Sampling
from bitjax.infer.sampling import SamplingParams
from bitjax.ops import ffi

pytestmark = pytest.mark.skipif(not ffi.available(), reason="the extension is not built")

GREEDY = Sampling(temperature=0, max_new_tokens=12)
HEADER = "A header that is longer than a page of sixty-four slots, as system prompts are. "


@pytest.fixture(scope="module")
def engine():
    return engine_of("int4", max_sequences=6, step_tokens=32)


@pytest.fixture(autouse=True)
def nothing_left(request):
    """Whatever a test did, no request and no page is left behind."""
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        assert engine.pending == 0
        assert (engine.stats.running, engine.stats.waiting, engine.stats.pages_used) == (0, 0, 0)
        assert engine.step() == []


def complete(engine, *requests):
    return {c.id: c for c in engine.generate(requests)}


def only(engine, prompt, sampling):
    return complete(engine, Request("only", prompt, sampling))["only"]


def test_greedy_text_is_the_models_without_a_cache(engine):
    prompts = ["a", "The quick brown fox. " * 4, HEADER, "äöü"]
    sampling = dataclasses.replace(GREEDY, logprobs=2)
    done = complete(engine, *(Request(p, p, sampling) for p in prompts))
    for prompt in prompts:
        tokens = list(prompt.encode())
        choice = done[prompt].choices[0]
        logits = full_logits(model_of("int4"), tokens + list(choice.tokens))
        for i, (token, about) in enumerate(zip(choice.tokens, choice.logprobs, strict=True)):
            row = logits[len(tokens) + i - 1].astype(np.float64)
            row -= row.max() + np.log(np.exp(row - row.max()).sum())
            assert row[token] >= row.max() - 1e-4
            assert about.logprob == pytest.approx(row[token], abs=1e-4)
            assert about.top[0][1] == pytest.approx(row.max(), abs=1e-4)
        assert len(choice.tokens) == 12
        assert done[prompt].usage.prompt_tokens == len(tokens)
        assert done[prompt].usage.completion_tokens == 12


def test_shared_beginnings_run_once(engine):
    """Of many prompts with one header it runs for the first alone, in whatever crowd they come."""
    header = HEADER[::-1]
    before = engine.stats
    done = complete(engine, *(Request(f"{i}", f"{header}{i}?", GREEDY) for i in range(6)))
    after = engine.stats
    whole = len(HEADER) + 2
    assert after.prompt_tokens - before.prompt_tokens == whole + 5 * 2
    assert after.cached_tokens - before.cached_tokens == 5 * len(HEADER)
    assert sorted(c.usage.cached_tokens for c in done.values()) == [0] + 5 * [len(HEADER)]
    with rescheduled(engine, sharing=False):
        alone = complete(engine, *(Request(f"{i}", f"{header}{i}?", GREEDY) for i in range(6)))
    assert {k: c.choices for k, c in alone.items()} == {k: c.choices for k, c in done.items()}
    assert all(c.usage.cached_tokens == 0 for c in alone.values())


def test_samples_share_their_prompt_and_differ(engine):
    before = engine.stats
    sampling = Sampling(temperature=1.5, max_new_tokens=8, n=5, seed=3)
    done = only(engine, HEADER + "samples", sampling)
    texts = [choice.tokens for choice in done.choices]
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3, 4]
    assert len(set(texts)) == 5
    # Each runs the prompt's last token, which gives the logits; the rest ran once.
    assert engine.stats.prompt_tokens - before.prompt_tokens <= len(HEADER) + 7 + 4
    first = only(engine, HEADER + "samples", dataclasses.replace(sampling, n=1))
    assert first.choices[0].tokens == texts[0]
    assert done.usage.completion_tokens == 40


def test_deltas_add_up(engine):
    engine.submit(Request("r", "abc" * 10, Sampling(max_new_tokens=20, seed=1, n=2, logprobs=1)))
    texts, tokens, logprobs = {0: "", 1: ""}, {0: (), 1: ()}, {0: (), 1: ()}
    last = {}
    while engine.pending:
        for delta in engine.step():
            texts[delta.index] += delta.text
            tokens[delta.index] += delta.tokens
            logprobs[delta.index] += delta.logprobs
            last[delta.index] = delta
    (completion,) = [d.completion for d in last.values() if d.completion]
    for choice in completion.choices:
        assert choice.text == texts[choice.index]
        assert choice.tokens == tokens[choice.index]
        assert choice.logprobs == logprobs[choice.index]
        assert len(choice.logprobs) == len(choice.tokens) == 20
        assert choice.finish_reason == last[choice.index].finish_reason == "length"
    times = completion.timings
    assert 0 <= times.started <= times.first_token <= times.finished


def test_stops(engine):
    plain = only(engine, "abc", GREEDY).choices[0]
    token = plain.tokens[4]
    first = plain.tokens.index(token)
    ended = only(engine, "abc", dataclasses.replace(GREEDY, stop_ids=(token,))).choices[0]
    assert ended.tokens == plain.tokens[: first + 1]
    assert ended.finish_reason == "stop"
    ascii_only = dataclasses.replace(GREEDY, logit_bias=dict.fromkeys(range(128, 256), -100.0))
    plain = only(engine, "abc", ascii_only).choices[0]
    assert len(plain.text) == 12
    word = plain.text[5:8]
    cut = only(engine, "abc", dataclasses.replace(ascii_only, stop=("no such", word))).choices[0]
    assert cut.text == plain.text[: plain.text.index(word)]
    assert cut.finish_reason == "stop"


def test_end_tokens_of_the_tokenizer():
    class Ending:
        """Bytes, of which all even ones end a text."""

        def __init__(self, tokenizer):
            self._tokenizer = tokenizer
            self.stop = tuple(range(0, 256, 2))

        def __getattr__(self, name):
            return getattr(self._tokenizer, name)

    model = nnx.clone(model_of("int4"))
    model.tokenizer = Ending(model.tokenizer)
    engine = Engine(model, EngineConfig(max_sequences=2))
    sampling = Sampling(temperature=1.0, max_new_tokens=30, seed=2)
    choice = only(engine, "abc", sampling).choices[0]
    assert [t % 2 for t in choice.tokens] == [1] * (len(choice.tokens) - 1) + [0]
    assert choice.finish_reason == "stop"
    ignoring = only(engine, "abc", dataclasses.replace(sampling, ignore_eos=True)).choices[0]
    assert len(ignoring.tokens) == 30


def test_the_context_ends_texts(engine):
    tokens = only(engine, "x" * (CONTEXT - 5), dataclasses.replace(GREEDY, max_new_tokens=50))
    assert len(tokens.choices[0].tokens) == 5
    assert tokens.choices[0].finish_reason == "length"


def test_guesses_are_right_where_texts_repeat(engine):
    """A text that repeats itself is guessed; fewer steps give the same tokens."""
    sampling = Sampling(temperature=0, max_new_tokens=40, logit_bias={97: 40.0, 98: 40.0})
    with rescheduled(engine, lookup=0):
        before = engine.stats.steps
        plain = only(engine, "abab", sampling)
        slow = engine.stats.steps - before
    before = engine.stats.steps
    guessed = only(engine, "abab", sampling)
    assert guessed.choices == plain.choices
    assert plain.usage.guessed == 0
    assert guessed.usage.accepted > 20
    assert engine.stats.steps - before == slow - guessed.usage.accepted
    alone = only(engine, "abab", dataclasses.replace(sampling, lookup=False))
    assert alone.usage.guessed == 0


def test_wrong_guesses_leave_no_trace(engine):
    """A text that repeats itself until penalties forbid it: they count what was kept alone."""
    bias = {97: 44.0, 98: 43.0, 99: 42.0, 100: 41.0}
    sampling = Sampling(
        temperature=0, max_new_tokens=70, frequency_penalty=0.3, repetition_penalty=1.05,
        logit_bias=bias, logprobs=0,
    )  # fmt: skip
    plain = only(engine, "abab", dataclasses.replace(sampling, lookup=False))
    guessed = only(engine, "abab", sampling)
    assert guessed.choices == plain.choices
    assert 0 < guessed.usage.accepted < guessed.usage.guessed


def test_wrong_guesses_do_not_change_what_the_screen_makes_exact():
    """A token that was only guessed is none of those that a penalty concerns."""
    engine = engine_of("screened", max_sequences=1)
    prompt = "xyzaxyzbxyzcxyzd" * 4
    for seed in range(3):
        sampling = Sampling(max_new_tokens=30, frequency_penalty=0.3, seed=seed, temperature=1.0)
        with watched(engine) as plain_rows:
            plain = only(engine, prompt, dataclasses.replace(sampling, lookup=False))
        with watched(engine) as rows:
            guessed = only(engine, prompt, sampling)
        assert guessed.usage.guessed > guessed.usage.accepted
        assert guessed.choices == plain.choices
        assert {key: rows[key] for key in plain_rows} == plain_rows


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ("", {}, "the prompt is empty"),
        ((), {}, "the prompt is empty"),
        ("x" * CONTEXT, {}, f"has {CONTEXT} tokens; the context of {CONTEXT} leaves no room"),
        ((1, 256), {}, r"the prompt has token 256, not in 0\.\.255"),
        ((1, -1), {}, "the prompt has token -1"),
        ("a", {"logit_bias": {300: 1.0}}, r"logit_bias has token 300, not in 0\.\.255"),
        ("a", {"stop_ids": (-3,)}, "stop_ids has token -3"),
        ("\ud800", {}, "not valid Unicode"),
    ],
)
def test_bad_requests_harm_nobody(engine, prompt, changes, message):
    wanted = only(engine, "abc", GREEDY).choices
    engine.submit(Request("good", "abc", GREEDY))
    engine.step()
    with pytest.raises(ValueError, match=message):
        engine.submit(Request("bad", prompt, dataclasses.replace(GREEDY, **changes)))
    done = complete(engine, Request("bad", prompt, dataclasses.replace(GREEDY, **changes)))
    assert done["good"].choices == wanted
    assert done["bad"].choices == ()
    assert done["bad"].error


def test_a_request_that_fails_while_it_runs(engine):
    """Every token forbidden: an error of this request, after which the others go on."""
    bias = dict.fromkeys(range(256), -100.0)
    done = complete(
        engine,
        Request("none", "abc", dataclasses.replace(GREEDY, logit_bias=bias)),
        Request("good", "abc", GREEDY),
    )
    assert done["none"].error == "no token is allowed at position 3"
    assert done["none"].choices[0].finish_reason == "error"
    assert len(done["good"].choices[0].tokens) == 12


def test_ids_are_unique_until_finished(engine):
    engine.submit(Request("a", "abc", GREEDY))
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        engine.submit(Request("a", "abc", GREEDY))
    complete(engine)
    assert only(engine, "abc", GREEDY)
    complete(engine, Request("a", "abc", GREEDY))


def test_cancelling(engine):
    """Before it runs, and in the middle: what it held is free, the others do not notice."""
    wanted = only(engine, "abc", GREEDY).choices
    assert engine.cancel("nobody") is False
    for request_id in ("early", "late", "good"):
        engine.submit(Request(request_id, "abc", GREEDY))
    assert engine.cancel("early")
    deltas = engine.step() + engine.step() + engine.step()
    assert engine.cancel("late")
    while engine.pending:
        deltas += engine.step()
    done = {d.id: d.completion for d in deltas if d.completion}
    assert done["early"].choices[0].finish_reason == "cancelled"
    assert done["early"].choices[0].tokens == ()
    late = done["late"].choices[0]
    assert late.finish_reason == "cancelled"
    assert 0 < len(late.tokens) < 12
    assert late.tokens == wanted[0].tokens[: len(late.tokens)]
    assert done["good"].choices == wanted


@contextlib.contextmanager
def begun_early(engine):
    """How many sequences each step ran that began before its tokens were known."""
    begun, runner = [], engine._runner

    def draw(hidden, ranks, *settings):
        begun.append(len(ranks))
        return type(runner).draw(runner, hidden, ranks, *settings)

    runner.draw = draw
    try:
        yield begun
    finally:
        del runner.draw


def in_turn(engine, *requests):
    """What requests give where every step waits for the tokens of the one before."""
    engine._runner.draws = False
    try:
        return {name: c.choices for name, c in complete(engine, *requests).items()}
    finally:
        engine._runner.draws = True


def test_steps_begin_before_their_tokens_are_known(engine):
    settings = [
        {"temperature": 0}, {"temperature": 0.9, "seed": 2**31 + 5}, {"top_k": 3, "n": 2},
        {"top_p": 0.7, "min_p": 0.1},
    ]  # fmt: skip
    requests = [
        Request(
            f"{i}", "abc" * i + "d", Sampling(max_new_tokens=70 + 5 * i, lookup=False, **chosen)
        )
        for i, chosen in enumerate(settings)
    ]
    wanted = in_turn(engine, *requests)
    with begun_early(engine) as begun:
        done = complete(engine, *requests)
    assert {name: c.choices for name, c in done.items()} == wanted
    assert begun.count(5) > 60  # samples, while all of them run
    assert begun.count(1) == 4  # the last one, alone, but for its last token


def test_a_text_that_ends_while_its_next_step_runs(engine):
    """By a stop string, or cancelled; those beside it and those that come then do not notice."""
    plain = {"temperature": 0.8, "max_new_tokens": 30, "lookup": False}
    text = only(engine, "one", Sampling(**plain)).choices[0].text
    requests = [
        Request("stops", "one", Sampling(stop=(text[9:12],), **plain)),
        Request("cancelled", "two", Sampling(seed=1, **plain)),
        Request("stays", "three", Sampling(seed=2, **plain)),
        Request("comes", "four", Sampling(seed=3, **plain)),
    ]
    wanted = in_turn(engine, *requests)
    assert wanted["stops"][0].text == text[: text.index(text[9:12])]
    done = {}
    with begun_early(engine) as begun:
        for request in requests[:3]:
            engine.submit(request)
        for step in range(100):
            if step == 20:
                engine.cancel("cancelled")
            if step == 21:
                engine.submit(requests[3])
            done |= {d.id: d.completion.choices for d in engine.step() if d.completion}
    assert begun.count(3) > 3
    assert begun.count(2) > 3
    for name in ("stops", "stays", "comes"):
        assert done[name] == wanted[name]
    tokens = done["cancelled"][0].tokens
    assert 0 < len(tokens) < 30
    assert tokens == wanted["cancelled"][0].tokens[: len(tokens)]


def test_where_guesses_may_pay_tokens_are_waited_for(engine):
    with begun_early(engine) as begun:
        done = only(engine, "abcdefgh" * 6, dataclasses.replace(GREEDY, max_new_tokens=60))
    assert done.usage.accepted > 0
    assert len(begun) < 60 - done.usage.accepted


@pytest.mark.parametrize(
    "changes", [{"logprobs": 1}, {"presence_penalty": 0.3}, {"logit_bias": {5: 1.0}}], ids=str
)
def test_what_changes_or_asks_for_logits_is_drawn_from_them(engine, changes):
    with begun_early(engine) as begun:
        only(engine, "a", dataclasses.replace(GREEDY, lookup=False, **changes))
    assert begun == []


def test_threads_may_submit_and_cancel(engine):
    def send(first):
        for i in range(first, first + 20):
            engine.submit(Request(f"{i}", f"prompt {i}", Sampling(max_new_tokens=3, seed=i)))
            if i % 5 == 0:
                engine.cancel(f"{i}")

    threads = [threading.Thread(target=send, args=(100 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    done = []
    while engine.pending or any(thread.is_alive() for thread in threads):
        done += [d.completion for d in engine.step() if d.completion]
    assert len({c.id for c in done}) == len(done) == 60
    reasons = [c.choices[0].finish_reason for c in done]
    assert reasons.count("length") >= 48
    assert set(reasons) <= {"length", "cancelled"}


def test_a_long_iterable_is_taken_piece_by_piece(engine):
    taken = 0

    def source():
        nonlocal taken
        for i in range(40):
            taken += 1
            yield Request(f"{i}", "abc", Sampling(max_new_tokens=2, seed=i))

    iterator = engine.generate(source())
    next(iterator)
    assert taken <= 2 * 6 + 6
    assert len(list(iterator)) == 39


def test_what_is_abandoned_does_not_run_on(engine):
    first = engine.generate(Request(f"a{i}", "ab", Sampling(2 + 8 * i)) for i in range(6))
    next(first)
    assert engine.pending
    first.close()
    assert not engine.pending
    assert engine.stats.running == engine.stats.waiting == 0
    again = engine.generate([Request("a0", "ab", Sampling(3))])
    assert [completion.id for completion in again] == ["a0"]


def test_memory_is_bounded_and_said():
    model = model_of("int4")
    page = 2 * 64 * 2 * 16 * 4 * 2  # keys and values of 64 slots, 2 heads of 16 floats, 2 layers
    engine = Engine(model, EngineConfig(memory=5 * page + 7))
    assert (engine.stats.pages, engine.memory) == (5, 5 * page)
    assert Engine(model, EngineConfig(memory=2 * page)).context == 128
    with pytest.raises(ValueError, match=r"sequence of 128 tokens needs 0\.000 GB; 0\.000 GB are"):
        Engine(model, EngineConfig(memory=page))
    with pytest.raises(ValueError, match="sequence of 192 tokens needs"):
        Engine(model, EngineConfig(memory=2 * page, context=CONTEXT))
    with pytest.raises(
        ValueError, match=r"of the cache needs \d+\.\d\d GB of memory; .* are avail"
    ):
        Engine(model, EngineConfig(memory=10**15, max_sequences=10**9))


def test_requests_beyond_the_pages_are_refused():
    model = model_of("int4")
    engine = Engine(model, EngineConfig(max_sequences=2, memory=2 * 32768, step_tokens=16))
    assert engine.stats.pages == 2
    done = complete(engine, *(Request(f"{i}", "ab" * 30, Sampling(max_new_tokens=60, seed=i))
                              for i in range(3)))  # fmt: skip
    assert [len(c.choices[0].tokens) for c in done.values()] == [60] * 3


def test_a_vocabulary_that_is_too_small():
    from tiny import tiny_model

    with pytest.raises(ValueError, match="the model has 255 tokens; the tokenizer has 256"):
        Engine(tiny_model(vocab_size=255))


def test_reference_operations_serve_too():
    """Without the custom calls of the model, up to rounding."""
    from tiny import changed

    engine = Engine(changed(model_of("int4"), impl="reference"), EngineConfig(max_sequences=2))
    sampling = dataclasses.replace(GREEDY, max_new_tokens=3, logprobs=0)
    done = only(engine, "abcde", sampling).choices[0]
    wanted = only(engine_of("int4", max_sequences=2), "abcde", sampling).choices[0]
    # An activation that is rounded to the next code moves logits by hundredths.
    assert done.logprobs[0].logprob == pytest.approx(wanted.logprobs[0].logprob, abs=0.1)


def test_settings_are_those_of_the_generator():
    """One request means the same here and there."""
    shared = {f.name for f in dataclasses.fields(SamplingParams)}
    assert shared < {f.name for f in dataclasses.fields(Sampling)}
    assert all(getattr(Sampling(), name) == getattr(SamplingParams(), name) for name in shared)
