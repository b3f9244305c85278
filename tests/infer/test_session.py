"""Sessions: what is kept of one text for the next, against generation from scratch."""

import contextlib
import itertools

import pytest
from texts import small_tokenizer
from tiny import tiny_model

from bitjax.infer import Generator, SamplingParams, Session, pack_model, session

GREEDY = SamplingParams(temperature=0, max_new_tokens=6)


@pytest.fixture(scope="module")
def generator():
    model = tiny_model(vocab_size=272, num_layers=1, max_seq_len=200)
    model.tokenizer = small_tokenizer(stop=())
    return Generator(pack_model(model))


def from_scratch(generator, prompt, count=6):
    params = SamplingParams(temperature=0, max_new_tokens=count)
    return [int(tokens[0]) for tokens in generator.tokens([prompt], [params])]


def drawn(running, prompt, count=6):
    params = SamplingParams(temperature=0, max_new_tokens=count)
    return [int(t[0]) for t in running._tokens(list(prompt), params, count)]


def test_turn_by_turn(generator):
    running, prompt, kept = Session(generator), list(b"a first question"), 0
    for more in (b" and one", b"", b" the last, which is somewhat longer " * 2):
        answer = drawn(running, prompt)
        assert answer == from_scratch(generator, prompt)
        assert running.reused == kept
        # All but the last token drawn have been fed.
        kept = len(prompt) + len(answer) - 1
        prompt = [*prompt, *answer, *more]
        if not more:
            prompt.append(7)


@pytest.mark.parametrize("same", [0, 1, 5, 14, 15])
def test_another_history(generator, same):
    """Only what both begin with is kept; at least one token is run."""
    running, first = Session(generator), list(b"some first prompt")[:15]
    drawn(running, first, 1)
    second = [*first[:same], *(200 - t for t in first[same:])]
    assert drawn(running, second) == from_scratch(generator, second)
    assert running.reused == min(same, 14)


def test_the_same_prompt_again_and_a_shorter_one(generator):
    running, prompt = Session(generator), list(b"just the same")
    answers = [drawn(running, prompt), drawn(running, prompt), drawn(running, prompt[:6])]
    assert answers[0] == answers[1]
    assert answers[2] == from_scratch(generator, prompt[:6])
    assert running.reused == 5


def test_long_prompts_come_in_parts(generator, monkeypatch):
    monkeypatch.setattr("bitjax.infer.generator.PREFILL_TOKENS", 16)
    running, prompt = Session(generator), list(range(40))
    assert drawn(running, prompt) == from_scratch(generator, prompt)
    longer = [*prompt, *range(20)]
    assert drawn(running, longer) == from_scratch(generator, longer)


def test_up_to_the_end_of_the_context(generator):
    running, prompt = Session(generator), list(range(190))
    done = running.stream(prompt, SamplingParams(temperature=0, max_new_tokens=50))
    list(done)
    assert (done.completion.tokens, done.completion.finish_reason) == (10, "length")
    with pytest.raises(ValueError, match="the prompt has 200 tokens; the model's context of 200"):
        running.stream(list(range(200)), GREEDY)


def test_an_answer_left_early(generator):
    running, prompt = Session(generator), list(b"a question")
    with contextlib.closing(iter(running.stream(prompt, GREEDY))) as pieces:
        list(itertools.islice(pieces, 2))
    answer = from_scratch(generator, prompt)
    longer = [*prompt, *answer[:2], 5]
    assert drawn(running, longer) == from_scratch(generator, longer)
    assert running.reused >= len(prompt) + 1


def test_an_interrupted_step_starts_afresh(generator, monkeypatch):
    running, prompt = Session(generator), list(b"a question")
    drawn(running, prompt)
    decode = generator.decode

    class Interrupted:
        def __init__(self):
            self.calls = 0

        def __call__(self, *arguments):
            self.calls += 1
            result = decode(*arguments)  # takes the cache
            if self.calls == 2:
                raise KeyboardInterrupt
            return result

    monkeypatch.setattr(generator, "decode", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        drawn(running, [*prompt, 1])
    monkeypatch.setattr(generator, "decode", decode)
    assert drawn(running, [*prompt, 1, 2]) == from_scratch(generator, [*prompt, 1, 2])


def test_compiling_changes_nothing(generator):
    running, prompt = Session(generator), list(b"a question")
    running.compile(prompt, GREEDY)
    programs = len(generator.decode), len(generator.extend)
    answer = drawn(running, prompt)
    assert answer == from_scratch(generator, prompt)
    again = [*prompt, *answer, 3]
    running.compile(again, GREEDY)
    drawn(running, again)
    assert running.reused == len(prompt) + 5
    assert programs[1] == len(generator.extend)


def test_memory_is_asked_for(generator, monkeypatch):
    monkeypatch.setattr(session, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match="a conversation of up to 32 tokens"):
        drawn(Session(generator), list(b"a question, somewhat long"))
