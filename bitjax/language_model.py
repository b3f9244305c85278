"""A model to generate with, from Python: `bitjax.load`.

    model = bitjax.load("a.safetensors")
    print(model.generate("ROMEO:", max_new_tokens=50))
    answers = model.generate(prompts, temperature=0.0)     # a list: all run together
    model.generate([{"role": "user", "content": "Hi!"}])   # a chat, by the model's template
    for piece in model.stream("ROMEO:"): ...               # one text as it comes
    for one in model.iterate(endless_prompts()): ...       # as they are done, in whatever order

A text is the same, to the bit, whatever runs beside it. Of several prompts each draws with a seed
made of `seed` and its index, as lines of `bitjax batch` do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from bitjax import api
from bitjax.chat import Message
from bitjax.config import EngineConfig
from bitjax.engine import Delta, Engine, Request, Sampling
from bitjax.generation import Generation, Generations
from bitjax.model import Transformer
from bitjax.ops import Impl
from bitjax.protocol import BadRequest, Encoder
from bitjax.protocol.calls import derived_seed, messages_of
from bitjax.terminal import clock, console, job_progress

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]  # a text, token ids, or a chat
Errors = Literal["raise", "keep"]
_names = itertools.count()


class LanguageModel:
    """A model with its engine; see this module's docstring.

    Args:
        model: float or packed.
        engine: sizes of the engine.
        template: for chats, in the place of the model's.

    Attributes:
        model: the Flax module; `model.model(tokens)` gives logits.
        tokenizer: its tokenizer.
        engine: that runs it.

    Raises:
        ValueError: less memory than one sequence needs.
    """

    def __init__(
        self, model: Transformer, engine: EngineConfig | None = None, template: str | None = None
    ) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.engine = Engine(model, engine)
        self._encoder = Encoder(self.tokenizer, model.config, self.engine.context, template)
        self._lock = threading.Lock()  # the engine steps for one call at a time

    @overload
    def generate(
        self, prompts: str | Sequence[int] | Sequence[Mapping[str, str]],
        sampling: Sampling | None = None, *, progress: bool | None = None,
        errors: Errors = "raise", **settings: Any,
    ) -> Generation: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | None = None, *,
        progress: bool | None = None, errors: Errors = "raise", **settings: Any,
    ) -> Generations: ...  # fmt: skip

    def generate(
        self, prompts: Any, sampling: Sampling | None = None, *, progress: bool | None = None,
        errors: Errors = "raise", **settings: Any,
    ) -> Generation | Generations:  # fmt: skip
        """Texts that follow one prompt, or several.

        Args:
            prompts: a text, token ids or a chat (a list of messages); or a list of such.
            sampling: how; the defaults of `Sampling` if None.
            progress: whether to show it; by default for several prompts at a terminal or notebook.
            errors: "raise" checks all prompts before any runs; "keep" gives those that are wrong
                an error in the place of a text.
            settings: fields of `Sampling`, such as `max_new_tokens=100`.

        Raises:
            ValueError: settings that contradict each other; a prompt that is wrong.
        """
        how = _sampling(sampling, settings)
        several = not is_one(prompts)
        given = list(prompts) if several else [prompts]
        began = time.perf_counter()
        ready = [self._encoded(i, prompt, errors) for i, prompt in enumerate(given)]
        pairs = zip(given, ready, strict=True)
        found: list[Generation | None] = [None] * len(given)
        if progress is None:
            progress = several and (console.is_terminal or console.is_jupyter)
        with _progress(len(given)) if progress else contextlib.nullcontext() as show:
            tokens = 0
            for done, one in enumerate(self._run(pairs, how, errors, several), 1):
                found[one.index] = one
                tokens += one.usage.completion_tokens
                if show is not None:
                    show(done, tokens, time.perf_counter() - began)
        made = [one for one in found if one is not None]
        assert len(made) == len(given)
        return Generations(made, time.perf_counter() - began) if several else made[0]

    def iterate(
        self, prompts: Iterable[Prompt], sampling: Sampling | None = None, *,
        errors: Errors = "raise", **settings: Any,
    ) -> Iterator[Generation]:  # fmt: skip
        """Generations as they are done; `index` says of which prompt each is.

        Prompts are taken a few ahead of those that run, so there may be any number. What still runs
        when the iterator is closed is cancelled. See `generate`.
        """
        how = _sampling(sampling, settings)
        pairs = ((p, self._encoded(i, p, errors)) for i, p in enumerate(prompts))
        return self._run(pairs, how, errors, several=True)

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, **settings: Any
    ) -> Iterator[str]:
        """Pieces of the text that follows a prompt, as they come. See `generate`."""
        how = _sampling(sampling, settings)
        if how.n > 1:
            raise ValueError(f"n={how.n} texts cannot be streamed one behind the other")
        tokens = self._encoded(0, prompt, "raise")
        assert not isinstance(tokens, BadRequest)
        for delta in self._deltas(iter([Request(f"g{next(_names)}", tokens, how)])):
            if delta.completion is not None and delta.completion.error:
                raise ValueError(delta.completion.error)
            if delta.text:
                yield delta.text

    def _run(
        self, pairs: Iterable[tuple[Any, tuple[int, ...] | BadRequest]], sampling: Sampling,
        errors: Errors, several: bool,
    ) -> Iterator[Generation]:  # fmt: skip
        waiting: dict[str, tuple[int, Any]] = {}
        wrong: list[Generation] = []

        def requests() -> Iterator[Request | None]:
            for index, (prompt, tokens) in enumerate(pairs):
                if isinstance(tokens, BadRequest):
                    wrong.append(Generation(index, prompt, error=str(tokens)))
                    yield None
                    continue
                seed = derived_seed(sampling.seed, index) if several else sampling.seed
                how = dataclasses.replace(sampling, seed=seed)
                request = Request(f"g{next(_names)}", tokens, how)
                waiting[request.id] = index, prompt
                yield request

        for delta in self._deltas(requests()):
            yield from _drained(wrong)
            if delta.completion is None:
                continue
            one = Generation.of(*waiting.pop(delta.id), delta.completion)
            if one.error and errors == "raise":
                raise ValueError(f"prompt {one.index}: {one.error}")
            yield one
        yield from _drained(wrong)

    def _deltas(self, requests: Iterator[Request | None]) -> Iterator[Delta]:
        """`Engine.deltas`, for one call at a time."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this model is generating already; finish that, or load another")
        try:
            with contextlib.closing(self.engine.deltas(requests)) as deltas:
                yield from deltas
        finally:
            self._lock.release()

    def _encoded(self, index: int, prompt: Any, errors: Errors) -> tuple[int, ...] | BadRequest:
        try:
            if isinstance(prompt, str):
                return self._encoder.prompt(prompt)
            items: list[Any] = list(prompt) if isinstance(prompt, Iterable) else [None]
            if items and isinstance(items[0], Mapping):
                messages: Sequence[Message] = messages_of([dict(m) for m in items])
                [found] = self._encoder.chats([messages])
                if isinstance(found, BadRequest):
                    raise found
                return found
            try:
                return self._encoder.prompt(tuple(map(operator.index, items)))
            except (TypeError, ValueError) as error:
                if isinstance(error, BadRequest):
                    raise
                raise BadRequest(f"{prompt!r:.60} is no text, chat or list of tokens") from None
        except BadRequest as error:
            if errors == "keep":
                return error
            raise ValueError(f"prompt {index}: {error}") from None

    def close(self) -> None:
        """End the process that renders chats; it would start again when needed."""
        self._encoder.close()

    def _repr_html_(self) -> str:
        return api.summary(self.model)._repr_html_()


