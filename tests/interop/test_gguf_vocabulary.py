"""The vocabulary inside GGUF files, against llama.cpp."""

import dataclasses
import itertools

import numpy as np
import pytest
from llama_cpp import LlamaCpp
from texts import EDGES, mixed_text, random_texts, small_tokenizer, smollm2_file
from tiny import tiny_model

from bitjax.interop.gguf import write_gguf
from bitjax.interop.gguf.container import open_container
from bitjax.interop.model_file import checkpoint_of
from bitjax.interop.tokenizers import gguf_metadata, tokenizer_from_gguf
from bitjax.interop.tokenizers.documents import (
    Added,
    bpe_model,
    byte_level,
    merges_by_score,
    sentencepiece,
    tokenizer_of,
)
from bitjax.interop.tokenizers.gguf import PRE_NAMES, WORDS
from bitjax.text import Specials
from bitjax.text import document as documents
from bitjax.text.tokenizer import CHARACTER_OF
from bitjax.tokenizer import BYTES

TEXTS = [*EDGES, *random_texts(60, seed=1), "whole words, a whole", "wholewords"]


def greedy_merges(count):
    """Pairs that are common in `TEXTS` wherever words may end: how text is cut shows in tokens."""
    words = [[CHARACTER_OF[byte] for byte in text.encode()] for text in TEXTS[:-2]]
    words.append([CHARACTER_OF[byte] for byte in b" 12 345 !? \n\n  I'll d 's ..."] * 3)
    merges = []
    for _ in range(count):
        pairs = {}
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def test_smollm2():
    path = smollm2_file()
    ours = tokenizer_from_gguf(open_container(path).metadata, str(path))
    assert ours.special.bos == 1
    assert ours.stop == (2, 0)  # <|im_end|>, <|endoftext|>
    # It lacks bytes that begin characters nobody uses. Both leave them out, but llama.cpp does not
    # merge what stood on both sides of them.
    pieces = dict(documents.pieces("", ours.document))
    held = {byte for byte in range(256) if CHARACTER_OF[byte] in pieces}
    with LlamaCpp(path, length=8) as theirs:
        for text in TEXTS:
            if held.issuperset(text.encode()):
                assert ours.encode(text).tolist() == theirs.tokenize(text), repr(text)
                parsed = ours.encode(text, control=True).tolist()
                assert parsed == theirs.tokenize(text, special=True), repr(text)
        text = mixed_text()
        assert ours.encode(text).tolist() == theirs.tokenize(text)


@pytest.fixture(scope="module")
def words_vocabulary():
    merges = greedy_merges(400)
    vocabulary = {CHARACTER_OF[byte]: byte for byte in range(256)}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    for word in ("whole", "Ġwords"):  # that no merge makes
        vocabulary[word] = len(vocabulary)
    added = [Added(len(vocabulary), "<s>", True), Added(len(vocabulary) + 1, "</s>", True)]
    return vocabulary, merges, added


@pytest.fixture(scope="module")
def checkpoint():
    return checkpoint_of(
        tiny_model(
            vocab_size=700,
            hidden_size=32,
            num_layers=1,
            weights="float",
            activations="float",
            sub_norm=False,
            activation="silu",
        )
    )


def in_llama_cpp(tmp_path, checkpoint, tokenizer):
    """llama.cpp with a tiny model and this tokenizer, written by us."""
    path = tmp_path / "model.gguf"
    write_gguf(path, dataclasses.replace(checkpoint, tokenizer=tokenizer), "F32", overwrite=True)
    return LlamaCpp(path, length=8)


@pytest.mark.parametrize("pre", PRE_NAMES)
def test_every_way_to_cut_text(pre, words_vocabulary, checkpoint, tmp_path):
    words, whole_words, _ = WORDS[PRE_NAMES[pre]]
    document = byte_level(*words_vocabulary, words, whole_words)
    ours = tokenizer_of("ours", document, Specials(stop=(len(words_vocabulary[0]) + 1,), pre=pre))
    assert gguf_metadata(ours)["tokenizer.ggml.pre"] == pre
    with in_llama_cpp(tmp_path, checkpoint, ours) as theirs:
        for text in TEXTS:
            assert ours.encode(text).tolist() == theirs.tokenize(text), repr(text)
    # The cuts show: another way gives other tokens.
    other = "falcon" if PRE_NAMES[pre] != "falcon" else "gpt-2"
    different = tokenizer_of("x", byte_level(*words_vocabulary, WORDS[other][0], False), Specials())
    assert any(different.encode(t).tolist() != ours.encode(t).tolist() for t in TEXTS)


