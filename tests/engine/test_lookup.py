"""Guesses are what followed the last tokens before."""

import random

import pytest

from bitjax.engine.lookup import GRAM, TRIED, Lookup, pays


def oracle(tokens, most):
    """The latest earlier place of the last tokens, by looking everywhere; periods go on."""
    gram = tokens[-GRAM:]
    for end in range(len(tokens) - 1, GRAM - 1, -1):
        if tokens[end - GRAM : end] == gram:
            whole = list(tokens)
            for i in range(most):
                whole.append(whole[end + i])
            return whole[len(tokens) :]
    return []


@pytest.mark.parametrize("seed", range(4))
def test_guesses_of_a_growing_text(seed):
    rng, tokens, lookup, found = random.Random(seed), [], Lookup(), 0
    for _ in range(300):
        tokens += [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
        most = rng.randrange(5)
        guess = lookup.guess(tokens, most)
        assert guess == oracle(tokens, most)
        found += bool(guess)
    assert found > 100


def test_a_short_text_has_no_guess():
    assert Lookup().guess([1] * GRAM, 4) == []
    assert Lookup().guess([1] * (GRAM + 1), 4) == [1] * 4
    assert Lookup().guess([1] * 9, 0) == []


def test_guessing_stops_where_it_does_not_pay():
    lookup = Lookup()
    assert lookup.worth(1)
    assert not lookup.worth(8)  # half of the guesses right, and two thirds would be needed
    for _ in range(20):
        lookup.learn(4, 0)
    worth = []
    for _ in range(2 * TRIED + 2):
        worth.append(lookup.worth(1))
        lookup.learn(4 * worth[-1], 0)
    assert worth == 2 * ([False] * TRIED + [True])
    for _ in range(20):
        lookup.learn(4, 4)
    assert lookup.worth(8)
    assert lookup.right == pytest.approx(1, abs=0.2)


def test_what_pays():
    assert [round(pays(rows), 2) for rows in (1, 2, 4, 8)] == [0.2, 0.33, 0.5, 0.67]