def load(
    path: str | Path, *, engine: EngineConfig | None = None, template: str | None = None,
    impl: Impl = "auto", check: bool = True, **settings: Any,
) -> LanguageModel:  # fmt: skip
    """A model to generate with.

    Args:
        path: as `bitjax.api.load`.
        engine: sizes of the engine.
        template: for chats, in the place of the model's.
        impl, check: as `bitjax.api.load`.
        settings: fields of `EngineConfig`, such as `cache_dtype="int8"`.

    Raises:
        ValueError: nothing readable there, or settings out of range.
    """
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    _require_known(settings, names)
    sizes = dataclasses.replace(engine or EngineConfig(), **settings)
    return LanguageModel(api.load(path, impl, check), sizes, template)


def is_one(prompts: Any) -> bool:
    """Whether it is one prompt: a text, a chat, or token ids."""
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, Iterable):
        raise ValueError(f"{prompts!r:.60} is no prompt, nor a list of prompts")
    first = next(iter(prompts), None) if isinstance(prompts, Sequence) else None
    return isinstance(first, Mapping | int) or hasattr(prompts, "dtype")


def _drained(wrong: list[Generation]) -> Iterator[Generation]:
    while wrong:
        yield wrong.pop(0)


def _sampling(sampling: Sampling | None, settings: Mapping[str, Any]) -> Sampling:
    _require_known(settings, [field.name for field in dataclasses.fields(Sampling)])
    return dataclasses.replace(sampling or Sampling(), **settings)


def _require_known(settings: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in settings:
        if name not in names:
            raise ValueError(f"unknown setting {name!r}; there are {', '.join(names)}")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int, float], None]]:
    """A bar; in a notebook a line that is rewritten, which needs no widgets."""

    def said(done: int, tokens: int, seconds: float) -> str:
        left = clock(seconds * (total - done) / done)
        return f"{tokens / seconds:,.0f} tok/s  ETA {left}"

    if not console.is_jupyter:
        with job_progress("generating") as show:
            yield lambda done, tokens, seconds: show(done, total, said(done, tokens, seconds))
        return
    from IPython.display import HTML, display

    line: Any = display(HTML(""), display_id=True)
    last = 0.0

    def update(done: int, tokens: int, seconds: float) -> None:
        nonlocal last
        if done == total or time.perf_counter() - last > 0.2:
            last = time.perf_counter()
            line.update(HTML(f"<progress max={total} value={done}></progress> {done:,}/{total:,} "
                             f"&nbsp; {said(done, tokens, seconds)}"))  # fmt: skip

    yield update
