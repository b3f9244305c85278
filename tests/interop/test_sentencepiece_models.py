"""sentencepiece models against the sentencepiece library: Llama 2's and some trained here."""

import functools
import io
import random
import re
import struct

import pytest
from texts import EDGES, mixed_text, outside, random_texts

from bitjax.interop.tokenizers import tokenizer_from_gguf
from bitjax.interop.tokenizers.sentencepiece import tokenizer_from_sentencepiece

TEXTS = [*EDGES, *random_texts(300, seed=4)]
# Several characters that a person sees as one, which the two libraries map differently.
CLUSTER = re.compile(
    r"\r\n|[\u0300-\u036f\u200d\ufe0f\u0900-\u0eff\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff]"
)
SIGN = "\u2581"


def library():
    return pytest.importorskip("sentencepiece", reason="sentencepiece is not installed; 'parity'")


def agree(raw, texts, tokenizer=None):
    mine = tokenizer or tokenizer_from_sentencepiece(raw)
    theirs = library().SentencePieceProcessor(model_proto=raw)
    for text in texts:
        tokens = mine.encode(text, bos=False).tolist()
        assert tokens == theirs.encode(text), repr(text)[:100]
        if theirs.unk_id() not in tokens and SIGN not in text:
            assert mine.decode(tokens) == theirs.decode(tokens)
    return mine, theirs


def test_llama2():
    raw = outside("tokenizers/llama2_tokenizer.model").read_bytes()
    mine, theirs = agree(raw, [*TEXTS, mixed_text()])
    assert mine.vocab_size == theirs.get_piece_size() == 32_000
    assert (mine.special.bos, mine.stop, mine.special.add_bos) == (1, (2,), True)
    draw = random.Random(5)
    for _ in range(200):  # tokens of any kind; the bytes among them that are characters
        tokens = draw.choices(range(259, 32_000), k=20)
        at = draw.randrange(20)
        tokens[at:at] = [3 + byte for byte in draw.choice("é€😀a").encode()]
        assert mine.decode(tokens) == theirs.decode(tokens)
        decoder = mine.stream_decoder()
        assert "".join(map(decoder.feed, tokens)) + decoder.finish() == mine.decode(tokens)


def corpus():
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "Hello",
        "don't",
        "naïve",
        "東京",
        "123",
        "42nd",
        "x=y;",
        "it's",
        "ﬁne",
        "",
        "two\tspaces",
    ]
    draw = random.Random(6)
    return [" ".join(draw.choices(words, k=draw.randrange(1, 12))) for _ in range(400)]


@functools.cache
def trained(**settings):
    model = io.BytesIO()
    library().SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, minloglevel=2,
        vocab_size=380 if settings.get("byte_fallback") else 110, hard_vocab_limit=False,
        **settings,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "settings",
    [
        {"byte_fallback": True, "normalization_rule_name": "identity",
         "remove_extra_whitespaces": False},
        {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nfkc_cf", "add_dummy_prefix": False, "byte_fallback": True},
        {"byte_fallback": True, "normalization_rule_name": "nmt_nfkc", "bos_id": -1},
    ],
    ids=["like Llama 2", "no prefix", "nmt_nfkc", "nfkc_cf", "no bos"],
)  # fmt: skip
def test_trained_here(kind, settings):
    texts = [*TEXTS, *corpus()[:50]]
    if settings.get("normalization_rule_name") != "identity":
        texts = [text for text in texts if not CLUSTER.search(text)]
    if kind == "unigram":
        texts = [text for text in texts if "s>" not in text]  # test_control_names_in_unigram
    mine, theirs = agree(trained(model_type=kind, **settings), texts)
    assert mine.special.bos == (None if settings.get("bos_id") else 1)
    assert mine.stop == (theirs.eos_id(),)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_user_defined_and_control_symbols(kind):
    raw = trained(model_type=kind, byte_fallback=True, normalization_rule_name="identity",
                  user_defined_symbols="<tool>", control_symbols="<turn>")  # fmt: skip
    texts = ["a<tool>the cat", "the <tool> mat", "x<tool>", "a  b <tool> x"]
    mine, theirs = agree(raw, texts)
    assert set(mine.control) == {"<unk>", "<s>", "</s>", "<turn>"}
    turn = theirs.piece_to_id("<turn>")
    assert mine.encode("<turn>", control=True).tolist()[-1] == turn


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_control_names_in_unigram(byte_fallback):
    """They are text, if not cut as sentencepiece would cut it."""
    raw = trained(model_type="unigram", byte_fallback=byte_fallback)
    mine = tokenizer_from_sentencepiece(raw)
    for name in ("<s>", "</s>"):
        tokens = mine.encode(f"the {name} cat", bos=False).tolist()
        assert mine.control[name] not in tokens
        assert mine.decode(tokens) == (f"the {name} cat" if byte_fallback else "the s cat")


