"""Exercises that a model answers in its own words: GSM8K's numbers, HumanEval's programs.

    question, answer              GSM8K (arXiv 2110.14168): the answer's last line is "#### number"
    prompt, test, entry_point     HumanEval (arXiv 2107.03374): the model goes on with a function

GSM8K. The prompt is "Question: ...\\nAnswer:", after solved ones in the same form (others of the
file, with their reasoning), as EleutherAI's lm-evaluation-harness has it; greedy text ends at the
next "Question:". Two metrics of it,

    exact          the first number after "####" is the answer
    last number    the last number of the text is: also for models that were never shown "####"

Numbers are compared as numbers, without $, %, and commas between thousands.

HumanEval. The prompt is the file's; text ends where the function does: before "\\nclass", "\\ndef",
"\\n#", "\\nif" and "\\nprint" (section 2.1). It has passed if prompt, text, tests and
check(function) run to their end (`sandbox.py`). Of n samples c pass; without bias (equation 1)

    pass@k = 1 - C(n - c, k) / C(n, k)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from bitjax.evaluate.tasks import ENDINGS, json_lines

_NUMBER = re.compile(r"-?[$]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_AFTER_HASHES = re.compile(r"####\s*(-?[$]?(?:\d[\d,]*(?:\.\d+)?|\.\d+))")
_STOPS = {
    "number": ("Question:",),
    "program": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
}
_FIELDS = {"number": ("question", "answer"), "program": ("prompt", "test", "entry_point")}
PASSES = (1, 10, 100)  # k of pass@k, those that the samples allow


@dataclass(frozen=True)
class Exercise:
    """A prompt, and how its answer is judged.

    Attributes:
        id: unique in its task.
        kind: "number" or "program".
        prompt: what the model goes on from.
        solution: the text that solves it; "" if none is known.
        key: the number, or the tests with the call of `check`.
    """

    id: str
    kind: Literal["number", "program"]
    prompt: str
    solution: str
    key: str

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return _STOPS[self.kind]

    def program(self, text: str) -> str:
        """The whole program that judges a text."""
        return f"{self.prompt}{text}\n{self.key}"


@dataclass(frozen=True)
class Exercises:
    """Exercises of one kind, in the order of their file.

    Attributes:
        name: of the file, without its endings.
        kind: of all of them.
        items: at least one.
    """

    name: str
    kind: Literal["number", "program"]
    items: tuple[Exercise, ...]


def read_exercises(path: Path) -> Exercises | None:
    """The exercises of a file; None if its first line is something else.

    Raises:
        ValueError: damaged, or a line that is no exercise of the first one's kind.
    """
    if path.is_dir() or not path.name.endswith(ENDINGS):
        return None
    lines = json_lines(path)
    kind = next((_kind(line) for _, line in islice(lines, 1)), None)
    if kind is None:
        return None
    items: dict[str, Exercise] = {}
    for number, (where, line) in enumerate(json_lines(path)):
        item = _exercise(kind, line, number) if _kind(line) == kind else None
        if item is None:
            wanted = ", ".join(_FIELDS[kind])
            more = ", the last with a number behind ####" if kind == "number" else ""
            raise ValueError(f"{where}: an exercise needs texts in the fields {wanted}{more}")
        if item.id in items:
            raise ValueError(f"{where}: there is an exercise {item.id!r} before it")
        items[item.id] = item
    name = path.name
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return Exercises(name, kind, tuple(items.values()))


def _kind(line: dict[str, Any]) -> Literal["number", "program"] | None:
    if all(isinstance(line.get(field), str) for field in _FIELDS["number"]):
        return "number"
    if all(isinstance(line.get(field), str) for field in _FIELDS["program"]):
        return "program"
    return None


def _exercise(
    kind: Literal["number", "program"], line: dict[str, Any], number: int
) -> Exercise | None:
    if kind == "program":
        key = f"{line['test']}\ncheck({line['entry_point']})\n"
        solution = str(line.get("canonical_solution", ""))
        return Exercise(str(line.get("task_id", number)), kind, line["prompt"], solution, key)
    answer = number_after_hashes(line["answer"])
    if answer is None:
        return None
    prompt = f"Question: {line['question']}\nAnswer:"
    name = str(line.get("id", number))
    return Exercise(name, kind, prompt, f" {line['answer']}", str(answer))


def number_after_hashes(text: str) -> Decimal | None:
    """The first number behind "####"; None without one."""
    found = _AFTER_HASHES.search(text)
    return None if found is None else _decimal(found[1])


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None without one."""
    found = _NUMBER.findall(text)
    return _decimal(found[-1]) if found else None


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[$,]", "", text))
    except InvalidOperation:
        return None


def judge_number(exercise: Exercise, text: str) -> dict[str, float]:
    """Each metric of one text: 1 if right, else 0."""
    key = Decimal(exercise.key)
    return {
        "exact": float(number_after_hashes(text) == key),
        "last number": float(last_number(text) == key),
    }


def pass_at(samples: int, passed: int, k: int) -> float:
    """The chance that one of k samples passes, without bias, of `samples` of which some passed.

    Raises:
        ValueError: not 0 <= passed <= samples, or k not in 1..samples.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {passed} of them passed")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def pass_rates(passed: Sequence[bool]) -> dict[str, float]:
    """pass@k of one exercise for each k of `PASSES` that its samples allow."""
    n, c = len(passed), sum(passed)
    return {f"pass@{k}": pass_at(n, c, k) for k in PASSES if k <= n}
