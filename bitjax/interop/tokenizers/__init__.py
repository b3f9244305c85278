"""Other engines' tokenizers, each made into the one JSON form, and that form into theirs."""

from bitjax.interop.tokenizers.gguf import gguf_metadata, tokenizer_from_gguf
from bitjax.interop.tokenizers.huggingface import (
    read_huggingface_tokenizer,
    write_huggingface_tokenizer,
)

__all__ = [
    "gguf_metadata",
    "read_huggingface_tokenizer",
    "tokenizer_from_gguf",
    "write_huggingface_tokenizer",
]