def llama2c_vocabulary(raw):
    """(piece, score) of llama2.c's tokenizer.bin: length of the longest, then each piece."""
    at, found = 4, []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        found.append((raw[at + 8 : at + 8 + length], score))
        at += 8 + length
    return found


def llama2c_encode(vocabulary, text):
    """llama2.c's way: characters, or bytes; then the neighbours of the best score, again."""
    ids = {piece: i for i, (piece, _) in reversed(list(enumerate(vocabulary)))}
    tokens = [ids[b" "]] if text else []
    for character in text:
        raw = character.encode()
        tokens += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        best = None
        for i in range(len(tokens) - 1):
            token = ids.get(vocabulary[tokens[i]][0] + vocabulary[tokens[i + 1]][0])
            if token is not None and (best is None or vocabulary[token][1] > best[0]):
                best = vocabulary[token][1], i, token
        if best is None:
            return tokens
        tokens[best[1] : best[1] + 2] = [best[2]]


def test_stories260k():
    vocabulary = llama2c_vocabulary(outside("stories260K/tok512.bin").read_bytes())
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece.decode().replace(" ", SIGN) for piece, _ in vocabulary[259:]]
    mine = tokenizer_from_gguf({
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [score for _, score in vocabulary],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259),
    })  # fmt: skip
    assert (mine.vocab_size, mine.special.bos, mine.stop) == (512, 1, (2,))
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside! 1 é"
    for text in [
        story,
        "",
        *(t for t in TEXTS if SIGN not in t and "\0" not in t and "<" not in t),
    ]:
        tokens = mine.encode(text, bos=False).tolist()
        assert tokens == llama2c_encode(vocabulary, text), repr(text)
        assert mine.decode(tokens) == text


def field(number, wire, payload):
    key = bytes([number << 3 | wire]) if number < 16 else bytes([number << 3 & 127 | 128 | wire,
                                                                 number >> 4])  # fmt: skip
    return key + payload


def message(number, payload):
    return field(number, 2, bytes([len(payload)]) + payload)


def piece(text, score=0.0, kind=1):
    return message(
        1, message(1, text) + field(2, 5, struct.pack("<f", score)) + field(3, 0, bytes([kind]))
    )


UNK = piece(b"<unk>", 0, 2)
BPE = message(2, field(3, 0, b"\2"))


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (b"", "f is not a sentencepiece model: it has no pieces"),
        (b"hello world", "f is cut short or no sentencepiece|f is not a sentencepiece"),
        (b"\x0a\xff\xff\xff\xff\x7f", "f is cut short"),
        (b"\x0a" + b"\xff" * 20, "f is cut short"),
        (b"\x08\x01", "f: field 1 is no message"),
        (UNK + message(1, message(1, b"\xff")), "f: piece 1 is malformed"),
        (UNK + message(1, field(1, 0, b"\1")), "f: piece 1 is malformed"),
        (UNK + piece(b""), r"f: piece 1 \(b'', score 0.0, type 1\) is malformed"),
        (UNK + piece(b"a", float("nan")), "score nan, type 1.* is malformed"),
        (UNK + piece(b"a", kind=9), "type 9.* is malformed"),
        (UNK + piece(b"a") * 2, "f holds a piece twice"),
        (UNK + piece(b"a") + message(2, field(3, 0, b"\4")), "the model type is 4; supported are"),
        (UNK + piece(b"a") + message(2, message(3, b"x")), "f: setting 3 is malformed"),
        (UNK + piece(b"a") + message(3, field(5, 0, b"\0")), "f keeps spaces as they are"),
        (UNK + piece(b"a") + message(3, message(2, b"abc")), "the character map is cut short"),
        (UNK[:-3], "f is cut short"),
    ],
    ids=range(16),
)  # fmt: skip
def test_malformed(raw, wanted):
    with pytest.raises(ValueError, match=wanted):
        tokenizer_from_sentencepiece(raw, "f")


def test_the_smallest():
    mine = tokenizer_from_sentencepiece(UNK + piece(SIGN.encode(), -1) + piece(b"a", -2) + BPE)
    assert mine.encode("a a", bos=False).tolist() == [1, 2, 1, 2]


def test_every_bit_flipped():
    """A small model, damaged: an error that names it, or a tokenizer that works."""
    raw = (
        UNK + piece(SIGN.encode(), -1) + piece(b"ab", -2) + piece(b"a", -3) + piece(b"b", -3) + BPE
    )
    raw += message(3, field(3, 0, b"\1") + field(4, 0, b"\0"))
    refused = 0
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            tokenizer_from_sentencepiece(bytes(damaged), "f").encode("ab ba")
        except ValueError as error:
            assert str(error).startswith("f")  # noqa: PT017
            refused += 1
    assert 0 < refused < 8 * len(raw)
