"""Bodies of requests: what they ask for, and what is refused with the field's name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitjax.engine import Constraint, Sampling
from bitjax.protocol import BadRequest, chat_call, completion_call
from bitjax.protocol.calls import derived_seed

TALK = [{"role": "user", "content": "hi"}]
MOST = 100


def completion(**fields):
    return completion_call({"prompt": "a", **fields}, MOST)


def chat(**fields):
    return chat_call({"messages": TALK, **fields}, MOST)


def test_defaults_are_openais():
    call = completion()
    assert (call.kind, call.prompts, call.echo, call.stream, call.seeded) == (
        "completion", ("a",), False, False, False,
    )  # fmt: skip
    assert call.sampling == Sampling(max_new_tokens=16, temperature=1.0)
    assert chat().sampling == Sampling(max_new_tokens=MOST, temperature=1.0)
    assert completion_call({"prompt": "a"}, 5).sampling.max_new_tokens == 5


def test_every_setting():
    common = {
        "model": "m", "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -1,
        "repetition_penalty": 1.2, "presence_penalty": -2, "frequency_penalty": 2, "n": 3,
        "stop": ["x", "yz"], "stop_token_ids": [4], "ignore_eos": True, "user": "u",
        "logit_bias": {"5": -100, "6": 0.5}, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    wanted = Sampling(
        max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=2**32 - 1,
        repetition_penalty=1.2, presence_penalty=-2.0, frequency_penalty=2.0, n=3,
        stop=("x", "yz"), stop_ids=(4,), ignore_eos=True, logit_bias={5: -100.0, 6: 0.5},
        logprobs=4,
    )  # fmt: skip
    one = completion(**common, max_tokens=9, logprobs=4, best_of=3)
    two = chat(**common, max_completion_tokens=9, logprobs=True, top_logprobs=4)
    for call in (one, two):
        assert call.sampling == wanted
        assert (call.model, call.stream, call.include_usage, call.seeded) == ("m", True, True, True)
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(max_tokens=4).sampling.max_new_tokens == 4
    assert chat(max_tokens=4, max_completion_tokens=4).sampling.max_new_tokens == 4
    assert completion(top_k=-1, stop="x", seed=5.0).sampling == Sampling(
        max_new_tokens=16, temperature=1.0, stop=("x",), seed=5
    )
    nulls = dict.fromkeys((*common, "max_tokens", "logprobs", "suffix"))
    assert completion(**nulls) == completion()


def test_prompts_and_messages():
    for prompt, wanted in (
        ("é", ("é",)), ([1, 2], ((1, 2),)), (["a", [3]], ("a", (3,))), ([[1], [2]], ((1,), (2,))),
        ([[]], ((),)),
    ):  # fmt: skip
        assert completion(prompt=prompt).prompts == wanted
    messages = [
        {"role": "developer", "content": "d", "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "", "refusal": None},
    ]
    assert chat(messages=messages).messages == (
        {"role": "system", "content": "d"}, {"role": "user", "content": "ab"},
        {"role": "assistant", "content": ""},
    )  # fmt: skip


def test_constraints():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert json.loads(chat(response_format=named).sampling.constraint.text) == schema
    assert chat(response_format=named).sampling.constraint.kind == "json_schema"
    assert chat(response_format={"type": "json_object"}).sampling.constraint == Constraint(
        "json_schema", '{"type": "object"}'
    )
    assert chat(response_format={"type": "text"}).sampling.constraint is None
    assert completion(guided_regex="a+").sampling.constraint == Constraint("regex", "a+")
    assert completion(guided_grammar="s: x").sampling.constraint == Constraint("lark", "s: x")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "the request has no prompt"),
        ({"prompt": []}, "prompt", "prompt has 0 prompts; it may have 1..1024"),
        ({"prompt": ["a"] * 1025}, "prompt", "prompt has 1025 prompts"),
        ({"prompt": [["a"]]}, "prompt", "prompt=['a'] is neither a text nor a list of tokens"),
        ({"prompt": [1, "a"]}, "prompt", "prompt=1 is neither"),
        ({"prompt": {"a": 1}}, "prompt", "prompt={'a': 1} is neither"),
        ({"prompt": True}, "prompt", "prompt=True is neither"),
        ({"suffix": "x"}, "suffix", "suffix: this model cannot fill a gap"),
        ({"best_of": 2}, "best_of", "best_of=2 with n=1"),
        ({"echo": True, "logprobs": 0}, "echo", "echo with logprobs"),
        ({"logprobs": 21}, "logprobs", "logprobs=21 is not an integer in 0..20"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0 is not an integer in 1..100"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens=1.5 is not an integer"),
        ({"max_tokens": True}, "max_tokens", "max_tokens=True is not an integer"),
        ({"temperature": "1"}, "temperature", "temperature='1' is not a number"),
        ({"temperature": 10**400}, "temperature", "temperature=1000"),
        ({"top_p": 1.5}, None, "top_p=1.5 is not in (0, 1]"),
        ({"presence_penalty": 3}, None, "presence_penalty=3.0 is not in [-2, 2]"),
        ({"n": 2, "temperature": 0}, None, "n=2 samples at temperature 0 would all be the same"),
        ({"stop": [1]}, "stop", "stop=[1] is not a text or a list of texts"),
        ({"stop": ""}, None, "a stop string is empty"),
        ({"stop": ["x"] * 65}, None, "65 stops; at most 64"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids=[-1] is not a list of tok"),
        ({"logit_bias": []}, None, None),
        ({"logit_bias": [1]}, "logit_bias", "logit_bias=[1] is not an object of tokens and numb"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias has 'x': 1, which is no token"),
        ({"logit_bias": {"1": "x"}}, "logit_bias", "logit_bias has '1': 'x'"),
        ({"seed": 2**63}, "seed", "seed=9223372036854775808 is not an integer in"),
        ({"stream": "yes"}, "stream", "stream='yes' is not true or false"),
        ({"stream_options": {}}, "stream_options", "stream_options needs stream=true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field 'str"),
        ({"guided_regex": "a", "guided_grammar": "b"}, "response_format", "two of response_form"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "response_format.type='x"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
         "response_format.json_schema.schema", "response_format.json_schema.schema=1 is not a"),
        ({"nonsense": 1}, "nonsense", "unknown field 'nonsense'"),
        ({"a" * 999: 1}, "a" * 60, "unknown field 'aaa"),
        ({"messages": TALK}, "messages", "unknown field 'messages'"),
    ],
)  # fmt: skip
def test_refused_completions(fields, param, message):
    if message is None:
        assert completion(**fields) == completion()
        return
    with pytest.raises(BadRequest) as caught:
        completion(**fields)
    assert str(caught.value).startswith(message)
    assert caught.value.body()["error"]["param"] == param
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": None}, "messages", "messages=None is not a list of messages"),
        ({"messages": []}, "messages", "messages=[] is not a list of messages"),
        ({"messages": ["a"]}, None, "messages[0] is no object: 'a'"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "messages[0].role=None is not one"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content=None is n"),
        ({"messages": [*TALK, {"role": "x", "content": "a"}]}, "messages[1].role", "messages[1]"),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x", "unknown fi"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content",
         "messages[0].content: the text is not valid Unicode"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content[0]", "messages[0].content[0] is of the kind 'image_url'; this model"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]",
         "messages[0].content[0] is of the kind None"),
        ({"tools": [{}]}, "tools", "tools are not supported"),
        ({"modalities": ["audio"]}, "modalities", "modalities=['audio'] is not ['text']"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs=true"),
        ({"logprobs": 2}, "logprobs", "logprobs=2 is not true or false"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens",
         "max_tokens=3 and max_completion_tokens=4 contradict each other"),
    ],
)  # fmt: skip
def test_refused_chats(fields, param, message):
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert str(caught.value).startswith(message)
    assert caught.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=6) | st.sampled_from(["role", "content", "type", "text"]),
                      inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
NAMES = st.sampled_from(
    ["prompt", "messages", "max_tokens", "temperature", "n", "stop", "stop_token_ids", "seed",
     "logit_bias", "logprobs", "stream", "stream_options", "response_format", "guided_regex",
     "top_logprobs", "best_of", "model", "echo", "tools"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, JSON, max_size=6) | JSON)
def test_any_json_is_a_call_or_refused(body):
    for parse in (completion_call, chat_call):
        try:
            call = parse(body, MOST)
        except BadRequest as error:
            said = error
        else:
            assert 1 <= call.sampling.max_new_tokens <= MOST
            continue
        assert said.status == 400
        json.dumps(said.body()).encode()


def test_derived_seeds_differ():
    seeds = {derived_seed(s, i) for s in range(3) for i in range(2000)}
    assert len(seeds) > 5990
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derived_seed(1, 2) == derived_seed(1, 2)
