"""Bodies of answers, whole or in pieces, as OpenAI's interface has them.

Source: https://platform.openai.com/docs/api-reference (chat/object, completions/object and their
streaming forms).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitjax.engine import Choice, Completion, Delta, TokenLogprob, Usage
from bitjax.protocol.calls import Call
from bitjax.protocol.fields import BadRequest
from bitjax.text import TextTokenizer
from bitjax.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0  # the log-probability of what cannot be, for JSON has no infinity


@dataclass(frozen=True)
class Answers:
    """The answers to one call.

    Attributes:
        id: of the answer, as it is shown.
        call: that is answered.
        model: its name.
        tokenizer: the model's.
        created: seconds since 1970.
    """

    id: str
    call: Call
    model: str
    tokenizer: Tokenizer
    created: int

    @classmethod
    def now(cls, name: str, call: Call, model: str, tokenizer: Tokenizer) -> Answers:
        """Answers that begin now; `name` becomes the id, behind what OpenAI puts before it."""
        prefix = "chatcmpl" if call.kind == "chat" else "cmpl"
        return cls(f"{prefix}-{name}", call, model, tokenizer, int(time.time()))

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer in one piece.

        Args:
            completions: of each prompt, in order.

        Raises:
            BadRequest: one of them failed.
        """
        choices: list[dict[str, Any]] = []
        for completion in completions:
            if completion.error:
                raise BadRequest(completion.error, status=500)
            first = len(choices)
            choices += [self._choice(first + c.index, c) for c in completion.choices]
        kind = "chat.completion" if self.call.kind == "chat" else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(completions)}

    def pieces(self, delta: Delta, prompt: int, first: bool) -> list[dict[str, Any]]:
        """What a step adds, as one or two chunks; none if nobody can see it.

        Args:
            delta: of one sample.
            prompt: which of the call's prompts it belongs to.
            first: whether it is the first of its sample.
        """
        index = prompt * self.call.sampling.n + delta.index
        chat = self.call.kind == "chat"
        logprobs = (
            self.logprobs(delta.logprobs) if self.call.sampling.logprobs is not None else None
        )
        found: list[tuple[dict[str, Any], str | None]] = []
        text = delta.text
        if first and chat:
            found.append(({"delta": {"role": "assistant", "content": ""}}, None))
        elif first and self.call.echo:
            text = self._prompt(prompt) + text
        if text or delta.finish_reason or (logprobs is not None and delta.logprobs):
            piece = {"delta": {"content": text} if text else {}} if chat else {"text": text}
            found.append(({**piece, "logprobs": logprobs}, delta.finish_reason or None))
        kind = "chat.completion.chunk" if chat else "text_completion"
        return [
            {**self._head(kind), "choices": [{"index": index, **piece, "finish_reason": reason}]}
            for piece, reason in found
        ]  # fmt: skip

    def last(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The chunk with the usage, which has no choices."""
        kind = "chat.completion.chunk" if self.call.kind == "chat" else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage(completions)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        wanted = self.call.sampling.logprobs is not None
        logprobs = self.logprobs(choice.logprobs) if wanted else None
        rest = {"logprobs": logprobs, "finish_reason": choice.finish_reason}
        if self.call.kind == "chat":
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            return {"index": index, "message": message, **rest}
        prompt = self._prompt(index // self.call.sampling.n) if self.call.echo else ""
        return {"index": index, "text": prompt + choice.text, **rest}

    def _prompt(self, index: int) -> str:
        prompt = self.call.prompts[index]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Of some tokens, in the form of the call's kind."""
        if self.call.kind == "chat":
            return {"content": [self._token(t.token, t.logprob) | {"top_logprobs": [
                self._token(*other) for other in t.top]} for t in tokens]}  # fmt: skip
        names = [self._name(t.token) for t in tokens]
        return {
            "tokens": names,
            "token_logprobs": [_finite(t.logprob) for t in tokens],
            "top_logprobs": [{self._name(i): _finite(value) for i, value in t.top} for t in tokens],
            "text_offset": list(itertools.accumulate(map(len, names[:-1]), initial=0))[
                : len(names)
            ],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(self.tokenizer, token)
        return {"token": self._name(token), "logprob": _finite(logprob), "bytes": list(raw)}

    def _name(self, token: int) -> str:
        """The text of a token; of one that is no whole character its bytes, as OpenAI shows it."""
        raw = token_bytes(self.tokenizer, token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage(completions: Sequence[Completion], shared: bool = True) -> dict[str, Any]:
    """Tokens of all prompts and answers; `shared` ones depend on what else ran."""
    found: list[Usage] = [completion.usage for completion in completions]
    prompt, made = sum(u.prompt_tokens for u in found), sum(u.completion_tokens for u in found)
    counts = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    if not shared:
        return counts
    cached = sum(u.cached_tokens for u in found)
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token stands for, control tokens by name; empty for one that is none."""
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer.token_bytes(token) or b""
    return bytes([token]) if 0 <= token < 256 else b""


def _finite(logprob: float) -> float:
    return max(float(logprob), IMPOSSIBLE)
