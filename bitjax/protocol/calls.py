"""Bodies of `/v1/completions` and `/v1/chat/completions`: what they ask for, checked.

Beside OpenAI's fields those that others' servers have made usual are known: top_k, min_p,
repetition_penalty, stop_token_ids, ignore_eos, guided_regex and guided_grammar.

Source: https://platform.openai.com/docs/api-reference (chat/create, completions/create).
Deliberately absent: tools, pictures, sound; they are refused, not ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bitjax.chat import Message
from bitjax.engine import Constraint, Sampling
from bitjax.protocol.fields import BadRequest, Fields, is_number, shown, unicode

Kind = Literal["completion", "chat"]
COMPLETION_TOKENS = 16  # of a completion whose length is not said: OpenAI's default
MAX_PROMPTS = 1024  # of one completion
_SAMPLING = (
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "n", "stop", "stop_token_ids", "ignore_eos", "seed",
    "logit_bias", "logprobs", "stream", "stream_options", "response_format", "guided_regex",
    "guided_grammar", "user", "metadata",
)  # fmt: skip
COMPLETION_FIELDS = (*_SAMPLING, "prompt", "echo", "best_of", "suffix")
# The second row is without meaning here, and refusing it would refuse harmless clients.
CHAT_FIELDS = (
    *_SAMPLING, "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
    "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
    "functions", "function_call", "modalities",
)  # fmt: skip
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Call:
    """What a body asks for.

    Attributes:
        kind: of the body.
        prompts: texts or token ids, of a completion.
        messages: of a chat.
        sampling: of each prompt; `max_new_tokens` is not yet cut to what the context leaves.
        seeded: whether the body says the seed.
        model: that was asked for; empty if none was.
        echo: whether the text begins with the prompt.
        stream, include_usage: whether it comes in pieces, and the last of them says the usage.
    """

    kind: Kind
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Message, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    seeded: bool = False
    model: str = ""
    echo: bool = False
    stream: bool = False
    include_usage: bool = False


def completion_call(body: object, most_tokens: int) -> Call:
    """A body of `/v1/completions`.

    Args:
        body: parsed JSON.
        most_tokens: that an answer may have.

    Raises:
        BadRequest: says what is wrong.
    """
    fields = Fields(body, COMPLETION_FIELDS)
    if "prompt" not in fields:
        raise BadRequest("the request has no prompt", "prompt")
    if fields.get("suffix"):
        raise BadRequest("suffix: this model cannot fill a gap in a text", "suffix")
    n = fields.integer("n", 1, 1, 1024)
    if fields.integer("best_of", n, 1, 1024) != n:
        raise BadRequest(f"best_of={fields.get('best_of')} with n={n}; only best_of=n is known",
                         "best_of")  # fmt: skip
    logprobs = fields.integer("logprobs", 0, 0, 20) if "logprobs" in fields else None
    echo = fields.flag("echo")
    if echo and logprobs is not None:
        raise BadRequest("echo with logprobs: those of the prompt are not known", "echo")
    tokens = fields.integer("max_tokens", min(COMPLETION_TOKENS, most_tokens), 1, most_tokens)
    return Call(
        "completion", _prompts(fields), sampling=_sampling(fields, tokens, logprobs),
        echo=echo, **_common(fields),
    )  # fmt: skip


def chat_call(body: object, most_tokens: int) -> Call:
    """A body of `/v1/chat/completions`; see `completion_call`."""
    fields = Fields(body, CHAT_FIELDS)
    for name in ("tools", "functions"):
        if fields.get(name):
            raise BadRequest(f"{name} are not supported", name)
    if fields.get("modalities") not in (None, ["text"]):
        raise fields.refuse("modalities", "['text']")
    tokens = most_tokens
    for name in ("max_tokens", "max_completion_tokens"):
        if name in fields:
            tokens = fields.integer(name, most_tokens, 1, most_tokens)
    if "max_tokens" in fields and fields.get("max_tokens") != tokens:
        raise BadRequest(
            f"max_tokens={fields.get('max_tokens')} and max_completion_tokens={tokens} contradict "
            "each other", "max_completion_tokens",
        )  # fmt: skip
    logprobs = None
    if fields.flag("logprobs"):
        logprobs = fields.integer("top_logprobs", 0, 0, 20)
    elif "top_logprobs" in fields:
        raise BadRequest("top_logprobs needs logprobs=true", "top_logprobs")
    return Call(
        "chat", messages=messages_of(fields.get("messages")),
        sampling=_sampling(fields, tokens, logprobs), **_common(fields),
    )  # fmt: skip


def messages_of(value: object, where: str = "messages") -> tuple[Message, ...]:
    """The messages of a chat.

    Raises:
        BadRequest: none, an unknown role or field, or content that is no text.
    """
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{where}={shown(value)} is not a list of messages", where)
    found = []
    for i, message in enumerate(value):
        at = f"{where}[{i}]"
        # A name is accepted, and not shown to the template: few know it.
        fields = Fields(message, ("role", "content", "name", "refusal"), f"{at}.")
        role = fields.text("role")
        if role not in ROLES:
            raise fields.refuse("role", "one of " + ", ".join(ROLES))
        content = fields.get("content")
        if isinstance(content, list):
            content = "".join(_part(part, f"{at}.content[{j}]") for j, part in enumerate(content))
        if not isinstance(content, str):
            raise fields.refuse("content", "a text")
        found.append(Message(role=ROLES[role], content=unicode(content, f"{at}.content")))
    return tuple(found)


def _part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        raise BadRequest(f"{where} is of the kind {shown(kind)}; this model takes text only", where)
    return Fields(part, ("type", "text"), f"{where}.").text("text")


def _prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    value = fields.get("prompt")
    several = value if isinstance(value, list) and not _is_tokens(value) else [value]
    if not several or len(several) > MAX_PROMPTS:
        raise BadRequest(f"prompt has {len(several)} prompts; it may have 1..{MAX_PROMPTS}",
                         "prompt")  # fmt: skip
    found: list[str | tuple[int, ...]] = []
    for prompt in several:
        if isinstance(prompt, str):
            found.append(unicode(prompt, "prompt"))
        elif isinstance(prompt, list) and (_is_tokens(prompt) or not prompt):
            found.append(tuple(prompt))
        else:
            raise BadRequest(f"prompt={shown(prompt)} is neither a text nor a list of tokens",
                             "prompt")  # fmt: skip
    return tuple(found)


def _is_tokens(value: list[object]) -> bool:
    return bool(value) and all(type(token) is int for token in value)


def _common(fields: Fields) -> dict[str, Any]:
    options = Fields(fields.get("stream_options") or {}, ("include_usage",), "stream_options.")
    stream = fields.flag("stream")
    if "stream_options" in fields and not stream:
        raise BadRequest("stream_options needs stream=true", "stream_options")
    return {
        "seeded": "seed" in fields, "model": fields.text("model"), "stream": stream,
        "include_usage": options.flag("include_usage"),
    }  # fmt: skip


def _sampling(fields: Fields, tokens: int, logprobs: int | None) -> Sampling:
    stop_ids = fields.get("stop_token_ids") or []
    if not isinstance(stop_ids, list) or not all(type(t) is int and t >= 0 for t in stop_ids):
        raise fields.refuse("stop_token_ids", "a list of tokens")
    try:
        return Sampling(
            max_new_tokens=tokens,
            temperature=fields.number("temperature", 1.0),
            top_k=max(0, fields.integer("top_k", 0, -1, 2**31 - 1)),  # -1 is all, too
            top_p=fields.number("top_p", 1.0),
            min_p=fields.number("min_p", 0.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0),
            presence_penalty=fields.number("presence_penalty", 0.0),
            frequency_penalty=fields.number("frequency_penalty", 0.0),
            seed=fields.integer("seed", 0, -(2**63), 2**63 - 1) % 2**32,
            stop=fields.texts("stop"),
            stop_ids=tuple(stop_ids),
            ignore_eos=fields.flag("ignore_eos"),
            logit_bias=_bias(fields),
            logprobs=logprobs,
            n=fields.integer("n", 1, 1, 1024),
            constraint=_constraint(fields),
        )
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(str(error)) from None


def _bias(fields: Fields) -> dict[int, float]:
    value = fields.get("logit_bias") or {}
    if not isinstance(value, Mapping):
        raise fields.refuse("logit_bias", "an object of tokens and numbers")
    found = {}
    for token, bias in value.items():
        if not (isinstance(token, str) and token.isdecimal() and token.isascii()
                and len(token) < 10 and is_number(bias)):  # fmt: skip
            raise BadRequest(f"logit_bias has {shown(token)}: {shown(bias)}, which is no token "
                             "with a number", "logit_bias")  # fmt: skip
        found[int(token)] = float(bias)
    return found


def _constraint(fields: Fields) -> Constraint | None:
    found = []
    if "guided_regex" in fields:
        found.append(Constraint("regex", fields.text("guided_regex")))
    if "guided_grammar" in fields:
        found.append(Constraint("lark", fields.text("guided_grammar")))
    if "response_format" in fields:
        wanted = Fields(
            fields.get("response_format"), ("type", "json_schema"), "response_format."
        )  # fmt: skip
        kind = wanted.text("type")
        if kind == "json_object":
            found.append(Constraint("json_schema", '{"type": "object"}'))
        elif kind == "json_schema":
            names = ("name", "schema", "strict", "description")
            named = Fields(wanted.get("json_schema"), names, "response_format.json_schema.")
            schema = named.get("schema")
            if not isinstance(schema, Mapping):
                raise named.refuse("schema", "a JSON schema")
            found.append(Constraint("json_schema", json.dumps(schema)))
        elif kind != "text":
            raise wanted.refuse("type", "one of text, json_object, json_schema")
    if len(found) > 1:
        raise BadRequest("two of response_format, guided_regex and guided_grammar contradict each "
                         "other", "response_format")  # fmt: skip
    return found[0] if found else None


def derived_seed(seed: int, index: int) -> int:
    """Of one of many prompts that say no seed themselves: 32 bits."""
    made = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(made[:4], "little")