def pieces_tokenizer(prefix=True, add_bos=True):
    """sentencepiece's BPE with merges of common pairs, also across spaces."""
    words = [list(text.replace(" ", "\u2581")) for text in TEXTS]
    characters = sorted({c for word in words for c in word if c.isalnum() or c == "\u2581"})[:60]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = {"\u2581\u2581": -1, "ab": -2, "\u2581a": -3, "abab": -4, "\u2581\u2581\u2581": -5,
            "in": -6, "don": -7, "on": -8, "do": -9, "aa": -10, "aaa": -11}  # fmt: skip
    characters = dict.fromkeys([*characters, *"▁abdinotIl'"], -1000)
    scores = made | characters
    ids = {piece: i for i, piece in enumerate([*pieces, *scores])}
    added = [Added(i, pieces[i], control=True) for i in range(3)]
    added.append(Added(len(ids), "<tool>", control=False))
    model = bpe_model(ids | {"<tool>": len(ids)}, merges_by_score(scores), "<unk>", True)
    special = Specials(bos=1, stop=(2,), add_bos=add_bos)
    return tokenizer_of("pieces", sentencepiece(model, added, prefix), special)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, checkpoint, tmp_path):
    ours = pieces_tokenizer(prefix)
    with in_llama_cpp(tmp_path, checkpoint, ours) as theirs:
        for text in TEXTS:
            text = text.replace("\0", "")  # where llama.cpp's text ends
            assert ours.encode(text, bos=False).tolist() == theirs.tokenize(text), repr(text)
        text = "<s>ab <tool>do</s> in"
        parsed = ours.encode(text, bos=False, control=True).tolist()
        assert parsed == theirs.tokenize(text, special=True)


def test_bytes(checkpoint, tmp_path):
    with in_llama_cpp(tmp_path, checkpoint, BYTES) as theirs:
        for text in TEXTS:
            assert theirs.tokenize(text) == list(text.encode())


ROUND_TRIPS = {
    "byte level": small_tokenizer(),
    "byte level, bos": small_tokenizer(add_bos=True, pre=None),
    "pieces": pieces_tokenizer(),
    "pieces, no prefix": pieces_tokenizer(prefix=False, add_bos=False),
}


@pytest.mark.parametrize("kind", ["pieces", "pieces, no prefix"])
def test_out_and_in(kind):
    tokenizer = ROUND_TRIPS[kind]
    again = tokenizer_from_gguf(gguf_metadata(tokenizer))
    assert again.special == tokenizer.special
    assert again.control == tokenizer.control
    for text in TEXTS:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_metadata_of_the_small_vocabulary(words_vocabulary):
    vocabulary, merges, added = words_vocabulary
    document = byte_level(vocabulary, merges, added, WORDS["gpt-2"][0], whole_words=False)
    about = gguf_metadata(tokenizer_of("x", document, Specials(bos=len(vocabulary))))
    assert about["tokenizer.ggml.model"] == "gpt2"
    assert about["tokenizer.ggml.pre"] == "gpt-2"
    assert about["tokenizer.ggml.tokens"] == [*vocabulary, "<s>", "</s>"]
    assert about["tokenizer.ggml.token_type"].tolist() == [1] * len(vocabulary) + [3, 3]
    assert about["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]
    assert about["tokenizer.ggml.bos_token_id"] == len(vocabulary)
    assert "tokenizer.ggml.eos_token_id" not in about
    assert about["tokenizer.ggml.add_bos_token"] is False


def test_strings_may_be_bytes():
    about = gguf_metadata(pieces_tokenizer())
    raw = {key: [s.encode() for s in value] if isinstance(value, list) else value
           for key, value in about.items()}  # fmt: skip
    raw["tokenizer.ggml.model"] = b"llama"
    assert tokenizer_from_gguf(raw).json == tokenizer_from_gguf(about).json


@pytest.mark.parametrize("tokenizer", [small_tokenizer()], ids=["small"])
def test_words_without_a_name_are_refused(tokenizer):
    with pytest.raises(ValueError, match="small cuts text into words in a way that has no name"):
        gguf_metadata(tokenizer)


def gpt2(**changes):
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.eos_token_id": 3,
    }  # fmt: skip
    for key, value in changes.items():
        metadata[f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}"] = value
    return metadata


