"""Chat templates, rendered where they can do no harm: in a process of their own, under limits.

A template is a program that comes with a model. Jinja's sandbox keeps it from Python's insides, but
not from `range(99999)` in `range(99999)`, nor from doubling a string forty times; and whatever
in-process limit is put on loops, a filter or a method of strings (`center`, `replace`, `*`) is a
loop too. So the operating system limits time, memory and files (`render_process.py`), and here the
process is watched. It takes about 0.1 s to start.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitjax.text.tokenizer import MAX_TEMPLATE
from bitjax.tokenizer import utf8

Task = tuple[Sequence[Mapping[str, Any]], bool]  # messages, and whether an answer shall follow
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


def render_all(template: str, tasks: Sequence[Task], **variables: Any) -> list[str | ValueError]:
    """The texts of several conversations, by one process: (messages, answer) of each, see `render`.

    Returns:
        For each the text, or the error that `render` would raise.

    Raises:
        ValueError: all together take too long, or the template is too long.
    """
    task = _task(template, tasks, variables)
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_PROCESS)], input=task,
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
    return _found(results)


def _task(template: str, tasks: Sequence[Task], variables: Mapping[str, Any]) -> bytes:
    if len(template) > MAX_TEMPLATE:
        raise ValueError(
            f"the chat template has {len(template):,} characters; it may have {MAX_TEMPLATE:,}"
        )
    task = {
        "template": template,
        "variables": [
            {"messages": list(messages), "add_generation_prompt": answer, **variables}
            for messages, answer in tasks
        ],
    }
    return utf8(json.dumps(task, ensure_ascii=False))


def _found(results: list[dict[str, str]]) -> list[str | ValueError]:
    return [
        result["text"] if "text" in result else ValueError(f"the chat template {result['error']}")
        for result in results
    ]


class Renderer:
    """`render_all` for whoever renders often: its process stays, and starts children in 2 ms.

    Threads may share one. `close` it, or use it as a context manager; else the garbage collector
    ends the process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(
        self, template: str, tasks: Sequence[Task], **variables: Any
    ) -> list[str | ValueError]:
        """See `render_all`."""
        raw = _task(template, tasks, variables)
        with self._lock:
            answer = self._answer(raw)
        if not answer:
            raise ValueError("the chat template took too much time")
        return _found(json.loads(answer))

    def _answer(self, raw: bytes) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self._end()
            # Of its own session, so that Ctrl-C reaches us alone.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROCESS), "stay"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        pipe, answers = self._process.stdin, self._process.stdout
        assert pipe is not None
        assert answers is not None
        try:
            pipe.write(len(raw).to_bytes(8, "little") + raw)
            pipe.flush()
            head = answers.read(8)
            if len(head) == 8:
                return answers.read(int.from_bytes(head, "little"))
        except BrokenPipeError:
            pass
        self._end()
        raise ValueError("the chat templates' process ended; it is started again when needed")

    def close(self) -> None:
        """End the process; a later call would start another."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]
            process.wait()

    def __del__(self) -> None:
        self._end()

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
