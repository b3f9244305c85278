"""The tokenizer of released models on a small vocabulary: encoding, control tokens, streams."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import EDGES, random_texts, small_tokenizer

from bitjax.interop.tokenizers.documents import (
    Added,
    bpe_model,
    merges_by_score,
    sentencepiece,
    tokenizer_of,
)
from bitjax.text import Specials, TextTokenizer

BEGIN, START, END, UNUSED, TOOL = range(267, 272)


def pieces_tokenizer(prefix=True):
    """sentencepiece-like: unknown, two control tokens, all bytes, some pieces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    scores = {"▁": -9, "a": -9, "b": -9, "é": -9, "▁a": -1, "ab": -2, "▁ab": -3, "▁▁": -4}
    added = [Added(i, pieces[i], control=True) for i in range(3)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *scores])}
    model = bpe_model(vocabulary, merges_by_score(scores), "<unk>", byte_fallback=True)
    document = sentencepiece(model, added, prefix)
    return tokenizer_of("pieces", document, Specials(bos=1, stop=(2,), add_bos=True))


KINDS = {
    "byte level": small_tokenizer(),
    "pieces": pieces_tokenizer(),
    "pieces without prefix": pieces_tokenizer(prefix=False),
}
kinds = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)


def streamed(tokenizer, tokens, **settings):
    decoder = tokenizer.stream_decoder(**settings)
    return [*(decoder.feed(token) for token in tokens), decoder.finish()]


@kinds
@pytest.mark.parametrize("text", [*EDGES, *random_texts(40)], ids=lambda text: repr(text)[:20])
def test_round_trip(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    if tokenizer is not KINDS["byte level"]:
        text = text.replace("▁", " ")  # the piece's sign for a space is one in text too
    assert tokenizer.decode(tokens) == text


def test_words_and_merges():
    hello, world = 259, 262
    assert KINDS["byte level"].encode("hello world").tolist() == [hello, world, 263]
    assert KINDS["pieces"].encode("ab b").tolist() == [1, 265, 259, 261]
    assert KINDS["pieces without prefix"].encode("ab", bos=False).tolist() == [264]


@kinds
@given(data=st.data())
def test_streams_equal_the_whole(tokenizer, data):
    """Any tokens: broken UTF-8, control tokens and ids that are none among them."""
    tokens = data.draw(st.lists(st.integers(-2, tokenizer.vocab_size + 2), max_size=30))
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)


@given(text=st.text(), cut=st.integers(0, 60))
def test_a_stream_holds_whole_characters_only(text, cut):
    tokenizer = KINDS["byte level"]
    tokens = tokenizer.encode(text).tolist()
    decoder = tokenizer.stream_decoder()
    before = "".join(map(decoder.feed, tokens[:cut]))
    assert text.startswith(before)
    raw = b"".join(map(tokenizer.token_bytes, tokens[:cut]))
    assert len(raw) - len(before.encode()) < 4


def test_bytes_of_pieces_come_together():
    tokenizer = KINDS["pieces without prefix"]
    assert streamed(tokenizer, [3 + 0xE2, 3 + 0x82, 3 + 0xAC]) == ["", "", "€", ""]
    assert streamed(tokenizer, [3 + 0xE2, 260]) == ["", "\ufffda", ""]
    assert streamed(tokenizer, [3 + 0xE2]) == ["", "\ufffd"]


def test_a_control_token_does_not_join_what_it_parts():
    tokenizer = KINDS["byte level"]
    assert streamed(tokenizer, [0xE2, START, 0x82, 0xAC]) == ["", "\ufffd", "\ufffd", "\ufffd", ""]
    assert tokenizer.decode([0xE2, START, 0x82, 0xAC], control=True).count("\ufffd") == 3


def test_the_space_at_the_beginning_is_one_only_behind_other_text():
    tokenizer = KINDS["pieces"]
    tokens = tokenizer.encode("ab a", bos=False)
    assert streamed(tokenizer, tokens) == ["ab", " a", ""]
    assert streamed(tokenizer, tokens, continues=True) == [" ab", " a", ""]
    assert streamed(tokenizer, [1, *tokens]) == ["", "ab", " a", ""]  # a control token is no text
    assert streamed(tokenizer, tokenizer.encode("  a", bos=False)) == [" ", " a", ""]


@kinds
def test_control_tokens_in_text_are_text(tokenizer):
    for name, token in tokenizer.control.items():
        text = f"a{name}b"
        plain = tokenizer.encode(text, bos=False)
        parsed = tokenizer.encode(text, control=True, bos=False)
        assert token not in plain
        assert token in parsed
        assert tokenizer.decode(plain) == text
        assert tokenizer.decode(parsed, control=True).replace("> ", ">") == text
        assert name not in tokenizer.decode(parsed)


def test_user_defined_tokens_are_found_in_any_text():
    tokenizer = KINDS["byte level"]
    assert TOOL in tokenizer.encode("a<tool>b")
    assert tokenizer.decode(tokenizer.encode("a<tool>b")) == "a<tool>b"


def test_bos():
    with_bos = small_tokenizer(add_bos=True)
    assert with_bos.encode("in").tolist() == [BEGIN, 266]
    assert with_bos.encode("in", bos=False).tolist() == [266]
    assert KINDS["byte level"].encode("in").tolist() == [266]
    assert KINDS["byte level"].encode("", bos=True).tolist() == [BEGIN]


def test_what_it_tells():
    tokenizer = KINDS["byte level"]
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.stop) == ("text", 272, (END,))
    assert tokenizer.control["<|im_start|>"] == START
    assert tokenizer.token_bytes(START) == b"<|im_start|>"
    assert [tokenizer.token_bytes(t) for t in (-1, 272)] == [None, None]
    assert tokenizer.words("it is") == ["it", "Ġis"]


def test_nothing_is_read_before_text_is_needed():
    def read():
        raise AssertionError("read")

    tokenizer = TextTokenizer(read, Specials(stop=(3,)), size=9)
    assert (tokenizer.vocab_size, tokenizer.stop) == (9, (3,))
    with pytest.raises(AssertionError):
        tokenizer.encode("")


def test_lone_surrogates_are_refused():
    with pytest.raises(ValueError, match="not valid Unicode: surrogates not allowed"):
        KINDS["byte level"].encode("a\ud800")


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({"bos": -1}, "bos=-1 and stop"),
        ({"bos": True}, "bos=True and stop"),
        ({"stop": (1, "2")}, "are not tokens"),
        ({"stop": [1]}, "stop=.* is not a list of up to 64"),
        ({"stop": tuple(range(65))}, "is not a list of up to 64"),
        ({"add_bos": True}, "add_bos=True with bos=None"),
        ({"add_bos": 1, "bos": 1}, "add_bos=1 with"),
        ({"chat_template": "a" * 200_000}, "no text of up to 131,072"),
        ({"chat_template": 3}, "chat_template=3"),
        ({"pre": "x" * 65}, "pre="),
    ],
)
def test_settings_that_are_refused(special, message):
    with pytest.raises(ValueError, match=message):
        Specials(**special)


def test_special_tokens_outside_the_vocabulary():
    json = KINDS["byte level"].json
    with pytest.raises(ValueError, match=r"here: special token 272 is not in 0\.\.271"):
        TextTokenizer(json, Specials(stop=(272,)), "here").check()
    with pytest.raises(ValueError, match="here has 272 tokens; 271 were announced"):
        TextTokenizer(json, where="here", size=271).check()
