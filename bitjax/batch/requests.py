"""Lines of an input as requests, and completions as records of the output.

    a text, or {"prompt": ...}             -> {"index", "text", "finish_reason", "usage"}
    {"messages": [...]}                    -> the same
    {"custom_id", "method", "url", "body"} -> {"id", "custom_id", "response", "error"}

The last is OpenAI's batch format; `id` there is `batch_req_` and the index. The first two take
"id", which comes back, and the settings of OpenAI's bodies, such as "max_tokens" or "temperature";
several samples (n) come in "choices". A line that is wrong has "error" in its record, with the same
message as the server's.

A line without a seed gets one of the job's seed and its index: equal prompts may differ, and a line
gives the same text whatever other lines there are and however often the job was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from bitjax.batch.lines import Line, plain_json
from bitjax.config import BatchConfig
from bitjax.engine import Choice, Completion, Request
from bitjax.infer import SamplingParams
from bitjax.protocol import Answers, BadRequest, Call, Encoder, chat_call, completion_call
from bitjax.protocol.answers import usage
from bitjax.protocol.calls import CHAT_FIELDS, COMPLETION_FIELDS, derived_seed
from bitjax.protocol.fields import Fields, shown, unicode

OPENAI_FIELDS = ("custom_id", "method", "url", "body")
OPENAI_ID = "batch_req_"
_URLS = {"/v1/completions": completion_call, "/v1/chat/completions": chat_call}
MAX_ID = 512  # characters


@dataclasses.dataclass(frozen=True)
class Item:
    """One line's request, or what is wrong with it.

    Attributes:
        index: of the line.
        id: "id" or "custom_id"; None without one.
        openai: whether the line is of OpenAI's format.
        kept: fields that go to the output.
        call: what is asked for.
        tokens: of each of its prompts.
        error: in the place of call and tokens.
    """

    index: int
    id: str | None = None
    openai: bool = False
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    call: Call | None = None
    tokens: tuple[tuple[int, ...], ...] = ()
    error: BadRequest | None = None

    def failed(self, error: BadRequest) -> Item:
        """The same line with an error."""
        return dataclasses.replace(self, call=None, tokens=(), error=error)

    def requests(self) -> list[Request]:
        """What the engine is asked, one request for each prompt."""
        assert self.call is not None
        return [Request(f"{self.index}.{i}", tokens, self.call.sampling)
                for i, tokens in enumerate(self.tokens)]  # fmt: skip


class Reader:
    """Turns lines into items.

    Args:
        encoder: of the model.
        config: of the job.
        settings: by their names in bodies, where lines do not say otherwise.
        unique: whether ids must be.

    Raises:
        ValueError: settings that no line could use.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: BatchConfig,
        settings: Mapping[str, Any],
        unique: bool = True,
    ) -> None:
        self._encoder = encoder
        self._config = config
        self._settings = dict(settings)
        if type(tokens := settings.get("max_tokens")) is int:
            self._settings["max_tokens"] = min(tokens, encoder.context)
        self._unique = unique
        self._ids: set[bytes] = set()
        check_settings(self._plain_defaults, encoder.context)

    @property
    def fields(self) -> tuple[str, ...]:
        """That an input may have."""
        names = dict.fromkeys(("id", *OPENAI_FIELDS, *COMPLETION_FIELDS, *CHAT_FIELDS))
        return tuple(name for name in names if name not in ("stream", "stream_options", "echo"))

    @property
    def _plain_defaults(self) -> dict[str, Any]:
        ours = SamplingParams()
        most = min(ours.max_new_tokens, self._encoder.context)
        return {"max_tokens": most, "temperature": ours.temperature, **self._settings}

    def items(self, lines: Sequence[Line]) -> list[Item]:
        """The items of some lines, whose chats are rendered together."""
        items = [self._item(line) for line in lines]
        chats = [i for i, item in enumerate(items) if item.call and item.call.kind == "chat"]
        calls = [items[i].call for i in chats]
        for i, tokens in zip(
            chats, self._encoder.chats([c.messages for c in calls if c]), strict=True
        ):
            items[i] = (
                items[i].failed(tokens) if isinstance(tokens, BadRequest)
                else dataclasses.replace(items[i], tokens=(tokens,))
            )  # fmt: skip
        return items

    def skip(self, line: Line) -> None:
        """Take note of a line that is done, for later ones may have its id."""
        if isinstance(line.value, dict):
            with contextlib.suppress(BadRequest):
                self._id(dict(line.value), _is_openai(line.value))

    def _item(self, line: Line) -> Item:
        item = Item(line.index)
        try:
            if line.error:
                raise BadRequest(line.error, code="invalid_line")
            value = line.value if isinstance(line.value, dict) else {"prompt": line.value}
            # JSON's 1e999 is read as infinity, which no JSON can be written of.
            kept = {name: plain_json(value[name]) for name in self._config.keep if name in value}
            item = dataclasses.replace(item, kept=kept, openai=_is_openai(value))
            rest = {name: v for name, v in value.items() if name not in kept}
            item = dataclasses.replace(item, id=self._id(rest, item.openai))
            call = self._openai(rest) if item.openai else self._plain(rest)
            if call.stream or call.echo:
                name = "stream" if call.stream else "echo"
                raise BadRequest(f"{name} is not for batches", name)
            if not call.seeded:
                seed = derived_seed(self._config.seed, line.index)
                sampling = dataclasses.replace(call.sampling, seed=seed)
                call = dataclasses.replace(call, sampling=sampling)
            self._encoder.check(call.sampling)
            # Chats are rendered later, many together.
            tokens = () if call.kind == "chat" else tuple(self._encoder.call(call))
            return dataclasses.replace(item, call=call, tokens=tokens)
        except BadRequest as error:
            return item.failed(error)

    def _id(self, value: dict[str, Any], openai: bool) -> str | None:
        name = "custom_id" if openai else "id"
        found = value.pop(name, None)
        if isinstance(found, int) and not isinstance(found, bool) and abs(found) < 1 << 63:
            found = str(found)
        if found is None:
            if openai:
                raise BadRequest("the line has no custom_id", "custom_id")
            return None
        if not isinstance(found, str) or not 0 < len(found) <= MAX_ID:
            raise BadRequest(f"{name}={shown(found)} is not a text of 1..{MAX_ID} characters", name)
        digest = hashlib.blake2b(unicode(found, name).encode(), digest_size=12).digest()
        if digest in self._ids:
            raise BadRequest(f"{name}={shown(found)} is that of an earlier line", name)
        if self._unique:
            self._ids.add(digest)
        return found

    def _plain(self, value: dict[str, Any]) -> Call:
        field = self._config.field
        if field != "prompt" and field in value and "prompt" not in value:
            value["prompt"] = value.pop(field)
        if "messages" in value and value.get("prompt") is not None:
            raise BadRequest("the line has both a prompt and messages", "messages")
        kind = "chat" if "messages" in value else "completion"
        call = self._call(kind, value, self._plain_defaults)
        if len(call.prompts) > 1:
            raise BadRequest("the line has several prompts; give each a line", "prompt")
        return call

    def _openai(self, value: dict[str, Any]) -> Call:
        fields = Fields(value, OPENAI_FIELDS)
        if fields.text("method") != "POST":
            raise fields.refuse("method", "POST")
        url = fields.text("url")
        if url not in _URLS:
            raise fields.refuse("url", "one of " + ", ".join(_URLS))
        kind = "chat" if url == "/v1/chat/completions" else "completion"
        return self._call(kind, fields.get("body"), self._settings)

    def _call(self, kind: str, body: object, defaults: Mapping[str, Any]) -> Call:
        if isinstance(body, Mapping):
            given = {name: value for name, value in body.items() if value is not None}
            if "max_completion_tokens" in given:
                defaults = {k: v for k, v in defaults.items() if k != "max_tokens"}
            body = {**defaults, **given}
        parse = chat_call if kind == "chat" else completion_call
        return parse(body, self._encoder.context)


