"""Corpora of conversations, to tune a model on its answers, and of pairs, to tune it by preference.

Of JSON lines, each an object of one of these forms (further fields are ignored):

    chat     {"messages": [{"role": ..., "content": ...}, ...]}
             {"prompt": ..., "completion": ...}
    pairs    {"prompt": ..., "chosen": ..., "rejected": ...}
             {"chosen": [message, ...], "rejected": [message, ...]}

`prompt`, `completion`, `chosen` and `rejected` are texts or lists of messages; a list for `chosen`
that begins with an answer follows the prompt, another is the whole conversation.

The model's chat template makes the text. Counted, that is learned, are the tokens of the answers
alone, each up to the control token that ends it. Where an answer begins and ends is found by
rendering the conversation up to it and with it:

    text of messages[:i], and the template's beginning of an answer     is before the answer
    text of messages[:i + 1]                                            ends with it

and each piece is cut into tokens by itself, as a prompt is when a model answers. Of pairs only what
follows the messages that both conversations share is counted.

Source: sum over answers' tokens alone, arXiv 2504.12285; pairs, arXiv 2305.18290.
Deliberately absent: tools, and templates that rewrite earlier messages when later ones come.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitjax.chat.conversation import ChatFormat, Hidden, Message
from bitjax.chat.template import render_all
from bitjax.config import CorpusConfig, ModelConfig
from bitjax.corpus import build_corpus
from bitjax.corpus.build import Encoded, dtype_name, is_valid
from bitjax.corpus.sources import Document
from bitjax.text import TextTokenizer
from bitjax.tokenizer import Tokenizer, utf8

ANSWERS = "assistant"  # the role whose messages are learned
_RENDERED = 1 << 19  # characters of one process's renderings: some 0.2 s of its 2
_NO_END = (
    "the chat template ends an answer with no control token of this tokenizer: a model could not "
    "learn where to stop"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One line of a file.

    Attributes:
        where: for messages.
        conversations: one, or the chosen and the rejected.
        first: the message from which on answers are learned.
        key: what decides whether it is held out: pairs of one prompt are on one side.
    """

    where: str
    conversations: list[list[Message]]
    first: int
    key: bytes


