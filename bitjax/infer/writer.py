"""Tokens of one sequence to text as they come: whole characters only, and where to stop."""

from __future__ import annotations

from collections.abc import Collection

from bitjax.infer.sampling import SamplingParams
from bitjax.tokenizer import Tokenizer


class TextWriter:
    """Text that follows a prompt, cut at the first stop string or token that ends texts.

    Args:
        tokenizer: whose `stop` tokens end the text.
        params: of which `stop` counts here.
        room: tokens that the text may have.
        ends: tokens that end it, in the place of the tokenizer's.

    Attributes:
        room: tokens that the text may have.
        text: released so far.
        tokens: fed so far.
        finish_reason: "stop", "length", or empty before the end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        room: int,
        ends: Collection[int] | None = None,
    ) -> None:
        self._decoder = tokenizer.stream_decoder(continues=True)
        self._ends = frozenset(tokenizer.stop if ends is None else ends)
        self._stop = params.stop
        self.room = room
        self._held = ""  # may be the beginning of a stop string
        self.text = ""
        self.tokens = 0
        self.finish_reason = ""

    def feed(self, token: int) -> str:
        """Text released by this token; nothing once finished."""
        if self.finish_reason:
            return ""
        self.tokens += 1
        ends = token in self._ends
        last = ends or self.tokens >= self.room
        if not ends:
            self._held += self._decoder.feed(token)
        if last:
            self._held += self._decoder.finish()
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.finish_reason = "stop"
            return self._release(min(found))
        if last:
            self.finish_reason = "stop" if ends else "length"
            return self._release(len(self._held))
        return self._release(len(self._held) - self._possible_stop())

    def finish(self) -> str:
        """End the text here, as a stop would; releases what was held back."""
        if self.finish_reason:
            return ""
        self._held += self._decoder.finish()
        self.finish_reason = "stop"
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max(
            (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])),
            default=0,
        )
