"""What a model learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitjax.config.fields import check_fields, require


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    text: str = ""  # path of a UTF-8 or binary file, read as bytes, or of a corpus's folder; empty:
    # the packaged Shakespeare
    documents: Literal["joined", "apart"] = "joined"  # of a corpus; apart, a token attends to its
    # own document only, and no document's first token is predicted
    valid_fraction: float = 0.1  # the last part of a text, never trained on; a corpus has its own

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            0 < self.valid_fraction < 1,
            f"data.valid_fraction={self.valid_fraction} is not between 0 and 1",
        )
