"""Byte-level text for training: a split, and batches that are a pure function of (seed, step).

There is no reader state: batch `step` is drawn by a counter-based generator keyed with the seed
and the step, so the step number alone is the data position and an interrupted run resumes exactly.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitjax.config import DataConfig


@dataclass(frozen=True)
class Text:
    """One text, split in two.

    Attributes:
        train, valid: uint8 tokens; `valid` is the end of the text.
        sha256: of the whole file, so that a resumed run can tell whether it changed.
        name: path, or the name of the packaged text.
    """

    train: np.ndarray
    valid: np.ndarray
    sha256: str
    name: str


def read_tokens(path: str) -> tuple[np.ndarray, str]:
    """All bytes of a file, or of the packaged Shakespeare if `path` is empty, and its name.

    Raises:
        ValueError: the file is missing, not readable, or empty.
    """
    name = path or "tiny Shakespeare (packaged)"
    packaged = importlib.resources.files("bitjax") / "data" / "tinyshakespeare.txt"
    try:
        raw = Path(path).read_bytes() if path else packaged.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the text {name}: {error.strerror}") from None
    if not raw:
        raise ValueError(f"the text {name} is empty")
    return np.frombuffer(raw, np.uint8), name


def load_text(config: DataConfig) -> Text:
    """Read and split the text that `config` names.

    Raises:
        ValueError: as `read_tokens`.
    """
    tokens, name = read_tokens(config.text)
    split = len(tokens) - int(len(tokens) * config.valid_fraction)
    return Text(tokens[:split], tokens[split:], hashlib.sha256(tokens.data).hexdigest(), name)


def require_length(text: Text, seq_len: int) -> None:
    """Refuse a text too short for one training and one validation window of `seq_len + 1` bytes.

    Raises:
        ValueError: naming the text and the length it would need.
    """
    shortest = min(len(text.train), len(text.valid))
    if shortest < seq_len + 1:
        raise ValueError(
            f"the text {text.name} is too short: its training part has {len(text.train)} bytes and "
            f"its validation part {len(text.valid)}; sequences of {seq_len} need {seq_len + 1} each"
        )


def batch(tokens: np.ndarray, step: int, seed: int, batch_size: int, seq_len: int) -> np.ndarray:
    """Random windows of `tokens`: int32 `[batch_size, seq_len + 1]`, inputs and next tokens."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    starts = generator.integers(0, len(tokens) - seq_len, size=batch_size)
    return tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def windows(tokens: np.ndarray, seq_len: int, limit: int) -> np.ndarray:
    """Up to `limit` windows spread evenly over `tokens`: int32 `[n, seq_len + 1]`."""
    count = min(limit, (len(tokens) - 1) // seq_len)
    starts = np.linspace(0, len(tokens) - seq_len - 1, count).astype(np.int64)
    return tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)