def check_settings(settings: Mapping[str, Any], context: int) -> None:
    """That settings make sense, before any line is read.

    Raises:
        ValueError: saying what does not.
    """
    tokens = settings.get("max_tokens")
    most = max(context, tokens) if type(tokens) is int else context
    chat_call({**settings, "messages": [{"role": "user", "content": "a"}]}, most)


def _is_openai(value: Mapping[str, Any]) -> bool:
    return "custom_id" in value or "body" in value


def record_of(
    item: Item, completions: Sequence[Completion], model: str, encoder: Encoder
) -> dict[str, Any]:
    """The record of an item whose prompts are all done, or that is wrong."""
    error = item.error
    for completion in completions:
        if completion.error and error is None:
            error = BadRequest(completion.error, status=500)
    if item.openai:
        return _openai_record(item, completions, error, model, encoder)
    record: dict[str, Any] = {"index": item.index}
    if item.id is not None:
        record["id"] = item.id
    record.update(item.kept)
    if error is not None:
        return record | error.body()
    assert item.call is not None
    [completion] = completions
    answers = Answers.now("", item.call, model, encoder.tokenizer)
    found = [_said(answers, choice) for choice in completion.choices]
    record.update(found[0] if item.call.sampling.n == 1 else {"choices": found})
    # Nothing that another run would have otherwise: equal jobs give equal bytes.
    return record | {"usage": usage(completions, shared=False)}


def _said(answers: Answers, choice: Choice) -> dict[str, Any]:
    found: dict[str, Any] = {"text": choice.text, "finish_reason": choice.finish_reason}
    if answers.call.sampling.logprobs is not None:
        found["logprobs"] = answers.logprobs(choice.logprobs)
    return found


def _openai_record(
    item: Item, completions: Sequence[Completion], error: BadRequest | None, model: str,
    encoder: Encoder,
) -> dict[str, Any]:  # fmt: skip
    name = f"{item.index:012d}"
    record = {"id": f"{OPENAI_ID}{name}", "custom_id": item.id, **item.kept}
    if error is not None and (item.id is None or error.code == "invalid_line"):
        fields = {"code": error.code or "invalid_request", "message": str(error)}
        return record | {"response": None, "error": fields}
    status, body = 200, {}
    if error is not None:
        status, body = error.status, error.body()
    else:
        assert item.call is not None
        answers = Answers.now(f"batch-{name}", item.call, item.call.model or model,
                              encoder.tokenizer)  # fmt: skip
        body = answers.whole(completions)
    response = {"status_code": status, "request_id": f"req-{name}", "body": body}
    return record | {"response": response, "error": None}


def index_of(record: object) -> int:
    """The index of a record's line.

    Raises:
        ValueError: no record.
    """
    if isinstance(record, dict):
        name = record.get("id")
        if type(record.get("index")) is int:
            return int(record["index"])
        if (
            isinstance(name, str)
            and name.startswith(OPENAI_ID)
            and name[len(OPENAI_ID) :].isdigit()
        ):
            return int(name[len(OPENAI_ID) :])
    raise ValueError("no record of a batch")
