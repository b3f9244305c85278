"""Render one chat template, once or often, under limits of time, memory and files: run as a script.

Standard input is JSON `{"template": text, "variables": [{...}, ...]}`, standard output JSON with
`{"text": ...}` or `{"error": what it did}` for each of the variables. The environment is the one
that templates are written for, that of `transformers`: blocks trimmed, loop controls,
`raise_exception`, `strftime_now`, `tojson` that escapes nothing, `{% generation %}`.

With the argument `stay` tasks come one after another, each behind its length (8 bytes, little
endian), as answers do. A child of this process does each, so that the limits, and whatever a
template does, end with its own task. An empty answer says that the child was killed.

Imports nothing of bitjax, to start fast.
"""

import contextlib
import datetime
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import IO, Any

CPU_SECONDS = 2  # templates take milliseconds, and hundreds of renderings less than one second
MEMORY = 1 << 29  # bytes of address space, the interpreter's own included
MAX_TEXT = 1 << 22  # characters rendered


SECONDS = 10  # of one task of a process that stays, whatever it waits for


def main() -> None:
    """Read, limit, render, write."""
    if sys.argv[1:] == ["stay"]:
        stay(sys.stdin.buffer, sys.stdout.buffer)
    else:
        sys.stdout.buffer.write(rendered_all(sys.stdin.buffer.read()))


def stay(tasks: IO[bytes], answers: IO[bytes]) -> None:
    """Do tasks until there are no more, each in a child."""
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401  # once, for all children

    while len(head := tasks.read(8)) == 8:
        raw = tasks.read(int.from_bytes(head, "little"))
        result = in_child(raw)
        answers.write(len(result).to_bytes(8, "little") + result)
        answers.flush()


def in_child(raw: bytes) -> bytes:
    """What `rendered_all` makes of a task in a process of its own; empty if that was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            with open(writer, "wb") as out:
                out.write(rendered_all(raw))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    result, ends = b"", time.monotonic() + SECONDS
    with open(reader, "rb", buffering=0) as pipe:
        import select

        while select.select([pipe], [], [], max(0.0, ends - time.monotonic()))[0]:
            piece = pipe.read(1 << 20)
            if not piece:
                break
            result += piece
        else:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return result if status == 0 else b""


def rendered_all(raw: bytes) -> bytes:
    """The answer to a task; puts this process under its limits."""
    task = json.loads(raw)
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks an answer for training; here it is text like any other."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: object) -> None:
        raise jinja2.TemplateError(str(message))

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    limit()

    def rendered(variables: dict[str, object]) -> str:
        pieces, length = [], 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_TEXT:
                raise MemoryError
        return "".join(pieces)

    template: jinja2.Template
    result = attempt(lambda: environment.from_string(task["template"]))
    if "error" in result:
        results = [result for _ in task["variables"]]
    else:
        template = result["text"]
        results = [attempt(functools.partial(rendered, v)) for v in task["variables"]]
    return json.dumps(results).encode()


def attempt(run: Callable[[], Any]) -> dict[str, Any]:
    """What a template's code gives, or what it did."""
    import jinja2

    try:
        return {"text": run()}
    except MemoryError:
        return {"error": "took too much memory"}
    except RecursionError:
        return {"error": "calls itself without end"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"is malformed at line {error.lineno}: {error.message}"[:500]}
    except jinja2.TemplateError as error:
        return {"error": f"refuses: {error.message}"[:500]}
    except Exception as error:  # whatever a template's own operations raise
        return {"error": f"failed: {type(error).__name__}: {error}"[:500]}


def limit() -> None:
    """Bound what this process may still take; whatever the system cannot bound stays unbounded."""
    try:
        import resource
    except ImportError:  # no POSIX
        return
    for name, most in (
        ("RLIMIT_CPU", CPU_SECONDS),
        ("RLIMIT_AS", MEMORY),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_CORE", 0),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))


if __name__ == "__main__":
    main()
