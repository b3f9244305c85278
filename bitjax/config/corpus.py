"""How files of text become a corpus of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitjax.config.fields import check_fields, require, require_positive

TOKENIZER_VOCAB_SIZE = 4096  # of a tokenizer trained here, unless another is asked for
CorpusKind = Literal["text", "chat", "pairs"]


@dataclass(frozen=True)
class CorpusConfig:
    """What makes two corpora of the same files differ."""

    kind: CorpusKind = "text"  # chat: conversations, of which answers are learned; pairs: of two
    # answers to each prompt the preferred one; see bitjax/chat/examples.py
    text_field: str = "text"  # of JSONL objects and table columns
    separator: str = ""  # between the documents of a text file; empty: the file is one document
    valid_fraction: float = 0.01  # of the documents, chosen by their hash; 0: none
    salt: str = ""  # of that hash: another salt is another split
    shard_tokens: int = 1 << 26  # 128 MiB of uint16: a few for a small corpus, each quick to check

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "shard_tokens")
        require(
            0 <= self.valid_fraction < 1,
            f"corpus.valid_fraction={self.valid_fraction} is not 0 or between 0 and 1",
        )
        require(len(self.salt.encode()) <= 64, "corpus.salt is longer than BLAKE2b's key, 64 bytes")
