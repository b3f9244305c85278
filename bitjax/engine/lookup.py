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

GRAM = 3  # tokens that must agree
ROW_COST = 0.2  # of a row more, in steps of one row: 14 ms, 16 for two, 34 for eight (2B, Zen 5)
TRIED = 16  # steps after which a text that was not worth guessing is tried again
MEMORY = 0.1  # weight of the last guess in the share of right ones


def pays(rows: int) -> float:
    """The share of right guesses from which a further row pays, beside so many.

    A step of R rows takes 1 - c + c R; a row more takes c, and gives a token as often as it is
    right, where the others give theirs for (1 - c + c R) / R each.
    """
    return ROW_COST * rows / (1 - ROW_COST + ROW_COST * rows)


class Lookup:
    """Finds what followed the last tokens of a growing sequence before.

    Attributes:
        right: share of guesses that were right, the latest count most.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # gram -> position behind its latest one
        self.right = 0.5
        self._idle = 0  # steps without a guess
        self._known = 0  # positions below this have been noted as ends of grams

    def worth(self, rows: int) -> bool:
        """Whether to guess in a step of so many rows."""
        return self.right >= pays(rows) or self._idle >= TRIED

    def learn(self, guessed: int, right: int) -> None:
        """So many of a step's guesses were right."""
        self._idle = 0 if guessed else self._idle + 1
        if guessed:
            self.right += MEMORY * (right / guessed - self.right)

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """At most so many tokens that may follow these."""
        if len(tokens) <= GRAM or most <= 0:
            return []
        # The gram at the end itself is noted only once something follows it.
        for end in range(max(self._known, GRAM), len(tokens)):
            self._after[tuple(tokens[end - GRAM : end])] = end
        self._known = len(tokens)
        start = self._after.get(tuple(tokens[-GRAM:]))
        period = len(tokens) - (start or 0)
        if start is None:
            return []
        guess: list[int] = []
        for _ in range(most):  # beyond the end the guess itself goes on: a short period repeats
            guess.append(guess[-period] if len(guess) >= period else tokens[start + len(guess)])
        return guess
