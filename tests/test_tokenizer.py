"""Byte tokens and streams of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitjax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
# Characters of one to four bytes; hypothesis draws from all seventeen planes but surrogates.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLANES = [0x20, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF] + [
    plane * 0x10000 + offset for plane in range(1, 17) for offset in (0, 0x1234, 0xFFFF)
]


def streamed(tokens):
    decoder = TOKENIZER.stream_decoder()
    return [*(decoder.feed(token) for token in tokens), decoder.finish()]


@given(ANY_TEXT)
def test_round_trip(text):
    tokens = TOKENIZER.encode(text)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == list(text.encode())
    assert TOKENIZER.decode(tokens) == text


@pytest.mark.parametrize("code", PLANES, ids=hex)
def test_every_plane_comes_whole(code):
    tokens = TOKENIZER.encode(chr(code))
    assert TOKENIZER.decode(tokens) == chr(code)
    # Nothing until the last byte of the character, all of it then, nothing left over.
    assert streamed(tokens) == [""] * (len(tokens) - 1) + [chr(code), ""]


@given(ANY_TEXT)
def test_streaming_never_splits_a_character(text):
    pieces = streamed(TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)


@given(ANY_TEXT, st.data())
def test_a_stream_cut_anywhere_holds_whole_characters_only(text, data):
    tokens = TOKENIZER.encode(text)
    cut = data.draw(st.integers(0, len(tokens)))
    decoder = TOKENIZER.stream_decoder()
    before = "".join(map(decoder.feed, tokens[:cut]))
    # The longest prefix of the text that fits the bytes fed.
    whole = max(n for n in range(len(text) + 1) if len(text[:n].encode()) <= cut)
    assert before == text[:whole]
    left = "\ufffd" if len(text[:whole].encode()) < cut else ""
    assert decoder.finish() == left


@given(st.binary())
def test_any_bytes_decode_as_python_does(raw):
    wanted = raw.decode("utf-8", errors="replace")
    assert TOKENIZER.decode(raw) == wanted
    assert "".join(streamed(raw)) == wanted


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([], ""),
        ([0x80], "\ufffd"),  # a continuation without a start
        ([0xC3], "\ufffd"),  # a start without continuation, at the end
        ([0xC3, 0x41], "\ufffdA"),  # and before another character
        ([0xC0, 0xAF], "\ufffd\ufffd"),  # overlong
        ([0xED, 0xA0, 0x80], "\ufffd\ufffd\ufffd"),  # a surrogate
        ([0xF4, 0x90, 0x80, 0x80], "\ufffd" * 4),  # beyond U+10FFFF
        ([0x41, 256, 0x42], "A\ufffdB"),  # no byte
        ([-1], "\ufffd"),
        ([0xC3, 300, 0xA9], "\ufffd\ufffd\ufffd"),  # the halves do not join around it
    ],
)
def test_malformed(tokens, text):
    assert TOKENIZER.decode(tokens) == text


def test_streams_are_independent():
    first, second = TOKENIZER.stream_decoder(), TOKENIZER.stream_decoder()
    assert first.feed(0xC3) == ""
    assert second.feed(0x41) == "A"
    assert first.feed(0xA9) == "é"


def test_lone_surrogates_are_refused():
    with pytest.raises(ValueError, match="the text is not valid Unicode: surrogates not allowed"):
        TOKENIZER.encode("a\ud800b")


def test_name_and_size():
    assert (TOKENIZER.name, TOKENIZER.vocab_size) == ("bytes", 256)
