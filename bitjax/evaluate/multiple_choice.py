"""Multiple choice: which of an item's continuations the model finds most likely.

    acc        argmax_i log p(choice_i | context_i) is the right one
    acc_norm   argmax_i log p(choice_i | context_i) / characters of choice_i, as the harness has it
    bits/byte  -log2 p(right choice | its context) / its UTF-8 bytes

Characters and bytes are those of the choice without the space before it. An item of one choice is
right if greedy decoding gives it. Standard errors are those of a mean of independent items,
sqrt(variance / n) with n - 1 in the variance.

Source of the conventions: EleutherAI's lm-evaluation-harness.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitjax.evaluate.records import Record, Records
from bitjax.evaluate.requests import Request, RequestScorer, encode_request
from bitjax.evaluate.tasks import Item, Task
from bitjax.tokenizer import Tokenizer, utf8


@dataclass(frozen=True)
class Settings:
    """How items become prompts.

    Attributes:
        shots: solved items before each, 0 or more.
        seed: of their choice.
        truncate: leave out the beginning of what is longer than the model's context.
    """

    shots: int = 0
    seed: int = 0
    truncate: bool = False

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"{self.shots} shots; there can be 0 or more")


@dataclass(frozen=True)
class Mean:
    """A mean over items and its standard error, NaN for a single item."""

    value: float
    error: float
    items: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of at least one value."""
        array = np.asarray(values, np.float64)
        n = len(array)
        error = float(array.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        return cls(float(array.mean()), error, n)


def examples(task: Task, item: Item, settings: Settings) -> str:
    """The solved items before one, which is never among them; the same whatever the limit.

    Raises:
        ValueError: the task has too few.
    """
    if not settings.shots:
        return ""
    others = [other for other in task.items if other.id != item.id and other.part == item.part]
    if len(others) < settings.shots:
        raise ValueError(f"{task.name} has {len(others)} other items, not {settings.shots} shots")
    draw = random.Random(f"{settings.seed} {item.id}")
    return "".join(o.solved + "\n\n" for o in draw.sample(others, settings.shots))


def requests_of(
    task: Task, item: Item, tokenizer: Tokenizer, longest: int, settings: Settings
) -> list[Request]:
    """A request for each choice.

    Raises:
        ValueError: a choice that is too long for the model, or no token.
    """
    before = examples(task, item, settings)
    try:
        return [
            encode_request(tokenizer, before + context, choice, longest, settings.truncate)
            for context, choice in zip(item.contexts, item.choices, strict=True)
        ]
    except ValueError as error:
        raise ValueError(f"{task.name}, item {item.id}: {error}") from None


def score_task(
    scorer: RequestScorer,
    tokenizer: Tokenizer,
    task: Task,
    settings: Settings,
    limit: int | None = None,
    records: Records[Record] | None = None,
    on_items: Callable[[int, int], None] = lambda done, total: None,
) -> list[Record]:
    """Score items, those that have no record yet.

    Args:
        scorer: of the model.
        tokenizer: of the model.
        task: what to score.
        settings: of the prompts.
        limit: items of each part.
        records: where results are kept as they come.
        on_items: called with items done and in all.

    Returns:
        A record for each item, in the task's order.

    Raises:
        ValueError: an item that the model cannot read, or records of other items.
    """
    items = task.limited(limit)
    found: dict[str, Record] = {}
    requests: list[Request] = []
    owners: list[int] = []
    digests = []
    for i, item in enumerate(items):
        made = requests_of(task, item, tokenizer, scorer.longest, settings)
        digests.append(_digest(made))
        known = records.find(item.id, digests[-1]) if records is not None else None
        if known is not None:
            found[item.id] = known
            continue
        requests += made
        owners += [i] * len(made)
    scores: dict[int, tuple[float, bool]] = {}
    waiting = Counter(owners)
    first = {owner: place for place, owner in reversed(list(enumerate(owners)))}
    for part in scorer.stream(requests):
        fresh = []
        for place, score in part.items():
            scores[place] = score.log_likelihood, score.greedy
            owner = owners[place]
            waiting[owner] -= 1
            if not waiting[owner]:
                item, start = items[owner], first[owner]
                mine = [scores[start + k] for k in range(len(item.choices))]
                fresh.append(_record(item, digests[owner], mine))
        found.update((record.id, record) for record in fresh)
        if records is not None:
            records.append(fresh)
        on_items(len(found), len(items))
    return [found[item.id] for item in items]


def _record(item: Item, digest: str, scores: list[tuple[float, bool]]) -> Record:
    values = [value for value, _ in scores]
    texts = [choice.removeprefix(" ") for choice in item.choices]
    best = int(np.argmax(values))
    normed = int(np.argmax([v / len(t) for v, t in zip(values, texts, strict=True)]))
    right = scores[0][1] if len(scores) == 1 else best == item.gold
    bits = -values[item.gold] / math.log(2) / len(utf8(texts[item.gold]))
    return Record(
        item.id, item.part, item.group, digest, item.gold, tuple(values), float(right),
        float(normed == item.gold) if item.normed and len(scores) > 1 else None, bits,
    )  # fmt: skip


def _digest(requests: list[Request]) -> str:
    """Of all tokens that a model is given for an item."""
    made = hashlib.sha256()
    for request in requests:
        made.update(f"{len(request.tokens)} {request.scored} ".encode())
        made.update(request.tokens.tobytes())
    return made.hexdigest()[:16]


def metrics(records: Sequence[Record]) -> dict[str, list[float]]:
    """The values of each metric that all items have, by its name."""
    columns: dict[str, list[float]] = {"acc": [r.acc for r in records]}
    normed = [r.acc_norm for r in records if r.acc_norm is not None]
    if len(normed) == len(records):
        columns["acc_norm"] = normed
    columns["bits/byte"] = [r.bits_per_byte for r in records]
    return columns


def groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """All records under "", and those of each group, in alphabetical order."""
    made = {"": list(records)}
    for name in sorted({r.group for r in records} - {""}):
        made[name] = [r for r in records if r.group == name]
    return made
