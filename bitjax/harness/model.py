"""The three kinds of requests of lm-evaluation-harness, answered by a model of bitjax.

loglikelihood           log p(continuation | context), and whether greedy decoding gives it
loglikelihood_rolling   log p(text), in windows as long as the model's context
generate_until          text up to a stop string, greedy or sampled
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from bitjax.api import load
from bitjax.chat import ChatFormat
from bitjax.chat.template import render
from bitjax.evaluate.records import fingerprint
from bitjax.evaluate.requests import Request, RequestScorer, Score, beginning
from bitjax.evaluate.rolling import rolling_requests
from bitjax.infer import Generator, SamplingParams
from bitjax.model import Transformer, parameter_count
from bitjax.text import TextTokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

SEQUENCES = 16  # decoded together; the weights are then read once for all of them
NEW_TOKENS = 256  # where a task does not say, as the harness has it
# Settings of a task that mean for us what they say; the others are refused.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_OF_GREEDY = "repetition_penalty"  # the one of them that changes greedy text
_WITHOUT_MEANING: Mapping[str, Any] = {"num_beams": 1, "use_cache": True}


@register_model("bitjax")
class HarnessModel(TemplateLM):
    """A model as the harness sees one.

    Args:
        path: of whatever `bitjax.api.load` reads; or a model.
        batch_size: sequences generated together; "auto" is `SEQUENCES`. Scoring makes its own
            batches.
        max_length: of a context in tokens; the model's if None.
        max_gen_toks: tokens generated where a task does not say.
        seed: of sampling; each request of a call has its own, counted from it.
        device, max_batch_size: given by the harness; JAX chooses the one, the other serves "auto".

    Raises:
        ValueError: nothing to load, or a number out of range.
    """

    def __init__(
        self,
        path: str | Path | Transformer,
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        max_gen_toks: int = NEW_TOKENS,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        del device
        self.model = path if isinstance(path, Transformer) else load(path)
        self.text_tokenizer = self.model.tokenizer
        longest = self.model.config.max_seq_len
        self.max_length = longest if max_length is None else int(max_length)
        if not 2 <= self.max_length <= longest:
            raise ValueError(f"max_length={max_length} is not in 2..{longest}, the model's context")
        self.max_gen_toks = int(max_gen_toks)
        self.seed = int(seed)
        automatic = str(batch_size or "auto").startswith("auto")
        self.sequences = int((max_batch_size or SEQUENCES) if automatic else batch_size or 0)
        if self.sequences < 1:
            raise ValueError(f"batch_size={batch_size} is below 1")
        self._scorer = RequestScorer(self.model)
        self._generator: Generator | None = None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or else the one that stands before it."""
        stop = self.text_tokenizer.stop
        return stop[0] if stop else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        return beginning(self.text_tokenizer)

    @property
    def batch_size(self) -> int:
        """Sequences generated together."""
        return self.sequences

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; names of control tokens stand for them, as chat templates need it.

        Args:
            string: any text.
            add_special_tokens: whether the token that begins texts comes first; by default as the
                tokenizer has it, but never twice.
        """
        tokenizer = self.text_tokenizer
        if not isinstance(tokenizer, TextTokenizer):
            return list(tokenizer.encode(string).tolist())
        if add_special_tokens is None and self._names(string, self.prefix_token_id):
            add_special_tokens = False
        bos = False if add_special_tokens is False else None
        return list(tokenizer.encode(string, control=True, bos=bos).tolist())

    def _names(self, string: str, token: int) -> bool:
        name = self.text_tokenizer.decode([token], control=True)  # type: ignore[call-arg]
        return bool(name) and string.startswith(name)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        made = [self._request(context, scored) for _, context, scored in requests]

        def kept(i: int, score: Score) -> None:
            answer = score.log_likelihood, score.greedy
            self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)

        scores = self._score(made, "Scoring continuations", disable_tqdm, kept)
        return [(score.log_likelihood, score.greedy) for score in scores]

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        """Raises ValueError: an empty continuation, or one longer than the context."""
        if not 1 <= len(continuation) <= self.max_length:
            raise ValueError(f"a continuation has {len(continuation):,} tokens; "
                             f"it can have 1 to {self.max_length:,}")  # fmt: skip
        tokens = (context or [self.prefix_token_id]) + continuation
        kept = np.array(tokens[-self.max_length - 1 :], np.int32)
        return Request(kept, min(len(continuation), len(kept) - 1))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each text, in nats."""
        made: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = np.array(self.tok_encode(request.args[0]), np.int32)
            windows = rolling_requests(tokens, self.prefix_token_id, self.max_length)
            made += windows
            owners += [i] * len(windows)
        sums = [0.0] * len(requests)
        scores = self._score(made, "Scoring texts", disable_tqdm)
        for owner, score in zip(owners, scores, strict=True):
            sums[owner] += score.log_likelihood
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _score(
        self,
        requests: Sequence[Request],
        label: str,
        quiet: bool,
        on_score: Callable[[int, Score], None] = lambda i, score: None,
    ) -> list[Score]:
        found: dict[int, Score] = {}
        with tqdm(total=len(requests), desc=label, disable=quiet) as progress:
            for part in self._scorer.stream(requests):
                found.update(part)
                progress.update(len(part))
                for i, score in part.items():
                    on_score(i, score)
        return [found[i] for i in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, without the stop string that ends it.

        Raises:
            ValueError: a setting that we do not have, or more tokens than the model's context.
        """
        if self._generator is None:
            self._generator = Generator(self.model)
        prompts, params = [], []
        for i, request in enumerate(requests):
            context, settings = request.args
            params.append(self._sampling(settings, i))
            room = self.max_length - params[-1].max_new_tokens
            if room < 1:
                raise ValueError(f"{params[-1].max_new_tokens} tokens to generate leave no room "
                                 f"in the model's context of {self.max_length}")  # fmt: skip
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-room:])
        # Of one length as near as can be, the longest first: that is where memory would not do.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as progress:
            for start in range(0, len(order), self.sequences):
                batch = order[start : start + self.sequences]
                made = complete(
                    self._generator, [prompts[i] for i in batch], [params[i] for i in batch]
                )
                for i, text in zip(batch, made, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                progress.update(len(batch))
        return texts

    def _sampling(self, settings: Mapping[str, Any], number: int) -> SamplingParams:
        values = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        stop = tuple(text for text in values.pop("until") if text)
        sampled = values.pop("do_sample") and values["temperature"] > 0
        known = {key: values.pop(key) for key in _SAMPLING if key in values}
        length = values.pop("max_gen_toks")
        for key, value in values.items():
            if key not in _WITHOUT_MEANING or _WITHOUT_MEANING[key] != value:
                raise ValueError(f"a task generates with {key}={value!r:.40}, which bitjax has not")
        if not sampled:
            known = {"temperature": 0.0} | {k: known[k] for k in known if k == _OF_GREEDY}
        seed = (self.seed + number) % 2**32
        return SamplingParams(max_new_tokens=length, seed=seed, stop=stop, **known)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation.

        Args:
            chat_history: messages with "role" and "content".
            add_generation_prompt: end where the assistant begins; else the last message is the
                beginning of an answer, and the text ends with it.

        Raises:
            ValueError: a model without a template, or see `bitjax.chat.template.render`.
        """
        tokenizer = self.text_tokenizer
        form = ChatFormat(tokenizer, self.model.config)  # refuses byte tokens
        assert isinstance(tokenizer, TextTokenizer)
        name = {token: name for name, token in tokenizer.control.items()}
        stop = tokenizer.special.stop
        text = render(
            form.template, chat_history, add_generation_prompt,
            bos_token="" if tokenizer.special.bos is None else name.get(tokenizer.special.bos, ""),
            eos_token=name.get(stop[0], "") if stop else "",
        )  # fmt: skip
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        last = last if last in text else last.strip()  # as most templates have it
        return text[: text.rindex(last) + len(last)] if last in text else text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in Jinja.

        Raises:
            ValueError: a model without one.
        """
        if not chat_template:
            return None
        return ChatFormat(self.text_tokenizer, self.model.config).template

    @property
    def tokenizer_name(self) -> str:
        """Tells models' tokenizers apart in the harness's caches of requests."""
        tokenizer = self.text_tokenizer
        if not isinstance(tokenizer, TextTokenizer):
            return tokenizer.name
        said = tokenizer.json + repr(tokenizer.special)
        return f"bitjax-{hashlib.sha256(said.encode()).hexdigest()[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        return {
            "model_num_parameters": parameter_count(self.model.config),
            "model_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(self.model))),
            "model_sha": fingerprint(self.model),
        }


def complete(
    generator: Generator, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[str]:
    """The texts that follow token prompts, generated together.

    Raises:
        ValueError: an empty prompt, or one that leaves no room in the context.
    """
    writers = [generator.writer(t, p) for t, p in zip(prompts, params, strict=True)]
    steps: Iterable[np.ndarray] = generator.tokens(prompts, params)
    for tokens_B in steps:
        for writer, token in zip(writers, tokens_B.tolist(), strict=True):
            writer.feed(token)
        if all(writer.finish_reason for writer in writers):
            break
    return [writer.text for writer in writers]
