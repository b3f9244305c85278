"""tiktoken files against tiktoken."""

import base64
import functools
import random

import pytest
from texts import EDGES, llama3_file, mixed_text, outside, random_texts

from bitjax.interop.tokenizers.tiktoken import looks_like_tiktoken, tokenizer_from_tiktoken

TEXTS = [*EDGES, *random_texts(300, seed=2)]
# The published expression of GPT-2 in tiktoken's own words; Llama 3's is that of its package.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def theirs(path, expression):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed; see 'parity'")
    lines = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    return tiktoken.Encoding(path.name, pat_str=expression, mergeable_ranks=ranks,
                             special_tokens={})  # fmt: skip


@functools.cache
def ours(path):
    return tokenizer_from_tiktoken(path.read_bytes(), str(path))


def agree(path, expression, texts):
    mine, other = ours(path), theirs(path, expression)
    for text in texts:
        tokens = mine.encode(text, bos=False).tolist()
        assert tokens == other.encode_ordinary(text), repr(text)[:80]
        assert mine.decode(tokens) == text
        decoder = mine.stream_decoder()
        assert "".join(map(decoder.feed, tokens)) + decoder.finish() == text
    draw = random.Random(3)  # any tokens: bytes that are no characters among them
    for _ in range(100):
        tokens = draw.choices(range(other.n_vocab), k=20)
        wanted = other.decode(tokens)
        assert mine.decode(tokens) == wanted
        decoder = mine.stream_decoder()
        assert "".join(map(decoder.feed, tokens)) + decoder.finish() == wanted


def test_llama3():
    agree(llama3_file(), LLAMA3, TEXTS)


def test_llama3_on_a_megabyte():
    agree(llama3_file(), LLAMA3, [mixed_text()])


def test_llama3_special_tokens():
    tokenizer = ours(llama3_file())
    assert tokenizer.vocab_size == 128_256
    assert (tokenizer.special.bos, tokenizer.stop) == (128_000, (128_001, 128_009))
    assert tokenizer.special.add_bos
    names = {128_000: "<|begin_of_text|>", 128_006: "<|start_header_id|>", 128_009: "<|eot_id|>",
             128_255: "<|reserved_special_token_250|>"}  # fmt: skip
    for token, name in names.items():
        assert tokenizer.encode(name, control=True).tolist() == [128_000, token]
    assert len(tokenizer.control) == 256


def test_gpt2():
    path = outside("tokenizers/gpt2_r50k_base.tiktoken")
    agree(path, GPT2, [*TEXTS, mixed_text()])
    assert ours(path).stop == (50_256,)
    assert ours(path).encode("a", bos=None).tolist() == [64]


def lines(*pieces):
    return b"\n".join(base64.b64encode(piece) + b" %d" % rank for piece, rank in pieces)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (lines((b"a", 0), (b"b", 1)), "f has 2 pieces; known are Llama 3's 128,000 and GPT-2's"),
        (lines((b"a", 0), (b"b", 0)), "f, line 2: rank 0 is there already"),
        (lines((b"a", 0), (b"b", 2)), "f: its ranks are not 0 to 1"),
        (lines((b"a", 0), (b"a", 1)), "f holds a piece twice"),
        (b"YQ== 0\nYg= 1", r"f, line 2: b'Yg= 1' is not base64 and a rank"),
        (b"YQ== -1", "line 1: b'YQ== -1' is not"),
        (b"YQ== 99999999999", "line 1"),
        (b"\x00\x01", "line 1"),
        (lines((b"a" * 40_000, 0)), "its tokens are too long"),
    ],
    ids=range(9),
)
def test_malformed(raw, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_tiktoken(raw, "f")


def test_what_looks_like_one():
    assert looks_like_tiktoken(b"IQ== 0\nIg== 1\n")
    assert not looks_like_tiktoken(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    assert not looks_like_tiktoken(b"")
