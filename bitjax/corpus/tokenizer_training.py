"""Train a tokenizer: byte-level BPE (Sennrich et al., arXiv 1508.07909; GPT-2's form of it).

The `tokenizers` library counts pairs and merges the most frequent one, again and again. All 256
bytes are tokens from the start, so any text can be encoded, and one control token ends documents.
"""

from __future__ import annotations

from collections.abc import Iterable

from bitjax.text import Specials, TextTokenizer
from bitjax.tokenizer import utf8

END = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # the bytes and END
MAX_VOCAB_SIZE = 1 << 20


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A tokenizer of up to `vocab_size` tokens; fewer where the texts have no more pairs.

    Raises:
        ValueError: a vocabulary too small or large, no text, or text that is not Unicode.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"a vocabulary of {vocab_size} is not in {MIN_VOCAB_SIZE}..{MAX_VOCAB_SIZE}: 256 bytes "
            "and the end of a document are always in it"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    seen = 0

    def checked() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(utf8(text))
            yield text

    backend.train_from_iterator(checked(), trainer)
    if not seen:
        raise ValueError("there is no text to train a tokenizer on")
    end = int(backend.token_to_id(END) or 0)  # there, as a special token of the trainer
    return TextTokenizer(backend.to_str(), Specials(stop=(end,))).check()
