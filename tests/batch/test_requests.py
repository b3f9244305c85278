"""Lines as requests and completions as records: the three forms, defaults, and what is wrong."""

import pytest
from texts import small_tokenizer
from tiny import tiny_config

from bitjax.batch.lines import Line
from bitjax.batch.requests import Reader, index_of, record_of
from bitjax.config import BatchConfig
from bitjax.engine import Choice, Completion, TokenLogprob, Usage
from bitjax.protocol import Encoder
from bitjax.protocol.calls import derived_seed
from bitjax.tokenizer import BYTES

TALK = [{"role": "user", "content": "hi"}]
CONTEXT = 64


@pytest.fixture(scope="module")
def encoder():
    made = Encoder(small_tokenizer(), tiny_config(vocab_size=272), CONTEXT)
    yield made
    made.close()


def items(encoder, *values, settings=None, **config):
    reader = Reader(encoder, BatchConfig(**config), settings or {})
    return reader.items([Line(i, v) for i, v in enumerate(values)])


def openai(**changes):
    body = {"model": "m", "messages": TALK}
    return {"custom_id": "c1", "method": "POST", "url": "/v1/chat/completions", "body": body,
            **changes}  # fmt: skip


def test_forms(encoder):
    found = items(
        encoder, "hello", {"prompt": "in", "id": 7, "max_tokens": 3, "temperature": 0},
        {"messages": TALK, "max_completion_tokens": 5, "seed": 4}, openai(),
        openai(custom_id="c2", url="/v1/completions", body={"prompt": ["a", [5, 6]]}),
        settings={"top_k": 9},
    )  # fmt: skip
    assert [item.error for item in found] == [None] * 5
    assert [item.id for item in found] == [None, "7", None, "c1", "c2"]
    sampling = [item.call.sampling for item in found]
    assert [s.max_new_tokens for s in sampling] == [CONTEXT, 3, 5, CONTEXT, 16]
    assert [s.temperature for s in sampling] == [0.8, 0.0, 0.8, 1.0, 1.0]
    assert {s.top_k for s in sampling} == {9}
    seeds = [derived_seed(0, i) for i in range(5)]
    assert [s.seed for s in sampling] == [*seeds[:2], 4, *seeds[3:]]
    assert len({*seeds}) == 5
    assert found[0].tokens == (tuple(small_tokenizer().encode("hello").tolist()),)
    assert found[2].tokens == found[3].tokens
    assert found[4].tokens == ((97,), (5, 6))
    assert [r.id for r in found[4].requests()] == ["4.0", "4.1"]


def test_settings_of_the_job(encoder):
    settings = {"max_tokens": 1000, "temperature": 0.0, "stop": ["x"]}
    [plain, own, talk] = items(
        encoder, "a", {"prompt": "b", "temperature": 1, "stop": "y"}, openai(), settings=settings
    )
    assert plain.call.sampling.max_new_tokens == CONTEXT
    assert (plain.call.sampling.stop, own.call.sampling.stop) == (("x",), ("y",))
    assert (own.call.sampling.temperature, talk.call.sampling.temperature) == (1.0, 0.0)
    with pytest.raises(ValueError, match=r"^top_p=7\.0 is not in \(0, 1\]$"):
        items(encoder, settings={"top_p": 7.0})


def test_fields_by_other_names(encoder):
    line = {"text": "in", "label": [1, {"a": None}], "id": "x"}
    [item] = items(encoder, line, field="text", keep=("label", "id"))
    assert (item.tokens, item.id) == (((266,),), None)
    assert item.kept == {"label": [1, {"a": None}], "id": "x"}
    [item] = items(encoder, line)
    assert str(item.error) == "unknown field 'text'"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "the prompt is empty; give at least one character"),
        ("x" * 64, "the prompt has 64 tokens; the context of 64 leaves no room for an answer"),
        ("x" * 10_000_000, "the prompt has at least [0-9,]+ tokens; the context of 64 leaves"),
        ("a\ud800", "prompt: the text is not valid Unicode: surrogates not allowed"),
        ({}, "the request has no prompt"),
        ({"prompt": 3}, "prompt=3 is neither a text nor a list of tokens"),
        ({"prompt": ["a", "b"]}, "the line has several prompts; give each a line"),
        ({"prompt": [300]}, r"token 300 of the prompt is not in 0\.\.271"),
        ({"prompt": "a", "messages": TALK}, "the line has both a prompt and messages"),
        ({"prompt": "a", "temprature": 1}, "unknown field 'temprature'"),
        ({"prompt": "a", "temperature": -1}, r"temperature=-1\.0 is not in \[0, inf\)"),
        ({"prompt": "a", "n": 2, "temperature": 0}, "n=2 samples at temperature 0 would all be"),
        ({"prompt": "a", "max_tokens": 65}, r"max_tokens=65 is not an integer in 1\.\.64"),
        ({"messages": TALK, "stop_token_ids": [272]}, "token 272 of stop_token_ids is not in 0"),
        ({"prompt": "a", "stream": True}, "stream is not for batches"),
        ({"prompt": "a", "echo": True}, "echo is not for batches"),
        ({"prompt": "a", "id": ""}, r"id='' is not a text of 1\.\.512 characters"),
        ({"prompt": "a", "id": "\ud800"}, "id: the text is not valid Unicode"),
        ({"messages": []}, r"messages=\[\] is not a list of messages"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, "the prompt has [m0-9]"),
        ({"messages": TALK * 9}, "the prompt has 1[0-9][0-9] tokens; the context of 64 leaves"),
        (openai(custom_id=None), "the line has no custom_id"),
        (openai(custom_id={}), r"custom_id=\{\} is not a text"),
        (openai(method="GET"), "method='GET' is not POST"),
        (openai(url="/v1/embeddings"), "url='/v1/embeddings' is not one of /v1/completions, "),
        (openai(body=[1]), r"the request is no object: \[1\]"),
        (openai(extra=1), "unknown field 'extra'"),
        (openai(body={"prompt": "a"}), "unknown field 'prompt'"),
    ],
)  # fmt: skip
def test_wrong_lines(encoder, value, message):
    import re

    before, wrong, behind = items(encoder, "a", value, {"messages": TALK})
    assert before.error is None
    assert behind.error is None
    assert re.match(message, str(wrong.error))
    record = record_of(wrong, (), "m", encoder)
    assert index_of(record) == 1
    said = record["error"] or record["response"]["body"]["error"]
    assert said["message"] == str(wrong.error)
    if wrong.openai and wrong.id is not None:
        assert record["response"]["status_code"] == 400
        assert record["error"] is None


