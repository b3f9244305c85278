"""Requests in, texts out, many at once.

    engine = Engine(model)
    for completion in engine.generate([Request("a", "ROMEO:"), Request("b", "JULIET:")]):
        print(completion.id, completion.choices[0].text)

A server calls `submit`, `cancel` and `step` itself.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from bitjax.config import EngineConfig
from bitjax.engine.request import Choice, Completion, Delta, Request, Timings, Usage, failed
from bitjax.infer import Generator
from bitjax.model import Transformer


@dataclasses.dataclass
class Stats:
    """Counts since the engine was made, and what it holds now; for metrics."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    preempted: int = 0
    guessed: int = 0
    accepted: int = 0
    pages: int = 0
    pages_used: int = 0


class Engine:
    """Runs requests, each with its own settings, in whatever company.

    `submit` and `cancel` may be called from any thread, `step` and `generate` from one at a time.

    Args:
        model: float or packed.
        config: sizes.

    Raises:
        ValueError: less memory than one sequence needs.
    """

    def __init__(self, model: Transformer, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.tokenizer = model.tokenizer
        self.context = min(self.config.context or model.config.max_seq_len,
                           model.config.max_seq_len)  # fmt: skip
        self._generator = Generator(model, self.config.cache_dtype)
        self._lock = threading.Lock()
        self._live: dict[str, dict[str, Any]] = {}
        self.stats = Stats()

    @property
    def pending(self) -> int:
        """Requests that are not finished."""
        return len(self._live)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: an empty prompt, one that leaves no room in the context or holds an unknown
                token, a constraint that cannot be compiled, or an id that is in use. No other
                request is touched.
        """
        prompt = request.prompt
        tokens = self.tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else list(prompt)
        writers = [self._generator.writer(tokens, request.sampling)
                   for _ in range(request.sampling.n)]  # fmt: skip
        with self._lock:
            if request.id in self._live:
                raise ValueError(f"request id {request.id!r} is in use")
            self._live[request.id] = {
                "request": request, "tokens": tokens, "writers": writers, "streams": None,
                "at": time.perf_counter(), "first": 0.0, "drawn": [[] for _ in writers],
                "cancelled": False,
            }  # fmt: skip

    def cancel(self, request_id: str) -> bool:
        """Stop a request: its last deltas say "cancelled". False if there is none."""
        with self._lock:
            if request_id not in self._live:
                return False
            self._live[request_id]["cancelled"] = True
            return True

    def step(self) -> list[Delta]:
        """Advance every running request by at least a token; nothing where nothing is pending."""
        deltas: list[Delta] = []
        for request_id, live in list(self._live.items())[: self.config.max_sequences]:
            deltas += self._advance(request_id, live)
        return deltas

    def _advance(self, request_id: str, live: dict[str, Any]) -> Iterator[Delta]:
        sampling, writers = live["request"].sampling, live["writers"]
        if live["streams"] is None:
            live["streams"] = [
                self._generator.tokens(
                    [live["tokens"]], [dataclasses.replace(sampling, seed=sampling.seed + i)]
                )
                for i in range(sampling.n)
            ]
        found = []
        for i, (stream, writer) in enumerate(zip(live["streams"], writers, strict=True)):
            if writer.finish_reason:
                continue
            if live["cancelled"]:
                writer.finish_reason = "cancelled"
                found.append((i, "", ()))
                continue
            token = int(next(stream)[0])
            live["first"] = live["first"] or time.perf_counter() - live["at"]
            live["drawn"][i].append(token)
            found.append((i, writer.feed(token), (token,)))
        done = all(writer.finish_reason for writer in writers)
        for n, (i, text, tokens) in enumerate(found):
            completion = None
            if done and n == len(found) - 1:
                del self._live[request_id]
                completion = self._completion(request_id, live)
            yield Delta(request_id, i, text, tokens, (), writers[i].finish_reason, completion)

    def _completion(self, request_id: str, live: dict[str, Any]) -> Completion:
        return Completion(
            request_id,
            tuple(Choice(i, w.text, tuple(t), w.finish_reason)
                  for i, (w, t) in enumerate(zip(live["writers"], live["drawn"], strict=True))),
            Usage(len(live["tokens"]), 0, sum(map(len, live["drawn"]))),
            Timings(0.0, live["first"], time.perf_counter() - live["at"]),
        )  # fmt: skip

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish, in whatever order; a bad request gives one with an error.

        Requests are taken from the iterable a few ahead of what runs, so it may be endless.
        """
        source = iter(requests)
        more = True
        while True:
            while more and self.pending < 2 * self.config.max_sequences:
                request = next(source, None)
                if request is None:
                    more = False
                    break
                try:
                    self.submit(request)
                except ValueError as error:
                    yield failed(request.id, str(error))
            if not more and not self.pending:
                return
            for delta in self.step():
                if delta.completion is not None:
                    yield delta.completion
