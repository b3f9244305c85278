"""Bodies of answers: as OpenAI's own library reads them."""

import math

import pytest
from openai.types import Completion as TheirCompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from texts import small_tokenizer

from bitjax.engine import Choice, Completion, Delta, TokenLogprob, Usage
from bitjax.protocol import Answers, BadRequest, chat_call, completion_call
from bitjax.tokenizer import BYTES

TALK = [{"role": "user", "content": "hi"}]
E_ACUTE = small_tokenizer().encode("é").tolist()  # one token of two bytes


def answers(kind="completion", tokenizer=None, **fields):
    if kind == "completion":
        call = completion_call({"prompt": ["hello", [266]], **fields}, 50)
    else:
        call = chat_call({"messages": TALK, **fields}, 50)
    return Answers.now("1", call, "m", tokenizer or small_tokenizer())


def completion(*texts, logprobs=()):
    choices = tuple(Choice(i, text, (97,), "stop", logprobs) for i, text in enumerate(texts))
    return Completion("x", choices, Usage(3, 2, 4))


LOGPROBS = (
    TokenLogprob(97, -0.5, ((97, -0.5), (98, -1.0))),
    TokenLogprob(0xC3, -math.inf, ((0xC3, -math.inf),)),
    TokenLogprob(E_ACUTE[0], -2.0, ()),
)


def test_whole_completions():
    body = answers(n=2, echo=True).whole([completion("a", "b"), completion("c", "d")])
    read = TheirCompletion.model_validate(body, strict=True)
    assert [(c.index, c.text, c.finish_reason) for c in read.choices] == [
        (0, "helloa", "stop"), (1, "hellob", "stop"), (2, "inc", "stop"), (3, "ind", "stop"),
    ]  # fmt: skip
    use = read.usage
    assert (use.prompt_tokens, use.completion_tokens, use.total_tokens) == (6, 8, 14)
    assert use.prompt_tokens_details.cached_tokens == 4
    assert (read.id, read.model, read.choices[0].logprobs) == ("cmpl-1", "m", None)


def test_logprobs_of_completions():
    body = answers(logprobs=2).whole([completion("a", logprobs=LOGPROBS)])
    found = TheirCompletion.model_validate(body, strict=True).choices[0].logprobs
    assert found.tokens == ["a", "bytes:\\xc3", "é"]
    assert found.token_logprobs == [-0.5, -9999.0, -2.0]
    assert found.top_logprobs == [{"a": -0.5, "b": -1.0}, {"bytes:\\xc3": -9999.0}, {}]
    assert found.text_offset == [0, 1, 11]
    body = answers(logprobs=0).whole([completion("")])
    assert body["choices"][0]["logprobs"]["text_offset"] == []


@pytest.mark.parametrize("tokenizer", [None, BYTES])
def test_whole_chats(tokenizer):
    made = answers("chat", tokenizer, logprobs=True, top_logprobs=2)
    body = made.whole([completion("ab", logprobs=LOGPROBS[:2])])
    read = ChatCompletion.model_validate(body, strict=True)
    [choice] = read.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "ab")
    first, second = choice.logprobs.content
    assert (first.token, first.bytes, first.logprob) == ("a", [97], -0.5)
    assert [(t.token, t.bytes, t.logprob) for t in first.top_logprobs] == [
        ("a", [97], -0.5), ("b", [98], -1.0),
    ]  # fmt: skip
    assert (second.token, second.bytes, second.logprob) == ("bytes:\\xc3", [0xC3], -9999.0)
    assert read.id == "chatcmpl-1"


def test_errors():
    with pytest.raises(BadRequest, match="no memory") as caught:
        answers().whole([completion("a"), Completion("x", (), error="no memory")])
    assert caught.value.body()["error"]["type"] == "server_error"


def test_chunks_of_chats():
    made = answers("chat", logprobs=True)
    first = made.pieces(Delta("x", 0, "", (1,)), 0, first=True)
    read = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in first]
    assert [chunk.choices[0].delta.role for chunk in read] == ["assistant"]
    [chunk] = made.pieces(Delta("x", 0, "é", (1,), LOGPROBS[:1]), 0, first=False)
    read = ChatCompletionChunk.model_validate(chunk, strict=True)
    assert read.choices[0].delta.content == "é"
    assert read.choices[0].logprobs.content[0].token == "a"
    assert made.pieces(Delta("x", 0, "", (1,)), 0, first=False) == []
    [chunk] = made.pieces(Delta("x", 0, "", (1,), (), "stop"), 0, first=False)
    read = ChatCompletionChunk.model_validate(chunk, strict=True)
    assert (read.choices[0].finish_reason, read.choices[0].delta.content) == ("stop", None)
    read = ChatCompletionChunk.model_validate(made.last([completion("a")]), strict=True)
    assert (read.choices, read.usage.total_tokens) == ([], 7)


def test_chunks_of_completions():
    made = answers(n=2, echo=True)
    [chunk] = made.pieces(Delta("x", 1, "a", (1,)), 1, first=True)
    ended = [choice | {"finish_reason": "stop"} for choice in chunk["choices"]]
    read = TheirCompletion.model_validate(chunk | {"choices": ended}, strict=True)
    assert (read.choices[0].index, read.choices[0].text) == (3, "ina")
    assert chunk["choices"][0]["finish_reason"] is None  # as theirs, whose type forbids it
    [chunk] = made.pieces(Delta("x", 0, "", (), (), "length"), 0, first=False)
    assert chunk["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    ]
