"""Prompt look-up: guesses at the next tokens, taken from where the text had the last ones before.

The latest earlier occurrence of the last `GRAM` tokens says what may follow. Guesses are run
together with the token they follow, and every token is drawn as it would be without them; those
that were guessed right are kept. The noise of a position does not depend on how it was reached, so
texts are the same to the bit, greedy or sampled. And no coupling accepts more often: a guess that
is certain of itself is right with the probability that the model gives it, which is what
speculative sampling (arXiv 2211.17192) reaches at best.

Sources: A. Saxena, "Prompt Lookup Decoding" (2023); arXiv 2304.04487.
"""

from __future__ import annotations

GRAM = 3  # tokens that must agree; two agree by chance too often, measured on this package's texts


class Lookup:
    """Finds what followed the last tokens of a growing sequence before."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # gram -> position behind its latest one
        self._known = 0  # positions below this have been noted as ends of grams

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """At most so many tokens that may follow these."""
        if len(tokens) <= GRAM or most <= 0:
            return []
        # The gram at the end itself is noted only once something follows it.
        for end in range(max(self._known, GRAM), len(tokens)):
            self._after[tuple(tokens[end - GRAM : end])] = end
        self._known = len(tokens)
        start = self._after.get(tuple(tokens[-GRAM:]))
        return [] if start is None else tokens[start : start + most]
