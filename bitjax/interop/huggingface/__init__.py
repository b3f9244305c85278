"""Hugging Face folders: config.json and safetensors files, in and out."""

from bitjax.interop.huggingface.reader import read_huggingface
from bitjax.interop.huggingface.writer import write_huggingface

__all__ = ["read_huggingface", "write_huggingface"]
