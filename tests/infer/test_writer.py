"""Where a text of a released model's tokens ends, and what of them shows."""

import pytest
from texts import small_tokenizer
from tiny import tiny_model

from bitjax.infer import Generator, SamplingParams
from bitjax.infer.writer import TextWriter

HELLO, WORLD, START, END = 259, 262, 268, 269


def written(tokens, room=9, end=END, **params):
    writer = TextWriter(small_tokenizer(stop=(end,)), SamplingParams(**params), room)
    pieces = [writer.feed(token) for token in tokens]
    return pieces, writer


def test_a_token_that_ends_texts():
    pieces, writer = written([HELLO, WORLD, END, HELLO])
    assert pieces == ["hello", " wor", "", ""]
    assert (writer.text, writer.finish_reason, writer.tokens) == ("hello wor", "stop", 3)


def test_its_text_is_not_part_of_the_text():
    pieces, writer = written([WORLD, HELLO], end=HELLO)
    assert pieces == [" wor", ""]
    assert writer.finish_reason == "stop"


def test_at_the_last_token_it_is_still_a_stop():
    _, writer = written([HELLO, END], room=2)
    assert writer.finish_reason == "stop"
    _, writer = written([HELLO, WORLD], room=2)
    assert writer.finish_reason == "length"


def test_other_control_tokens_do_not_show():
    pieces, writer = written([HELLO, START, WORLD])
    assert pieces == ["hello", "", " wor"]
    assert writer.finish_reason == ""


def test_what_was_held_for_a_stop_string_comes_out_at_the_end():
    pieces, writer = written([HELLO, END], stop=("lo world",))
    assert pieces == ["hel", "lo"]
    assert writer.text == "hello"
    pieces, writer = written([HELLO, WORLD, 263], stop=("lo world",))
    assert (writer.text, writer.finish_reason) == ("hel", "stop")


def test_an_unfinished_character_at_the_end():
    pieces, _ = written([0xE2, 0x82, END])
    assert pieces == ["", "", "\ufffd"]


def test_generator_takes_the_models_tokenizer():
    model = tiny_model(vocab_size=272, num_layers=1)
    model.tokenizer = small_tokenizer(stop=())
    params = SamplingParams(temperature=0, max_new_tokens=12)
    free = Generator(model).generate(["hello world"], params)[0]
    assert (free.tokens, free.finish_reason) == (12, "length")
    ids = model.tokenizer.encode("hello world").tolist()
    drawn = [int(t[0]) for t in Generator(model).tokens([ids], [params])]
    assert free.text == model.tokenizer.decode(drawn)
    # The third token, if it were an end, would be the last.
    model.tokenizer = small_tokenizer(stop=(drawn[2],))
    stopped = Generator(model).generate(["hello world"], params)[0]
    first = drawn.index(drawn[2])
    assert (stopped.tokens, stopped.finish_reason) == (first + 1, "stop")
    assert stopped.text == model.tokenizer.decode(drawn[:first])


def test_more_tokens_than_the_model():
    model = tiny_model(vocab_size=271, num_layers=1)
    model.tokenizer = small_tokenizer()
    with pytest.raises(ValueError, match="the model has 271 tokens; the tokenizer has 272"):
        Generator(model)