LLAMA = {"model": "llama", "scores": [0.0, -1.0, -2.0, 0.0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "f: tokenizer.ggml.model is missing"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; supported are 'gpt2' and 'llama'"),
        ({"model": 3}, "tokenizer.ggml.model is 3, not a string"),
        ({"pre": "klingon"}, "tokenizer.ggml.pre is 'klingon', a way to cut .* known are a.x-4.0"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing or no list"),
        ({"tokens": "ab"}, "tokenizer.ggml.tokens is missing or no list"),
        ({"tokens": []}, "tokenizer.ggml.tokens has 0 entries"),
        ({"tokens": ["a", "b", "a", "<e>"]}, "tokens 0 and 2 are both 'a'"),
        ({"tokens": ["a", "b", "", "<e>"]}, "token 2 is '', not a short string"),
        ({"tokens": ["a", 5, "ab", "<e>"]}, r"tokenizer.ggml.tokens\[1\] is 5, not a string"),
        ({"tokens": ["a", b"\xff", "ab", "e"]}, r"tokenizer.ggml.tokens\[1\] is not UTF-8"),
        ({"tokens": ["a", "b", "x" * 9999, "e"]}, "not a short string"),
        ({"token_type": [1, 1, 1]}, "token_type is not a list of 4 finite numbers"),
        ({"token_type": ["1"] * 4}, "token_type is not a list of 4 finite numbers"),
        ({"token_type": [[1], [1, 2], 1, 1]}, "token_type is not a list of 4 finite numbers"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["ab"]}, r"merges\[0\] is 'ab', not two pieces"),
        ({"merges": ["a "]}, r"merges\[0\] is 'a ', not two pieces"),
        ({"merges": [" a"]}, r"merges\[0\] is ' a', not two pieces"),
        ({"merges": ["a c"]}, "^f: "),
        ({"eos_token_id": 4}, r"eos_token_id is 4, not a token of 0\.\.3"),
        ({"eos_token_id": -1}, r"eos_token_id is -1, not a token"),
        ({"bos_token_id": "1"}, r"bos_token_id is '1', not a token"),
        ({"bos_token_id": True}, r"bos_token_id is True, not a token"),
        ({"add_bos_token": 1}, "add_bos_token is 1, not true or false"),
        ({"chat_template": ["x"]}, "tokenizer.chat_template is .* not a string"),
        ({"chat_template": "x" * 200_000}, "chat_template=.* is no text of up to 131,072"),
        ({**LLAMA, "scores": None}, "tokenizer.ggml.scores is missing"),
        ({**LLAMA, "scores": [0.0, 0.0, 0.0, np.nan]}, "scores is not a list of 4 finite"),
        ({**LLAMA, "scores": [0.0]}, "scores is not a list of 4 finite"),
        ({**LLAMA, "tokens": ["a", "b", "x" * 20_000, "e"]}, "tokens are too long"),
        ({**LLAMA, "add_space_prefix": "no"}, "add_space_prefix is 'no', not true or false"),
    ],
    ids=str,
)  # fmt: skip
def test_malformed(changes, message):
    changed = {key: value for key, value in gpt2(**changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(changed, "f")


def test_the_least_that_works():
    tokenizer = tokenizer_from_gguf(gpt2())
    assert tokenizer.encode("abab").tolist() == [2, 2]
    assert (tokenizer.stop, tokenizer.special.bos, tokenizer.special.add_bos) == ((3,), None, False)
    assert tokenizer_from_gguf(gpt2(pre="llama-bpe", bos_token_id=3)).encode("ab").tolist() == [
        3,
        2,
    ]
    llama = tokenizer_from_gguf(gpt2(**LLAMA, tokens=["a", "b", "ab", "</s>"], eos_token_id=None))
    assert llama.stop == (3,)


def test_huge_vocabularies_are_refused_in_time():
    with pytest.raises(ValueError, match=r"tokens has 1,048,577 entries"):
        tokenizer_from_gguf(gpt2(tokens=list(map(str, range(2**20 + 1)))))
