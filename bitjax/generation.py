"""What `LanguageModel.generate` gives: texts with what they took, shown well in notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from bitjax.engine import Choice, Completion, Timings, TokenLogprob, Usage
from bitjax.printable import html_table

_SHOWN = 20  # rows of a table in a notebook
_WIDTH = 300  # characters of a text there


@dataclass(frozen=True)
class Generation:
    """What came of one prompt; `str` is its text.

    Attributes:
        index: of the prompt among those given.
        prompt: as given: a text, a chat or token ids.
        choices: one, or as many as `n` said.
        usage: tokens of prompt and texts.
        timings: seconds from when the engine got it.
        error: what was wrong with it; there are no choices then.
    """

    index: int
    prompt: Any
    choices: tuple[Choice, ...] = ()
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    error: str = ""

    @classmethod
    def of(cls, index: int, prompt: Any, completion: Completion) -> Generation:
        """What the engine made of a prompt."""
        return cls(index, prompt, completion.choices, completion.usage, completion.timings,
                   completion.error)  # fmt: skip

    @property
    def text(self) -> str:
        """Of the first choice; empty after an error."""
        return self.choices[0].text if self.choices else ""

    @property
    def texts(self) -> list[str]:
        """Of all choices."""
        return [choice.text for choice in self.choices]

    @property
    def finish_reason(self) -> str:
        """Of the first choice: "stop", "length" or "cancelled"; "error" without one."""
        return self.choices[0].finish_reason if self.choices else "error"

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of the first choice, the one that stopped it included."""
        return self.choices[0].tokens if self.choices else ()

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of the first choice's tokens, if they were asked for."""
        return self.choices[0].logprobs if self.choices else ()

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        rows = [("prompt", shorten(self.prompt))]
        if self.error:
            rows.append(("error", self.error))
        for choice in self.choices:
            rows.append((choice.finish_reason, choice.text))
        use, times = self.usage, self.timings
        kept = f" ({use.cached_tokens:,} shared)" if use.cached_tokens else ""
        rows.append(("tokens", f"{use.prompt_tokens:,}{kept} + {use.completion_tokens:,}"))
        rows.append(("seconds", f"{times.finished:.2f}, first token {times.first_token:.2f}"))
        return html_table(("", "generation"), rows)


class Generations(Sequence[Generation]):
    """All generations of a call, in the order of the prompts.

    Attributes:
        seconds: of the whole call.
    """

    def __init__(self, found: Sequence[Generation], seconds: float) -> None:
        self._found = list(found)
        self.seconds = seconds

    @property
    def texts(self) -> list[str]:
        """The first text of each prompt."""
        return [one.text for one in self._found]

    @property
    def errors(self) -> list[Generation]:
        """Those that have an error."""
        return [one for one in self._found if one.error]

    @property
    def usage(self) -> Usage:
        """The sums over all."""
        found = [one.usage for one in self._found]
        return Usage(*(sum(getattr(u, name) for u in found) for name in Usage.__dataclass_fields__))

    @property
    def tokens_per_second(self) -> float:
        """Generated, over the whole call."""
        return self.usage.completion_tokens / self.seconds if self.seconds else 0.0

    @overload
    def __getitem__(self, index: int) -> Generation: ...

    @overload
    def __getitem__(self, index: slice) -> list[Generation]: ...

    def __getitem__(self, index: int | slice) -> Generation | list[Generation]:
        return self._found[index]

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Generation]:
        return iter(self._found)

    def __repr__(self) -> str:
        use = self.usage
        wrong = f", {len(self.errors):,} errors" if self.errors else ""
        return (
            f"<{len(self):,} generations{wrong}: {use.prompt_tokens:,} tokens of prompts, "
            f"{use.completion_tokens:,} generated in {self.seconds:.1f} s, "
            f"{self.tokens_per_second:,.0f} tokens/s>"
        )

    def _repr_html_(self) -> str:
        rows: list[tuple[object, ...]] = [
            (one.index, shorten(one.prompt), shorten(one.error or one.text), one.finish_reason,
             one.usage.completion_tokens)
            for one in self._found[:_SHOWN]
        ]  # fmt: skip
        if len(self) > _SHOWN:
            rows.append(("...", f"{len(self) - _SHOWN:,} more", "", "", ""))
        return html_table(("", "prompt", "text", "", "tokens"), rows, repr(self)[1:-1])


def shorten(prompt: object) -> str:
    """A prompt or text in a table: the last message of a chat, the beginning of what is long."""
    said = prompt
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[-1], dict):
        said = prompt[-1].get("content", "")
    text = said if isinstance(said, str) else str(said)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
