"""`bitjax chat`: a conversation at the terminal, or piped, a message a line."""

from __future__ import annotations

import contextlib
import dataclasses
import sys

from bitjax.chat.conversation import Conversation
from bitjax.infer import Completion, Generator, SamplingParams, Session
from bitjax.printable import without_controls
from bitjax.terminal import console

HELP = """\
/system TEXT   set the system prompt; without TEXT show it
/clear         forget the conversation, keep the system prompt
/help          this
/quit          leave, as Ctrl-D or Ctrl-C do here; Ctrl-C during an answer stops it
A line that ends with \\ goes on in the next; // at the beginning is a /."""
SHARE_OF_ANSWER = 4  # at least this part of the context is kept for an answer, if so much is wanted


class Chat:
    """One conversation with one model.

    Args:
        generator: of the model.
        conversation: to go on with.
        params: of every answer.
        interactive: whether a person is there; else only answers are printed.
    """

    def __init__(
        self,
        generator: Generator,
        conversation: Conversation,
        params: SamplingParams,
        interactive: bool,
    ) -> None:
        self._session = Session(generator)
        self._conversation = conversation
        self._params = params
        self._interactive = interactive

    def run(self) -> None:
        """Read, answer, until the end of the input."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # lines that can be edited, and earlier ones again
            self._say(f"context of {self._conversation.room:,} tokens; /help lists commands\n")
        while (line := self._read()) is not None:
            text = line.strip()
            if text.startswith("/") and not text.startswith("//"):
                if not self._command(text):
                    return
            elif text:
                self._answer(text.removeprefix("/") if text.startswith("//") else text)

    def _read(self) -> str | None:
        """A message; None at the end."""
        lines: list[str] = []
        try:
            while True:
                prompt = ("> " if not lines else "  ") if self._interactive else ""
                lines.append(input(prompt) if self._interactive else _piped())
                if not lines[-1].endswith("\\"):
                    return "\n".join(lines)
                lines[-1] = lines[-1][:-1]
        except EOFError:
            if lines and not self._interactive:
                return "\n".join(lines)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
        if self._interactive:
            print()
        return None

    def _command(self, text: str) -> bool:
        """Obey; False to leave."""
        name, _, rest = text.partition(" ")
        if name == "/quit":
            return False
        if name == "/clear":
            self._conversation.turns.clear()
            self._say("forgotten")
        elif name == "/system" and rest.strip():
            self._conversation.system = rest.strip()
            self._say("the system prompt is set, from the next answer on")
        elif name == "/system":
            self._say(self._conversation.system or "there is no system prompt")
        elif name == "/help":
            self._say(HELP)
        else:
            self._say(f"there is no command {name}; /help lists them", error=True)
        return True

    def _answer(self, text: str) -> None:
        conversation, session = self._conversation, self._session
        wanted = min(self._params.max_new_tokens, conversation.room // SHARE_OF_ANSWER)
        try:
            ids, dropped = conversation.ask(text, wanted)
            if dropped:
                self._say(f"(the context is full: the {dropped} oldest messages are forgotten)")
            with self._waiting():
                session.compile(ids, self._params)
            stream = session.stream(ids, self._params)
        except ValueError as error:
            if conversation.turns and conversation.turns[-1]["role"] == "user":
                conversation.turns.pop()
            self._say(str(error), error=True)
            return
        except KeyboardInterrupt:
            conversation.turns.pop()
            self._stopped()
            return
        stopped = False
        begun = ""
        try:
            with contextlib.closing(iter(stream)) as pieces:
                for piece in pieces:
                    shown = piece if begun else piece.lstrip()  # a space after the template's colon
                    begun += shown
                    self._print(shown)
        except KeyboardInterrupt:
            stopped = True
        done = stream.completion
        conversation.answered(done.text.strip())
        self._print("\n")
        if stopped:
            self._stopped()
        if self._interactive:
            self._say(summary(done, len(ids), session.reused) + "\n")

    def _stopped(self) -> None:
        if not self._interactive:
            raise KeyboardInterrupt
        self._say("(stopped)")

    def _waiting(self) -> contextlib.AbstractContextManager[object]:
        return console.status("") if self._interactive else contextlib.nullcontext()

    def _print(self, text: str) -> None:
        sys.stdout.write(without_controls(text) if self._interactive else text)
        sys.stdout.flush()

    def _say(self, text: str, error: bool = False) -> None:
        """Something that is no answer: dim at a terminal, else an error or nothing."""
        if self._interactive:
            console.print(
                text, style="red" if error else "dim", markup=False, emoji=False, soft_wrap=True
            )
        elif error:
            print(f"bitjax: {text}", file=sys.stderr)


def _piped() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def summary(done: Completion, prompt: int, reused: int) -> str:
    """One line about an answer."""
    kept = f", {reused:,} of them kept" if reused else ""
    cut = "" if done.finish_reason else ", stopped"
    if done.finish_reason == "length":
        cut = ", cut at its limit"
    return (
        f"{done.tokens:,} tokens{cut}, {done.tokens_per_second:,.0f} tokens/s; "
        f"prompt of {prompt:,} tokens{kept}, in {1000 * done.prefill_seconds:,.0f} ms"
    )


def run_chat(generator: Generator, conversation: Conversation, params: SamplingParams) -> None:
    """Talk at the terminal, or answer the lines of a pipe."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    chat = Chat(generator, conversation, dataclasses.replace(params), interactive)
    chat.run()
