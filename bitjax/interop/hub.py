"""Models of the Hugging Face Hub by name: `owner/name`, `owner/name@revision`, `owner/name:file`.

A folder is downloaded with its safetensors, JSON and tokenizer files, a GGUF file by itself.
Nothing else is: no pickles, no code. What was downloaded before is used without the network.
"""

from __future__ import annotations

import re
from pathlib import Path

# Owner and name begin with a letter or digit, so no path such as ../x or ./x is one.
_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+\.gguf))?"
)
PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja")
ELSEWHERE = ("*/*",)  # folders hold the same in other formats


def is_hub_name(source: str) -> bool:
    """Whether a source that is no path here may be the name of a model there."""
    return _NAME.fullmatch(source) is not None


def download(name: str) -> Path:
    """The folder of a model, or its GGUF file, downloaded unless it was before.

    Raises:
        ValueError: no such name, or it cannot be downloaded.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ValueError(f"{name!r} is not a hub name: owner/name, owner/name@revision, or either "
                         "with :file.gguf")  # fmt: skip
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ValueError(
            f"{name} does not exist here, and to download it takes the package huggingface_hub"
        ) from None
    repository, revision = parts["repository"], parts["revision"]
    try:
        if parts["file"]:
            found = huggingface_hub.hf_hub_download(repository, parts["file"], revision=revision)
        else:
            found = huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(PATTERNS),
                ignore_patterns=list(ELSEWHERE),
            )  # fmt: skip
        return Path(found)
    except (OSError, ValueError) as error:  # of which all of the package's are
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} does not exist here, and cannot be downloaded from the Hugging Face Hub: "
            f"{reason}"
        ) from None
