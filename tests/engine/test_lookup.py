"""Guesses are what followed the last tokens before."""

import random

import pytest

from bitjax.engine.lookup import GRAM, Lookup


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
