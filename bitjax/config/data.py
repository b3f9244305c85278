"""What a model learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bitjax.config.fields import check_fields, require


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    text: str = ""  # path of a UTF-8 or binary file, read as bytes, or of a corpus's folder; empty:
    # the packaged Shakespeare
    documents: Literal["joined", "apart"] = "joined"  # of a corpus; apart, a token attends to its
    # own document only, and no document's first token is predicted; conversations always are
    mixture: tuple[str, ...] = ()  # in the place of text: "PATH=WEIGHT" of several corpora, which
    # give sequences in these proportions
    valid_fraction: float = 0.1  # the last part of a text, never trained on; a corpus has its own

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            not (self.text and self.mixture),
            f"data.text={self.text!r} and data.mixture={self.mixture} both say where the tokens "
            "come from; choose one",
        )
        self.weights()
        require(
            0 < self.valid_fraction < 1,
            f"data.valid_fraction={self.valid_fraction} is not between 0 and 1",
        )

    def weights(self) -> dict[str, float]:
        """The corpora of the mixture and their weights.

        Raises:
            ValueError: an entry that is not "PATH=WEIGHT" with a weight above 0, or one path twice.
        """
        found: dict[str, float] = {}
        for entry in self.mixture:
            path, _, weight = entry.rpartition("=")
            try:
                value = float(weight)
            except ValueError:
                value = math.nan
            require(
                bool(path) and 0 < value < math.inf,
                f"data.mixture has {entry!r}, which is not PATH=WEIGHT with a weight above 0",
            )
            require(path not in found, f"data.mixture has {path} twice")
            found[path] = value
        return found