def test_ids_are_of_one_line(encoder):
    found = items(encoder, {"prompt": "a", "id": "1"}, {"prompt": "a", "id": 1}, openai(), openai())
    assert [str(item.error or "") for item in found] == [
        "", "id='1' is that of an earlier line", "", "custom_id='c1' is that of an earlier line",
    ]  # fmt: skip
    reader = Reader(encoder, BatchConfig(), {})
    reader.skip(Line(0, {"prompt": "a", "id": "1"}))
    reader.skip(Line(1, None, "not JSON"))
    [item] = reader.items([Line(2, {"prompt": "b", "id": "1"})])
    assert str(item.error) == "id='1' is that of an earlier line"


def test_a_model_without_chats():
    encoder = Encoder(BYTES, tiny_config(), 48)
    found = items(encoder, "a", {"messages": TALK})
    assert found[0].error is None
    assert str(found[1].error).startswith("a chat needs tokens that begin and end turns")
    encoder.close()


def completion(*texts, error=""):
    choices = tuple(
        Choice(i, text, (97,) * len(text), "stop", tuple(TokenLogprob(97, -0.5) for _ in text))
        for i, text in enumerate(texts)
    )
    return Completion("x", choices, Usage(3, 1, sum(map(len, texts))), error=error)


def test_records(encoder):
    line = {"prompt": "a", "id": "i", "label": 2}
    one, several, failed, talk, two = items(
        encoder, line, {"prompt": "a", "n": 2, "logprobs": 0}, "a", openai(),
        openai(custom_id="c2", url="/v1/completions", body={"prompt": ["a", "b"]}), keep=("label",),
    )  # fmt: skip
    use = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert record_of(one, [completion("ab")], "m", encoder) == {
        "index": 0, "id": "i", "label": 2, "text": "ab", "finish_reason": "stop", "usage": use,
    }  # fmt: skip
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{}], "text_offset": [0]}
    assert record_of(several, [completion("a", "b")], "m", encoder) == {
        "index": 1, "usage": use, "choices": [
            {"text": text, "finish_reason": "stop", "logprobs": logprobs} for text in "ab"],
    }  # fmt: skip
    record = record_of(failed, [completion(error="out of memory")], "m", encoder)
    assert (record["index"], record["error"]["message"]) == (2, "out of memory")
    assert record["error"]["type"] == "server_error"
    record = record_of(talk, [completion("ab")], "m", encoder)
    assert (record["id"], record["custom_id"], record["error"]) == (
        "batch_req_000000000003", "c1", None,
    )  # fmt: skip
    body = record["response"]["body"]
    assert record["response"]["status_code"] == 200
    assert body.pop("created") > 1.7e9
    assert body == {
        "id": "chatcmpl-batch-000000000003", "object": "chat.completion", "model": "m",
        "choices": [{"index": 0, "logprobs": None, "finish_reason": "stop",
                     "message": {"role": "assistant", "content": "ab", "refusal": None}}],
        "usage": use | {"prompt_tokens_details": {"cached_tokens": 1}},
    }  # fmt: skip
    record = record_of(two, [completion("ab"), completion("c")], "named", encoder)
    body = record["response"]["body"]
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "ab"), (1, "c")]
    assert (body["model"], body["usage"]["total_tokens"]) == ("named", 9)
    record = record_of(two, [completion("ab"), completion(error="no")], "m", encoder)
    assert record["response"]["status_code"] == 500


@pytest.mark.parametrize("record", [{}, [], {"index": "1"}, {"index": True}, {"id": "batch_req_x"}])
def test_what_is_no_record(record):
    with pytest.raises(ValueError, match="no record"):
        index_of(record)
