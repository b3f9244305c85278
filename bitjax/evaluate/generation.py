"""Scores of exercises: prompts are completed, and what comes is judged."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from os import cpu_count

from bitjax.evaluate.exercises import Exercise, Exercises, judge_number, pass_rates
from bitjax.evaluate.records import Answer, Records
from bitjax.evaluate.sandbox import SECONDS, require_sandbox, run_program

TOGETHER = 16  # sequences generated together: weights are read once for all of them


@dataclass(frozen=True)
class Prompt:
    """What one sample is made of.

    Attributes:
        text: that it goes on from.
        stop: texts that end it.
        max_new_tokens: at most.
        temperature: 0 is greedy.
        seed: of the sample.
    """

    text: str
    stop: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    seed: int


Complete = Callable[[Sequence[Prompt]], list[str]]  # the texts that follow, without the stop


@dataclass(frozen=True)
class GenerationSettings:
    """How exercises are put, and answered.

    Attributes:
        shots: solved exercises before each of GSM8K.
        seed: of their choice and of samples.
        samples: of each exercise; several need a temperature.
        temperature: 0 is greedy.
        max_new_tokens: of an answer.
    """

    shots: int = 0
    seed: int = 0
    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"{self.shots} shots; there can be 0 or more")
        if self.samples < 1:
            raise ValueError(f"{self.samples} samples of each exercise; there can be 1 or more")
        if self.samples > 1 and self.temperature <= 0:
            raise ValueError(f"{self.samples} greedy samples are all the same; give --temperature")


def prompt_of(task: Exercises, item: Exercise, settings: GenerationSettings) -> str:
    """The prompt of an exercise, after solved ones; the same whatever the limit.

    Raises:
        ValueError: the task has too few others, or is of programs.
    """
    if not settings.shots:
        return item.prompt
    if item.kind == "program":
        raise ValueError(f"{task.name} has programs, which are put without --shots")
    others = [other for other in task.items if other.id != item.id]
    if len(others) < settings.shots:
        raise ValueError(f"{task.name} has {len(others)} other items, not {settings.shots} shots")
    draw = random.Random(f"{settings.seed} {item.id}")
    solved = draw.sample(others, settings.shots)
    return "".join(f"{o.prompt}{o.solution}\n\n" for o in solved) + item.prompt


def answer_exercises(
    complete: Complete,
    task: Exercises,
    settings: GenerationSettings,
    limit: int | None = None,
    records: Records[Answer] | None = None,
    run_code: bool = False,
) -> list[Answer]:
    """Have exercises answered, those without a record, and judge the answers.

    Args:
        complete: of the model.
        task: the exercises.
        settings: of prompts and samples.
        limit: first exercises of the task.
        records: where answers are kept as they come.
        run_code: whether programs of the model may be run, in the sandbox.

    Returns:
        An answer for each exercise, in the task's order.

    Raises:
        ValueError: programs that may not or cannot be run, or records of other exercises.
    """
    if task.kind == "program":
        if not run_code:
            raise ValueError(f"{task.name} runs programs that the model writes; --run-code allows "
                             "it, each in a process without files and network")  # fmt: skip
        require_sandbox()
    items = task.items[:limit]
    found: dict[str, Answer] = {}
    waiting = []
    for item in items:
        prompt = prompt_of(task, item, settings)
        digest = _digest(item, prompt, settings)
        known = records.find(item.id, digest) if records is not None else None
        if known is None:
            waiting.append((item, prompt, digest))
        else:
            found[item.id] = known
    waiting.sort(key=lambda entry: len(entry[1]))  # of one length together
    size = max(1, TOGETHER // settings.samples)
    for start in range(0, len(waiting), size):
        batch = waiting[start : start + size]
        prompts = [
            Prompt(text, item.stop, settings.max_new_tokens, settings.temperature,
                   _seed(settings.seed, item.id, sample))
            for item, text, _ in batch for sample in range(settings.samples)
        ]  # fmt: skip
        texts = complete(prompts)
        fresh = []
        for place, (item, _, digest) in enumerate(batch):
            mine = texts[place * settings.samples : (place + 1) * settings.samples]
            fresh.append(judge(item, digest, mine))
        found.update((answer.id, answer) for answer in fresh)
        if records is not None:
            records.append(fresh)
    return [found[item.id] for item in items]


def judge(item: Exercise, digest: str, texts: Sequence[str]) -> Answer:
    """The answer made of an exercise's samples; runs those that are programs."""
    if item.kind == "program":
        with ThreadPoolExecutor(cpu_count() or 1) as pool:
            outcomes = list(pool.map(lambda text: run_program(item.program(text), SECONDS), texts))
        values = pass_rates([outcome.passed for outcome in outcomes])
        return Answer(item.id, digest, tuple(texts), tuple(o.said for o in outcomes), values)
    judged = [judge_number(item, text) for text in texts]
    values = {name: sum(one[name] for one in judged) / len(judged) for name in judged[0]}
    return Answer(item.id, digest, tuple(texts), tuple(map(json.dumps, judged)), values)


def _digest(item: Exercise, prompt: str, settings: GenerationSettings) -> str:
    said = json.dumps([prompt, item.key, item.stop, asdict(settings)])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _seed(seed: int, name: str, sample: int) -> int:
    """Of one sample, whatever else is drawn: 32 bits."""
    made = hashlib.sha256(json.dumps([seed, name, sample]).encode())
    return int.from_bytes(made.digest()[:4], "little")


def values_of(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """The values of each metric, by its name."""
    return {name: [a.values[name] for a in answers] for name in answers[0].values}
