"""Which tokens a JSON schema, a regular expression or a grammar allows next: llguidance decides.

A matcher follows the text token by token and marks every token that some matching text goes on
with. Tokens that end texts are allowed where the text may end; where nothing else may follow, the
text ends by itself.

The library is touched when the first constraint is, and comes with the extra `constraints`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from bitjax.engine.request import Constraint
from bitjax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

MAX_CONSTRAINT = 1 << 16  # characters of a schema or grammar


class Matcher:
    """Follows one text.

    Args:
        matcher: of the library, at the beginning.
        vocab: tokens of the model.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab // 32)
        # Of the model's tokens only: the library's end of text may be a token that the model lacks.
        last = vocab % 32
        self._last = np.uint32((1 << last) - 1 if last else 0xFFFFFFFF)

    def mask(self) -> np.ndarray:
        """uint32 `[ceil(V / 32)]`, a bit for each token that may come next."""
        whole = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        mask = np.zeros(self._words, np.uint32)
        mask[: len(whole)] = whole[: self._words]
        mask[-1] &= self._last
        return mask

    def take(self, token: int) -> str:
        """A token was drawn; the library's complaint, if it has one."""
        self._matcher.consume_token(token)
        return self._matcher.get_error() if self._matcher.is_error() else ""

    @property
    def complete(self) -> bool:
        """Whether nothing but an end may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """Whether the text so far matches."""
        return bool(self._matcher.is_accepting())

    def copy(self) -> Matcher:
        """Another at the same place."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other


class Constraints:
    """Makes matchers for a model's tokens.

    Args:
        tokenizer: of the model.
        vocab: tokens of the model.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._known: Any = None

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of a text.

        Raises:
            ValueError: the library is not installed, or the constraint cannot be compiled.
        """
        if constraint.kind not in ("json_schema", "regex", "lark"):
            raise ValueError(f"constraint {constraint.kind!r} is not json_schema, regex or lark")
        if len(constraint.text) > MAX_CONSTRAINT:
            raise ValueError(
                f"the {constraint.kind} has {len(constraint.text):,} characters; at most "
                f"{MAX_CONSTRAINT:,} are taken"
            )
        try:
            import llguidance
        except ModuleNotFoundError:
            raise ValueError(
                "constraints need the package llguidance: pip install 'bitjax[constraints]'"
            ) from None
        make: dict[str, Callable[[str], str]] = {
            "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
            "regex": llguidance.LLMatcher.grammar_from_regex,
            "lark": llguidance.LLMatcher.grammar_from_lark,
        }
        if self._known is None:
            self._known = self._tokens()
        try:
            matcher = llguidance.LLMatcher(
                self._known, make[constraint.kind](constraint.text), log_level=0
            )
        except ValueError as error:
            raise ValueError(f"the {constraint.kind} cannot be compiled: {error}") from None
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise ValueError(f"the {constraint.kind} cannot be compiled: {reason}")
        return Matcher(matcher, self._vocab)

    def _tokens(self) -> llguidance.LLTokenizer:
        """The library's view of the tokens: the bytes of each, and which ones end texts."""
        import llguidance

        tokenizer, size = self._tokenizer, self._tokenizer.vocab_size
        bytes_of = getattr(tokenizer, "token_bytes", None)
        control = set(getattr(tokenizer, "control", {}).values())
        if bytes_of is None:  # bytes are tokens
            tokens = [bytes([token]) for token in range(size)]
        else:
            tokens = [bytes_of(token) or b"" for token in range(size)]
        tokens += [b""] * (self._vocab - size)  # of the model alone: padding
        ends = [token for token in tokenizer.stop if token < len(tokens)]
        if not ends:  # a token that the model lacks stands for the end
            ends = [len(tokens)]
            tokens.append(b"<|end|>")
        special = sorted(control | set(ends))

        class Described:
            eos_token_id = ends[0]
            bos_token_id = None
            special_token_ids = special

            def __call__(self, text: bytes) -> list[int]:
                return tokenizer.encode(text.decode("utf-8", "replace")).tolist()

        described: Any = Described()
        described.tokens = tokens
        wrapper = llguidance.TokenizerWrapper(described)
        return llguidance.LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=ends)
