"""Tokenizers of released models: one JSON form for all of them, read when text is needed."""

from bitjax.text.tokenizer import Specials, TextTokenizer

__all__ = ["Specials", "TextTokenizer"]
