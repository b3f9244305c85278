"""Hostile tokenizer files: each refused with a sentence, in bounded time and memory."""

import base64
import contextlib
import copy
import json
import time

import pytest
from texts import small_tokenizer

from bitjax.text import TextTokenizer
from bitjax.text import document as documents

SOUND = small_tokenizer().document


def check(change):
    found = copy.deepcopy(SOUND)
    change(found)
    return TextTokenizer(json.dumps(found), where="f").check()


def put(*path):
    """A change that sets what a path of keys leads to."""

    def change(found):
        *keys, last, value = path
        for key in keys:
            found = found[key]
        found[last] = value

    return change


def replace(content, count=1, pattern=None):
    step = {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}
    return put("normalizer", {"type": "Sequence", "normalizers": [step] * count})


def charsmap(raw):
    encoded = base64.b64encode(raw).decode()
    return put("normalizer", {"type": "Precompiled", "precompiled_charsmap": encoded})


def nested(depth, stage="normalizer", key="normalizers"):
    step = {"type": "NFC"}
    for _ in range(depth):
        step = {"type": "Sequence", key: [step]}
    return put(stage, step)


VOCABULARY = SOUND["model"]["vocab"]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("model", None), "f is not a tokenizer: it has no model"),
        (put("model", "type", "WordPiece"), "the model is 'WordPiece'; supported are BPE and Uni"),
        (put("model", "vocab", [1]), "supported are BPE and Unigram"),
        (put("model", {"type": "Unigram", "vocab": [["a"]]}), "not a list of pieces with scores"),
        (put("model", "vocab", {**VOCABULARY, "x" * 5000: 300}), "token 300 is 'xxx.*not a short"),
        (put("model", "vocab", {**VOCABULARY, "": 300}), "token 300 is '', not a short"),
        (put("model", "vocab", {**VOCABULARY, "x": 300}), "there is no token 120; ids must be"),
        (put("model", "vocab", {**VOCABULARY, "xy": 500}), "there is no token 272; ids must be"),
        (put("model", "vocab", {**VOCABULARY, "xy": 5}), "id 5 is both"),
        (put("model", "vocab", {**VOCABULARY, "xy": -1}), "'xy' has the id -1"),
        (put("model", "vocab", {**VOCABULARY, "xy": 2**40}), "'xy' has the id 1099511627776"),
        (put("model", "vocab", {**VOCABULARY, "xy": 1.5}), "'xy' has the id 1.5"),
        (put("model", "vocab", {**VOCABULARY, "xy": True}), "'xy' has the id True"),
        (put("model", "dropout", 0.1), "a model with dropout cuts text at random"),
        (put("model", "merges", [["zz", "y"]]), "f: "),
        (put("model", "merges", [[1, 2]]), "f: "),
        (put("added_tokens", [3]), "f: added_tokens is not a list of tokens"),
        (put("added_tokens", [SOUND["added_tokens"][0]] * 2), "added_tokens holds a token twice"),
        (put("added_tokens", 0, "content", ""), "token 267 is '', not a short string"),
        (put("added_tokens", 0, "content", "hello"), "'hello' does not get id 267"),
        (put("decoder", None), "the decoder none is not supported"),
        (put("decoder", {"type": "WordPiece"}), "the decoder 'WordPiece' is not supported"),
        (put("decoder", {"type": "Sequence", "decoders": [BYTES, BYTES]}), "not supported"),
        (put("pre_tokenizer", {"type": "Whistle"}), "the pre_tokenizer 'Whistle' is not supported"),
        (put("pre_tokenizer", []), "the pre_tokenizer is malformed"),
        (put("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTES] * 3}), "maps bytes mo"),
        (put("normalizer", {"type": "BertNormalizer"}), "normalizer 'BertNormalizer' is not supp"),
        (put("normalizer", {"type": "Prepend"}), "a Prepend without its text"),
        (replace("aa", 17), "not a sequence of up to 16 steps"),
        (replace("a" * 16, 3), "the normalizer may make a text 4096 times as long"),
        (replace("a" * 257), "may make a text 257 times as long"),
        (replace("b", pattern={"Regex": "a" * 5000}), "a pattern of the normalizer is no string"),
        (replace("b", pattern={"Regex": "(" * 9}), "f: "),
        (nested(6), "the normalizer is malformed"),
        (nested(90), "the normalizer is malformed"),
        (charsmap(b"\4\0\0\0" + b"\0" * 4 + b"x" * 300 + b"\0"), "make a text 300 times as long"),
        (charsmap(b"\xff\xff\xff\xff"), "the character map is cut short"),
        (charsmap(b""), "the character map is cut short"),
        (put("normalizer", {"type": "Precompiled", "precompiled_charsmap": "%%"}), "not base64"),
        (put("normalizer", {"type": "Precompiled"}), "the character map is not base64"),
    ],
)  # fmt: skip
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check(change)


def test_sequences_may_be_nested_a_little():
    assert check(nested(3)).decode([259]) == "hello"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "f is not a tokenizer's JSON"),
        (b"[" * 200_000, "f is not a tokenizer's JSON"),
        (b"\xff\xfe", "f is not UTF-8"),
        (b"[]", "f is not a tokenizer: it has no model"),
        (b'{"model": {}, "model": {}}', "an object has a key twice"),
        (b"{" + b" " * (documents.MAX_BYTES + 1), "a tokenizer may have 67,108,864"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_not_even_a_document(raw, message):
    with pytest.raises(ValueError, match=message):
        TextTokenizer(raw, where="f").check()


def test_a_charsmap_that_points_anywhere_does_no_harm():
    """Its trie is the library's to walk; whatever it does, it is an error or a text."""
    for seed in range(20):
        trie = bytes((seed * 31 + i * 17) % 256 for i in range(1024))
        tokenizer = check(charsmap((1024).to_bytes(4, "little") + trie + b"x\0y\0"))
        with contextlib.suppress(ValueError):
            tokenizer.encode("hello wörld")


def test_an_expression_without_end_is_an_error_in_time():
    pattern = {"type": "Split", "pattern": {"Regex": r"((a|a)*)*(b|\z.)"}, "behavior": "Isolated",
               "invert": False}  # fmt: skip
    tokenizer = check(put("pre_tokenizer", {"type": "Sequence", "pretokenizers": [pattern, BYTES]}))
    started = time.monotonic()
    with contextlib.suppress(ValueError):
        tokens = tokenizer.encode("a" * 60)
        assert tokenizer.decode(tokens) == "a" * 60
    assert time.monotonic() - started < 60
