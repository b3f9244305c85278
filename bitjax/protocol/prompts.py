"""Prompts and chats as token ids that fit the context, or the reason why they do not."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from bitjax.chat import ChatFormat, Message, Renderer
from bitjax.config import ModelConfig
from bitjax.engine import Sampling
from bitjax.protocol.calls import Call
from bitjax.protocol.fields import BadRequest, unicode
from bitjax.text import TextTokenizer
from bitjax.text import document as documents
from bitjax.tokenizer import Tokenizer, utf8

Tokens = tuple[int, ...]
TOO_LONG = "context_length_exceeded"


class Encoder:
    """Turns what requests hold into tokens; threads may share it. `close` ends its process.

    Args:
        tokenizer: the model's.
        config: the model's.
        context: tokens that prompt and answer may have.
        template: for chats, in the place of the tokenizer's.
    """

    def __init__(
        self, tokenizer: Tokenizer, config: ModelConfig, context: int, template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self._renderer = Renderer()
        self._form: ChatFormat | ValueError
        try:
            self._form = ChatFormat(tokenizer, config, template, self._renderer)
        except ValueError as error:
            self._form = error

    def close(self) -> None:
        """End the process that renders chats; it would start again when needed."""
        self._renderer.close()

    def prompt(self, prompt: str | Tokens) -> Tokens:
        """Token ids of a prompt.

        Raises:
            BadRequest: an empty prompt, one without room for an answer, or unknown tokens.
        """
        if isinstance(prompt, str):
            if (least := self._at_least(unicode(prompt, "prompt"))) >= self.context:
                raise self._too_long(f"at least {least:,}")
            try:
                found = tuple(self.tokenizer.encode(prompt).tolist())
            except ValueError as error:
                raise BadRequest(str(error), "prompt") from None
        else:
            found = prompt
            for token in found:
                if not 0 <= token < self.tokenizer.vocab_size:
                    raise BadRequest(
                        f"token {token} of the prompt is not in 0..{self.tokenizer.vocab_size - 1}",
                        "prompt",
                    )
        return self._fitting(found, prompt)

    def chats(self, chats: Sequence[Sequence[Message]]) -> list[Tokens | BadRequest]:
        """Token ids of each chat, up to where its answer begins, or the error."""
        if isinstance(self._form, ValueError):
            return [BadRequest(str(self._form), "messages") for _ in chats]
        fitting: list[bool] = []
        for messages in chats:
            fitting.append(sum(self._at_least(m["content"]) for m in messages) < self.context)
        try:
            found = iter(self._form.tokens_all([c for c, f in zip(chats, fitting, strict=True)
                                                if f]))  # fmt: skip
        except ValueError as error:
            if len(chats) > 1:  # one of them may have taken all the time
                return [tokens for chat in chats for tokens in self.chats([chat])]
            return [BadRequest(str(error), "messages")]
        made: list[Tokens | BadRequest] = []
        for fits in fitting:
            tokens = next(found) if fits else None
            if isinstance(tokens, ValueError):
                made.append(BadRequest(str(tokens), "messages"))
                continue
            try:
                if tokens is None:
                    raise self._too_long(f"more than {self.context:,}")
                made.append(self._fitting(tuple(tokens), "chat"))
            except BadRequest as error:
                made.append(error)
        return made

    def call(self, call: Call) -> list[Tokens]:
        """Token ids of each prompt of a call.

        Raises:
            BadRequest: of the first that is wrong.
        """
        self.check(call.sampling)
        if call.kind == "completion":
            return [self.prompt(prompt) for prompt in call.prompts]
        [found] = self.chats([call.messages])
        if isinstance(found, BadRequest):
            raise found
        return [found]

    def check(self, sampling: Sampling) -> None:
        """That the tokens of settings are the model's.

        Raises:
            BadRequest: naming one that is not.
        """
        size = self.tokenizer.vocab_size
        for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids",
                                                                   sampling.stop_ids)):  # fmt: skip
            for token in tokens:
                if not 0 <= token < size:
                    raise BadRequest(f"token {token} of {name} is not in 0..{size - 1}", name)

    def _fitting(self, tokens: Tokens, prompt: str | Tokens) -> Tokens:
        if not tokens or not prompt:
            raise BadRequest("the prompt is empty; give at least one character", "prompt")
        if len(tokens) >= self.context:
            raise self._too_long(f"{len(tokens):,}")
        return tokens

    def _too_long(self, tokens: str) -> BadRequest:
        return BadRequest(f"the prompt has {tokens} tokens; the context of {self.context:,} leaves "
                          "no room for an answer", "prompt", TOO_LONG)  # fmt: skip

    def _at_least(self, text: str) -> int:
        """Tokens that the text has at least: 10 MB need not be cut to be known as too long."""
        size = len(utf8(text))
        return -(-size // self._longest_token) if size >= self.context else 0

    @functools.cached_property
    def _longest_token(self) -> int:
        """Bytes, where every byte of a text is in a token; else a number that nothing exceeds."""
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, TextTokenizer):
            return 1
        found = tokenizer.document
        if found.get("normalizer") or not documents.decoded(tokenizer.where, found).byte_level:
            return 1 << 62  # text may vanish before it is cut
        return max(len(tokenizer.token_bytes(i) or b"") for i in range(tokenizer.vocab_size)) or 1
