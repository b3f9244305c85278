"""What requests begin with is run once: the rows that are made, and scores equal to separate ones.

Of float models scores differ by float32's rounding alone: attention sums its terms, here at most
48, in another layout, some 48 * 2^-24 = 3e-6 of values of order 1, for each of up to 12 tokens
scored. Activations of ternary models are rounded to int8 in between, where such a difference can
move a code by one, 1/127 of a token's largest: seldom, and by less than 1e-3 here.
"""

import numpy as np
import pytest
from tiny import tiny_model

from bitjax.evaluate.requests import Request, RequestScorer, shared_rows
from bitjax.infer import pack_model

RNG = np.random.default_rng(0)


def words(*lengths):
    return [RNG.integers(0, 256, n).astype(np.int32) for n in lengths]


def inputs(*texts):
    return [(np.frombuffer(text, np.uint8).astype(np.int32), [i]) for i, text in enumerate(texts)]


def read_back(row):
    """The text of each input, by the places that the row says."""
    flat = np.concatenate(
        [row.inputs[0][: row.shared], *(tokens[row.shared :] for tokens in row.inputs)]
    )
    assert len(flat) == row.length
    return [
        bytes([*flat[: row.shared], *flat[start : start + len(tokens) - row.shared]])
        for start, tokens in zip(row.starts(), row.inputs, strict=True)
    ]


@pytest.mark.parametrize(
    ("texts", "rows"),
    [
        ((b"abcd12", b"abcd3", b"abcd4"), [(4, 3)]),
        ((b"abcd12", b"wxyz", b"wxyz5"), [(0, 1), (4, 2)]),
        ((b"abcd12", b"ab345678", b"ab9"), [(2, 3)]),  # the third lessens nothing
        ((b"aaaaaaaa", b"a1111111"), [(1, 2)]),  # an eighth is enough
        ((b"aaaaaaaaa", b"a11111111"), [(0, 1), (0, 1)]),  # a ninth is not
        ((b"abcdefgh", b"abcdefghij"), [(8, 2)]),  # one is the other's beginning
        ((b"abcdefgh1234", b"abcdefgh5678", b"abcdefgh9012"), [(8, 2), (0, 1)]),  # 16 at most
        ((b"abcdefgh12", b"abcdefgh34", b"a5555555", b"a5555556"), [(8, 2), (7, 2)]),
    ],
)
def test_rows(texts, rows):
    made = shared_rows(inputs(*texts), longest=16)
    assert [(row.shared, len(row.inputs)) for row in made] == rows
    assert [text for row in made for text in read_back(row)] == list(texts)
    assert [i for row in made for owners in row.owners for i in owners] == list(range(len(texts)))


def test_rows_alone():
    made = shared_rows(inputs(b"abcd1", b"abcd2"), longest=0)
    assert [row.shared for row in made] == [0, 0]


def requests():
    """Three items with choices behind a context, one of choices alone, and one twice."""
    made = []
    for context_length in (20, 9, 30):
        (context,) = words(context_length)
        for ending in words(1, 3, 12, 3):
            made.append(Request(np.concatenate([context, ending]), len(ending)))
    (beginning,) = words(6)
    for ending in words(8, 8):  # a pair of sentences: what they share is scored too
        made.append(Request(np.concatenate([beginning, ending]), 13))
    made.append(made[1])
    return made


@pytest.fixture(scope="module", params=["float", "ternary", "packed"])
def model(request):
    if request.param == "float":
        return tiny_model(num_layers=1, weights="float", activations="float")
    model = tiny_model(num_layers=1)
    return pack_model(model) if request.param == "packed" else model


def test_scores_are_those_of_separate_rows(model):
    asked = requests()
    together, apart = (RequestScorer(model, batch_tokens=96, share=s) for s in (True, False))
    found, wanted = together.score(asked), apart.score(asked)
    atol = 4e-5 if model.config.activations == "float" else 1e-3
    np.testing.assert_allclose(
        [s.log_likelihood for s in found], [s.log_likelihood for s in wanted], atol=atol
    )
    assert [s.greedy for s in found] == [s.greedy for s in wanted]
    assert together.tokens < 0.7 * apart.tokens


def test_a_row_holds_no_more_than_the_context():
    """48 tokens: of four endings of 12 behind 20 two fit a row."""
    (context,) = words(20)
    asked = [(np.concatenate([context, ending[:-1]]), [0]) for ending in words(12, 12, 12, 12)]
    assert [row.length for row in shared_rows(asked, 48)] == 2 * [20 + 2 * 11]


@pytest.mark.parametrize("token", [-1, 256])
def test_tokens_beyond_the_vocabulary(token):
    scorer = RequestScorer(tiny_model(num_layers=1))
    with pytest.raises(ValueError, match=f"^a request holds token {token}; the model has 256$"):
        scorer.score([Request(np.array([1, token, 2], np.int32), 1)])
