"""Chat templates, rendered where they can do no harm: in a process of their own, under limits.

A template is a program that comes with a model. Jinja's sandbox keeps it from Python's insides, but
not from `range(99999)` in `range(99999)`, nor from doubling a string forty times; and whatever
in-process limit is put on loops, a filter or a method of strings (`center`, `replace`, `*`) is a
loop too. So the operating system limits time, memory and files (`render_process.py`), and here the
process is watched. It takes about 0.1 s to start.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitjax.text.tokenizer import MAX_TEMPLATE
from bitjax.tokenizer import utf8

SECONDS = 20  # of waiting for the process, which limits its own computing to less
_PROCESS = Path(__file__).with_name("render_process.py")


def render(
    template: str, messages: Sequence[Mapping[str, Any]], answer: bool = True, **variables: Any
) -> str:
    """The text that a chat template makes of messages.

    Args:
        template: in Jinja, as `transformers` takes it.
        messages: with "role" and "content".
        answer: whether the text ends where the assistant begins (`add_generation_prompt`).
        variables: further ones, e.g. `bos_token`.

    Raises:
        ValueError: not a template, one that refuses these messages, or one that takes too long,
            too much memory or makes too much text.
    """
    found = render_all(template, [(messages, answer)], **variables)[0]
    if isinstance(found, ValueError):
        raise found
    return found


def render_all(
    template: str, tasks: Sequence[tuple[Sequence[Mapping[str, Any]], bool]], **variables: Any
) -> list[str | ValueError]:
    """The texts of several conversations, by one process: (messages, answer) of each, see `render`.

    Returns:
        For each the text, or the error that `render` would raise.

    Raises:
        ValueError: all together take too long, or the template is too long.
    """
    if len(template) > MAX_TEMPLATE:
        raise ValueError(
            f"the chat template has {len(template):,} characters; it may have {MAX_TEMPLATE:,}"
        )
    task = {
        "template": template,
        "variables": [
            {"messages": list(messages), "add_generation_prompt": answer} | variables
            for messages, answer in tasks
        ],
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_PROCESS)], input=utf8(json.dumps(task, ensure_ascii=False)),
            capture_output=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template took more than {SECONDS} s") from None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ValueError("the chat template took too much time")
    try:
        results = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise ValueError(f"the chat template's process failed: {lines[-1]:.200}") from None
    return [
        result["text"] if "text" in result else ValueError(f"the chat template {result['error']}")
        for result in results
    ]
