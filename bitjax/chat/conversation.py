"""A conversation as tokens: the template's text, with what people write kept apart from its signs.

A message that holds the name of a control token, `<|im_end|>` say, must not end its own turn. So
such names are hidden from the template and, when its text is cut into tokens, encoded as text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from bitjax.chat.template import render_all
from bitjax.config import ModelConfig
from bitjax.text import TextTokenizer
from bitjax.tokenizer import Tokenizer, utf8

# Of microsoft/bitnet-b1.58-2B-4T, which GGUF files of it often lack; the tokenizer puts bos first.
BITNET_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] | "
    "trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
_PRIVATE = range(0xE000, 0xF900)  # characters that Unicode leaves without a meaning


class Message(TypedDict):
    """One turn, or the system prompt."""

    role: str
    content: str


class ChatFormat:
    """How one model's conversations become tokens.

    Args:
        tokenizer: the model's.
        config: the model's; decides the template where the tokenizer has none.
        template: in the place of the tokenizer's.
        renderer: what renders the template; `Renderer` pays where there are many conversations.

    Raises:
        ValueError: byte tokens, or no template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        template: str | None = None,
        renderer: Callable[..., list[str | ValueError]] = render_all,
    ) -> None:
        if not isinstance(tokenizer, TextTokenizer):
            raise ValueError(
                f"a chat needs tokens that begin and end turns; this model's are {tokenizer.name}. "
                "`bitjax generate` continues a text"
            )
        self.tokenizer = tokenizer
        self.template = template or tokenizer.chat_template or _default(tokenizer, config)
        self._renderer = renderer

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins.

        Raises:
            ValueError: as `render`.
        """
        [found] = self.tokens_all([messages])
        if isinstance(found, ValueError):
            raise found
        return found

    def tokens_all(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[list[int] | ValueError]:
        """`tokens` of each of several conversations, or what it would raise; rendered together.

        Raises:
            ValueError: all together take too long.
        """
        names = tuple(self.tokenizer.control)
        made: list[list[int] | ValueError] = []
        hidden: list[Hidden | ValueError] = []
        for messages in conversations:
            try:
                for message in messages:
                    utf8(message["content"])
                hidden.append(Hidden(messages, names))
            except ValueError as error:
                hidden.append(error)
        tasks = [(shown.messages, True) for shown in hidden if isinstance(shown, Hidden)]
        texts = iter(self._renderer(self.template, tasks, **self.variables) if tasks else ())
        for shown in hidden:
            text = next(texts) if isinstance(shown, Hidden) else shown
            if isinstance(shown, Hidden) and isinstance(text, str):
                try:
                    made.append(self.begin(self.encode(shown, text)))
                except ValueError as error:
                    made.append(error)
            else:
                assert isinstance(text, ValueError)
                made.append(text)
        return made

    @property
    def variables(self) -> dict[str, Any]:
        """What templates know besides the messages."""
        names = {i: name for name, i in self.tokenizer.control.items()}
        special = self.tokenizer.special
        return {
            "bos_token": names.get(special.bos, ""),  # type: ignore[arg-type]
            "eos_token": names.get(special.stop[0], "") if special.stop else "",
        }

    def encode(self, hidden: Hidden, text: str) -> list[int]:
        """Token ids of a piece of the text that the template made of hidden messages."""
        ids: list[int] = []
        for part, control in hidden.parts(text):
            ids += self.tokenizer.encode(part, control=control, bos=False).tolist()
        return ids

    def begin(self, ids: list[int]) -> list[int]:
        """The tokens of a whole conversation, with bos in front where the model wants it."""
        special = self.tokenizer.special
        if special.add_bos and special.bos is not None and ids[:1] != [special.bos]:
            return [special.bos, *ids]  # templates put it themselves, or leave it to the tokenizer
        return ids


def _default(tokenizer: TextTokenizer, config: ModelConfig) -> str:
    if "<|eot_id|>" in tokenizer.control and config.sub_norm and config.activation == "relu2":
        return BITNET_TEMPLATE
    raise ValueError(
        "this model has no chat template; give one with --template, or continue a text with "
        "`bitjax generate`"
    )


class Hidden:
    """Messages in which names of control tokens are replaced by signs that the template passes on.

    Args:
        messages: as written.
        names: of all control tokens.
    """

    def __init__(self, messages: Sequence[Message], names: Sequence[str]) -> None:
        written = "".join(message["content"] for message in messages)
        self.messages = list(messages)
        self._control = re.compile(
            "(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")"
        )
        self._found = sorted({*self._control.findall(written)}) if names else []
        if not self._found:
            return
        mark = next((chr(c) for c in _PRIVATE if chr(c) not in written), None)
        if mark is None:
            raise ValueError("the messages use every private character of Unicode")
        signs = {name: f"{mark}{i}{mark}" for i, name in enumerate(self._found)}
        self._sign = re.compile(f"{mark}([0-9]+){mark}")
        self.messages = [
            {**m, "content": self._control.sub(lambda found: signs[found[0]], m["content"])}
            for m in messages
        ]

    def parts(self, text: str) -> list[tuple[str, bool]]:
        """The rendered text as written, in parts, and whether each may hold control tokens."""
        if not self._found:
            return [(text, True)]
        return [
            (self._sign.sub(lambda found: self._found[int(found[1])], part), i % 2 == 1)
            for i, part in enumerate(self._control.split(text))
            if part
        ]


@dataclasses.dataclass
class Conversation:
    """A history that has to fit a model's context.

    Attributes:
        form: of its tokens.
        room: tokens of the context.
        system: the system prompt, empty for none.
        turns: messages of user and assistant, by turns.
    """

    form: ChatFormat
    room: int
    system: str = ""
    turns: list[Message] = dataclasses.field(default_factory=list)

    def ask(self, text: str, answer: int) -> tuple[list[int], int]:
        """Add a message; the conversation's tokens, and how many old messages were dropped.

        The oldest go, an answer with its question, until `answer` tokens fit behind the rest.

        Raises:
            ValueError: the message does not fit even alone, or as `render`; nothing is added then.
        """
        kept = [*self.turns, Message(role="user", content=text)]
        before = len(kept)
        while True:
            ids = self.form.tokens([*self._first(), *kept])
            if len(ids) + answer <= self.room:
                self.turns = kept
                return ids, before - len(kept)
            if len(kept) == 1:
                raise ValueError(
                    f"the message takes {len(ids):,} tokens with what belongs to it; the context "
                    f"has {self.room:,}, of which {answer:,} are kept for the answer"
                )
            # As many as the excess may take, by their share of the text: few renderings.
            share = sum(len(m["content"]) for m in kept) / max(1, len(ids))
            excess, cut = (len(ids) + answer - self.room) * share, 0
            while cut < len(kept) - 1 and (cut == 0 or excess > 0):
                excess -= sum(len(m["content"]) for m in kept[cut : cut + 2])
                cut += 2
            kept = kept[min(cut, len(kept) - 1) :]

    def answered(self, text: str) -> None:
        """Add the assistant's answer, or what there is of it."""
        self.turns.append(Message(role="assistant", content=text))

    def _first(self) -> list[Message]:
        return [Message(role="system", content=self.system)] if self.system else []
