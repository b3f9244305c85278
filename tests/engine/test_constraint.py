"""Texts that must match: every one does, whatever the model would rather say."""

import json
import re
import sys

import numpy as np
import pytest
from engines import engine_of, model_of
from texts import small_tokenizer

from bitjax.engine import Constraint, Request, Sampling
from bitjax.engine.constraint import MAX_CONSTRAINT, Constraints
from bitjax.ops import ffi
from bitjax.tokenizer import BYTES

pytest.importorskip("llguidance")
needs_extension = pytest.mark.skipif(not ffi.available(), reason="the extension is not built")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["red", "green"]},
        "size": {"type": "integer", "minimum": 10, "maximum": 99},
        "wet": {"type": "boolean"},
    },
    "required": ["name", "size", "wet"],
    "additionalProperties": False,
}
KINDS = {
    "json": Constraint("json_schema", json.dumps(SCHEMA)),
    "regex": Constraint("regex", "(yes|no|maybe) [0-9]{2,4}"),
    "lark": Constraint("lark", 'start: "a" start "b" | "c"'),
}


@pytest.fixture(scope="module")
def engine():
    return engine_of("int4", max_sequences=8, step_tokens=32)


def matches(kind, text):
    if kind == "json":
        value = json.loads(text)
        good = set(value) == set(SCHEMA["properties"]) and value["name"] in ("red", "green")
        return good and 10 <= value["size"] <= 99 and isinstance(value["wet"], bool)
    if kind == "regex":
        return re.fullmatch(KINDS["regex"].text, text) is not None
    depth = text.index("c")
    return text == "a" * depth + "c" + "b" * depth


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_texts_match(engine, kind):
    """Hot and greedy, beside requests without a constraint, which do not notice."""
    free = Request("free", "abc", Sampling(max_new_tokens=30, seed=1))
    (wanted,) = engine.generate([free])
    # Or texts are long: a schema allows white space between all parts.
    bias = {ord("a"): -3.0, **dict.fromkeys(b"\t\n\r ", -100.0)} if kind != "regex" else {}
    hot = Sampling(
        temperature=1.0, max_new_tokens=120, n=4, constraint=KINDS[kind], logit_bias=bias
    )
    greedy = Sampling(temperature=0, max_new_tokens=120, constraint=KINDS[kind], logit_bias=bias)
    requests = [Request("hot", "abc", hot), Request("greedy", "abc", greedy), free]
    done = {c.id: c for c in engine.generate(requests)}
    assert done["free"].choices == wanted.choices
    for choice in (*done["hot"].choices, *done["greedy"].choices):
        assert choice.finish_reason == "stop"
        assert matches(kind, choice.text), choice.text
    again = {c.id: c for c in engine.generate(requests[:1])}
    assert again["hot"].choices == done["hot"].choices


@needs_extension
def test_a_screened_head_is_exact_for_what_is_allowed():
    """The two allowed tokens need not be among the likeliest of all."""
    model = model_of("screened")
    engine = engine_of("screened", max_sequences=2)
    sampling = Sampling(temperature=0, max_new_tokens=1, constraint=Constraint("regex", "[xy]"),
                        logprobs=0)  # fmt: skip
    logits = np.asarray(model(np.array([list(b"abc")], np.int32)))[0, -1]
    wanted = "x" if logits[ord("x")] > logits[ord("y")] else "y"
    (done,) = engine.generate([Request("r", "abc", sampling)])
    assert done.choices[0].text == wanted


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "a[", "the regex cannot be compiled: .*unclosed character class"),
        ("json_schema", "{", "the json_schema cannot be compiled: "),
        ("json_schema", '{"type": 5}', "the json_schema cannot be compiled: type must be"),
        ("lark", "start: foo", 'the lark cannot be compiled: .*unknown name: "foo"'),
        ("xml", "", "constraint 'xml' is not json_schema, regex or lark"),
        ("regex", "a" * (MAX_CONSTRAINT + 1), "the regex has 65,537 characters; at most 65,536"),
    ],
)
def test_what_cannot_be_compiled(kind, text, message):
    with pytest.raises(ValueError, match=message):
        Constraints(BYTES, 256).matcher(Constraint(kind, text))


@needs_extension
def test_it_is_an_error_of_that_request_alone(engine):
    bad = Sampling(constraint=Constraint("regex", "a["))
    done = {
        c.id: c
        for c in engine.generate(
            [Request("bad", "abc", bad), Request("good", "abc", Sampling(max_new_tokens=3))]
        )
    }
    assert "cannot be compiled" in done["bad"].error
    assert len(done["good"].choices[0].tokens) == 3


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"need the package llguidance: pip install"):
        Constraints(BYTES, 256).matcher(KINDS["regex"])


def test_tokens_of_several_characters():
    """A text tokenizer: exactly the tokens whose text can go on are allowed, and ends of texts."""
    tokenizer = small_tokenizer()
    vocab = tokenizer.vocab_size + 5  # the model has some more, which are never allowed
    matcher = Constraints(tokenizer, vocab).matcher(Constraint("regex", "(the )*x"))
    pattern = re.compile(b"(the )*x")

    def goes_on(text):
        """Whether some matching text begins so."""
        return any(pattern.fullmatch(text + rest) for rest in (b"", b"x", b"e x", b"he x", b" x"))

    written = b""
    for text in ("the ", "the ", "x"):
        mask = matcher.mask()
        for token in range(vocab):
            allowed = bool(mask[token // 32] >> (token % 32) & 1)
            piece = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else None
            control = token in tokenizer.control.values()
            assert allowed == bool(piece and not control and goes_on(written + piece)), piece
        for token in tokenizer.encode(text, bos=False).tolist():
            assert matcher.take(token) == ""
        written += text.encode()
    assert matcher.complete