def build_chat_corpus(
    inputs: Iterable[Path],
    output: Path,
    tokenizer: Tokenizer,
    config: CorpusConfig,
    template: str | None = None,
    workers: int = 1,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """As `build_corpus`, of conversations or pairs (`config.kind`).

    Args:
        template: in the place of the tokenizer's; goes with the corpus, its runs and their models.

    Raises:
        ValueError: as `build_corpus`; a template that is missing or does not fit, or lines that are
            no such examples.
    """
    ready = chat_tokenizer(tokenizer, template)
    return build_corpus(
        inputs, output, ready, config, workers, overwrite, on_progress, encode_examples
    )


def chat_tokenizer(tokenizer: Tokenizer, template: str | None = None) -> TextTokenizer:
    """The tokenizer with the template, and with what ends an answer among its stop tokens.

    Raises:
        ValueError: no template, or one that does not end answers.
    """
    if template is None and isinstance(tokenizer, TextTokenizer) and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; give one with --template")
    form = ChatFormat(tokenizer, ModelConfig(), template)
    special = dataclasses.replace(form.tokenizer.special, chat_template=form.template)
    probe = [Message(role="user", content="a"), Message(role=ANSWERS, content="b")]
    [(ids, _, _)] = _sequences(form, [(probe, 0)])
    if isinstance(ids, ValueError):
        raise ids
    if ids[-1] not in special.stop:
        special = dataclasses.replace(special, stop=(*special.stop, ids[-1]))
    return TextTokenizer(form.tokenizer.json, special, form.tokenizer.where)


def encode_examples(
    batch: Sequence[Document], tokenizer: Tokenizer, config: CorpusConfig
) -> Encoded:
    """Examples, each the JSON of a line, as tokens; of a pair the chosen comes first.

    Raises:
        ValueError: naming the line.
    """
    form, dtype = ChatFormat(tokenizer, ModelConfig()), np.dtype(dtype_name(tokenizer.vocab_size))
    read = _pair if config.kind == "pairs" else _conversation
    made = Encoded(np.empty(0, dtype), [], [], [])
    ids, counted = [np.empty(0, dtype)], [np.empty(0, np.uint8)]
    for group in _groups(read(document) for document in batch):
        tasks = [(turns, example.first) for example in group for turns in example.conversations]
        owners = [example for example in group for _ in example.conversations]
        for example, (found, mask, size) in zip(owners, _sequences(form, tasks), strict=True):
            if isinstance(found, ValueError):
                raise ValueError(f"{example.where}: {found}")
            ids.append(np.array(found, dtype))
            counted.append(np.array(mask, np.uint8))
            made.lengths.append(len(found))
            made.sizes.append(size)
            made.valid.append(is_valid(example.key, config))
    return dataclasses.replace(made, ids=np.concatenate(ids), counted=np.concatenate(counted))


def _groups(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Examples that one process renders."""
    group: list[Example] = []
    characters = 0
    for example in examples:
        for turns in example.conversations:
            answers = sum(turn["role"] == ANSWERS for turn in turns)
            characters += (1 + 2 * answers) * sum(len(turn["content"]) + 50 for turn in turns)
        group.append(example)
        if characters > _RENDERED:
            yield group
            group, characters = [], 0
    if group:
        yield group


_Sequence = tuple[list[int] | ValueError, list[int], int]  # ids, mask, bytes of text


def _sequences(form: ChatFormat, tasks: Sequence[tuple[list[Message], int]]) -> list[_Sequence]:
    """Conversations as tokens, of each answer from message `first` on the counted ones."""
    names = tuple(form.tokenizer.control)
    if not names:
        raise ValueError(_NO_END)
    hidden = [Hidden(turns, names) for turns, _ in tasks]
    renderings: list[tuple[list[Any], bool]] = []
    for (_, first), shown in zip(tasks, hidden, strict=True):
        for i in _answers(shown.messages, first):
            renderings += [(shown.messages[:i], True), (shown.messages[: i + 1], False)]
        renderings.append((shown.messages, False))
    texts = iter(render_all(form.template, renderings, **form.variables))
    made: list[_Sequence] = []
    for (_, first), shown in zip(tasks, hidden, strict=True):
        count = len(_answers(shown.messages, first))
        mine = [next(texts) for _ in range(2 * count + 1)]
        try:
            made.append(_sequence(form, shown, mine))
        except ValueError as error:
            made.append((error, [], 0))
    return made


def _answers(turns: Sequence[Message], first: int) -> list[int]:
    return [i for i, turn in enumerate(turns) if i >= first and turn["role"] == ANSWERS]


def _sequence(form: ChatFormat, hidden: Hidden, texts: list[str | ValueError]) -> _Sequence:
    """Tokens of the last text; the ones before it end where answers begin and end, by turns."""
    for text in texts:
        if isinstance(text, ValueError):
            raise text
    *before, whole = (str(text) for text in texts)
    control = re.compile("|".join(re.escape(n) for n in form.tokenizer.control))
    pieces, done = [], 0
    for begin, end in zip(before[::2], before[1::2], strict=True):
        if not (end.startswith(begin) and whole.startswith(end)):
            raise ValueError(
                "the chat template writes earlier messages anew when later ones come, so that what "
                "is an answer cannot be told"
            )
        ends = [found.end() for found in control.finditer(whole, len(begin), len(end))]
        if not ends:
            raise ValueError(_NO_END)
        pieces += [(whole[done : len(begin)], 0), (whole[len(begin) : ends[-1]], 1)]
        done = ends[-1]
    ids: list[int] = []
    mask: list[int] = []
    for text, learned in pieces:  # nothing is learned of what follows the last answer: left out
        found = form.encode(hidden, text)
        ids += found
        mask += [learned] * len(found)
    begun = form.begin(ids)
    return begun, [0] * (len(begun) - len(ids)) + mask, len(utf8(whole))


def _conversation(document: Document) -> Example:
    fields, where = json.loads(document.text), document.where
    if "messages" in fields:
        turns = _messages(fields["messages"], "", "messages", where)
    elif "prompt" in fields and "completion" in fields:
        turns = _messages(fields["prompt"], "user", "prompt", where)
        turns += _messages(fields["completion"], ANSWERS, "completion", where)
    else:
        raise ValueError(
            f"{where} has neither 'messages' nor 'prompt' and 'completion'; its fields are "
            f"{_names(fields)}"
        )
    _require_answer(turns, 0, where)
    return Example(where, [turns], 0, utf8(document.text))


def _pair(document: Document) -> Example:
    fields, where = json.loads(document.text), document.where
    if "chosen" not in fields or "rejected" not in fields:
        raise ValueError(
            f"{where} has not both 'chosen' and 'rejected'; its fields are {_names(fields)}"
        )
    both = []
    for name in ("chosen", "rejected"):
        turns = _messages(fields[name], ANSWERS, name, where)
        if turns and turns[0]["role"] == ANSWERS:
            if "prompt" not in fields:
                raise ValueError(f"{where} has no 'prompt' and none in {name!r}")
            turns = _messages(fields["prompt"], "user", "prompt", where) + turns
        both.append(turns)
    chosen, rejected = both
    shared = 0
    while shared < min(map(len, both)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise ValueError(f"{where}: chosen and rejected are equal")
    for turns in both:
        _require_answer(turns, shared, where)
    return Example(where, both, shared, utf8(json.dumps(chosen[:shared])))


def _require_answer(turns: list[Message], first: int, where: str) -> None:
    if not _answers(turns, first):
        raise ValueError(f"{where} has no answer to learn: no message of the role {ANSWERS!r}")


def _messages(value: Any, role: str, name: str, where: str) -> list[Message]:
    """A list of messages, or a text as one message of `role`, if texts are allowed there."""
    if isinstance(value, str) and role:
        value = [Message(role=role, content=value)]
    if not isinstance(value, list) or not value:
        wanted = "a text or a list of messages" if role else "a list of messages"
        raise ValueError(f"{where}: {name!r} is not {wanted}: {value!r:.40}")
    for turn in value:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f"{where}: {name!r} holds {turn!r:.60}, not a message with role and content"
            )
        try:
            utf8(turn["content"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return [Message(role=turn["role"], content=turn["content"]) for turn in value]


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(repr(name)[:40] for name in list(fields)[:10]) or "none"
