"""GGUF files, the format of llama.cpp and its relatives, as checkpoints: in and out."""

from bitjax.interop.gguf.reader import read_gguf
from bitjax.interop.gguf.writer import check_gguf, gguf_notes, write_gguf

__all__ = ["check_gguf", "gguf_notes", "read_gguf", "write_gguf"]
