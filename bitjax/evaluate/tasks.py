"""Items of published tasks, read from their files.

A file is JSONL, plain or compressed (.gz, .xz), or a .zip or a folder of such files; what its lines
hold decides how they are read. A new form is a function from one line to an item, and a line in
`FORMS`.

    query, choices, gold            a question and its answers (ARC, HellaSwag, BoolQ, ...)
    query, choices                  one answer, which greedy decoding shall give (LAMBADA)
    sentence, option1, option2      WinoGrande: how likely is the rest after either option
    goal, sol1, sol2                PIQA as published, its labels in FILE-labels.lst
    sentence_good, sentence_bad     BLiMP: two sentences without a context
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz")


@dataclass(frozen=True)
class Item:
    """A question with one or more continuations, of which one is right.

    Attributes:
        id: unique in its task.
        contexts: of each choice.
        choices: continuations, each with the space before it.
        gold: index of the right one.
        part: what a limit on the number of items counts (BLiMP's paradigms).
        group: what is reported beside the whole ("" for none).
        normed: whether choices are of such different lengths that `acc_norm` means something.
    """

    id: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    part: str = ""
    group: str = ""
    normed: bool = True

    @property
    def solved(self) -> str:
        """The item as an example for others."""
        return self.contexts[self.gold] + self.choices[self.gold]


@dataclass(frozen=True)
class Task:
    """Items in the order of their file.

    Attributes:
        name: of the file, without its endings.
        items: at least one.
    """

    name: str
    items: tuple[Item, ...]

    def limited(self, limit: int | None) -> tuple[Item, ...]:
        """The first `limit` items of each part."""
        if limit is None:
            return self.items
        seen: dict[str, int] = {}
        kept = []
        for item in self.items:
            seen[item.part] = seen.get(item.part, 0) + 1
            if seen[item.part] <= limit:
                kept.append(item)
        return tuple(kept)


def _question(line: dict[str, Any], name: str) -> Item:
    query, choices = _text(line, "query"), _texts(line, "choices")
    gold = line.get("gold", 0 if len(choices) == 1 else None)
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"gold is {gold!r}; it has choices 0 to {len(choices) - 1}")
    return Item(name, (query,) * len(choices), tuple(" " + c for c in choices), gold)


def _winogrande(line: dict[str, Any], name: str) -> Item:
    start, blank, rest = _text(line, "sentence").partition("_")
    if not blank or not rest.strip():
        raise ValueError("its sentence has no _ with text behind it")
    contexts = start + _text(line, "option1"), start + _text(line, "option2")
    if line.get("answer") not in ("1", "2"):
        raise ValueError(f"answer is {line.get('answer')!r}, not '1' or '2'")
    return Item(name, contexts, (rest, rest), int(line["answer"]) - 1, normed=False)


def _piqa(line: dict[str, Any], name: str) -> Item:
    query = f"Goal: {_text(line, 'goal')}\nAnswer:"
    choices = " " + _text(line, "sol1"), " " + _text(line, "sol2")
    if line.get("label") not in (0, 1):
        raise ValueError("its label is in no file of labels; that would be FILE-labels.lst")
    return Item(name, (query, query), choices, line["label"])


def _minimal_pair(line: dict[str, Any], name: str) -> Item:
    pair = _text(line, "sentence_good"), _text(line, "sentence_bad")
    part = str(line.get("UID", ""))
    if part:
        name = f"{part}/{line.get('pairID', name)}"
    group = str(line.get("linguistics_term", ""))
    return Item(name, ("", ""), pair, 0, part, group, normed=False)


# The fields that tell a form from the others, and what reads a line of it.
FORMS: dict[tuple[str, ...], Callable[[dict[str, Any], str], Item]] = {
    ("query", "choices"): _question,
    ("sentence", "option1", "option2"): _winogrande,
    ("goal", "sol1", "sol2"): _piqa,
    ("sentence_good", "sentence_bad"): _minimal_pair,
}


def find_task(name: str, folder: Path | None = None) -> Path:
    """The file of a task: a path, or the beginning of one file's name in a folder.

    Raises:
        ValueError: no such file, or several.
    """
    path = Path(name)
    if path.exists():
        return path
    if folder is None:
        raise ValueError(f"task {name!r} is no file; --task-dir names a folder to look in")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of tasks")
    there = {p for p in folder.rglob("*") if p.is_file() and p.name.endswith((*ENDINGS, ".zip"))}
    lower = name.lower()
    found = sorted(p for p in there if p.name.lower().startswith(f"{lower}."))
    if len(found) != 1:
        choices = ", ".join(sorted(p.name for p in found or there)) or "none"
        what = "several files of" if found else "no"
        raise ValueError(f"{folder} has {what} task {name!r}; there are {choices}")
    return found[0]


def read_task(path: Path) -> Task:
    """The items of a file, a folder or an archive.

    Raises:
        ValueError: damaged, empty, or a line that is no item.
    """
    items: dict[str, Item] = {}
    for where, lines in _files(path):
        labels = _labels(path)
        for number, text in enumerate(lines):
            if not text.strip():
                continue
            at = f"{where}, line {number + 1:,}"
            try:
                item = _item(text, number, labels)
            except ValueError as error:
                raise ValueError(f"{at}: {error}") from None
            if item.id in items:
                raise ValueError(f"{at}: there is an item {item.id!r} before it")
            items[item.id] = item
    if not items:
        raise ValueError(f"{path} holds no items")
    name = path.name
    for ending in (*ENDINGS, ".zip"):
        name = name.removesuffix(ending)
    return Task(name, tuple(items.values()))


def _item(text: str, number: int, labels: list[int] | None) -> Item:
    line = _object(text)
    if labels is not None and "label" not in line and number < len(labels):
        line["label"] = labels[number]
    name = next((str(line[key]) for key in ("id", "idx", "index") if key in line), None)
    for fields, read in FORMS.items():
        if all(field in line for field in fields):
            return read(line, name or str(number))
    known = "; ".join(", ".join(fields) for fields in FORMS)
    raise ValueError(f"an item needs the fields {known}; this has {', '.join(line) or 'none'}")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file's lines, each with its place for messages.

    Raises:
        ValueError: damaged, or a line that is no object.
    """
    for where, lines in _files(path):
        for number, text in enumerate(lines):
            if text.strip():
                at = f"{where}, line {number + 1:,}"
                try:
                    yield at, _object(text)
                except ValueError as error:
                    raise ValueError(f"{at}: {error}") from None


def _object(text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    return line


def _text(line: dict[str, Any], field: str) -> str:
    if not isinstance(line[field], str) or not line[field].strip():
        raise ValueError(f"{field} is {line[field]!r:.40}, not a text")
    return str(line[field])


def _texts(line: dict[str, Any], field: str) -> list[str]:
    texts = line[field]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{field} is {texts!r:.40}, not a list of texts")
    return texts


def _files(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The JSONL files in a path, each with its name for messages and its lines."""
    try:
        if path.is_dir():
            for inner in sorted(p for p in path.iterdir() if p.name.endswith(ENDINGS)):
                yield from _files(inner)
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith(".jsonl") and not Path(name).name.startswith("."):
                        yield f"{path}/{name}", _lines(archive.read(name))
        else:
            openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open}
            with openers.get(path.suffix, lambda p: p.open("rb"))(path) as file:
                yield str(path), _lines(file.read())
    except (zipfile.BadZipFile, lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start:,} of a file") from None


def _lines(raw: bytes) -> list[str]:
    return list(io.StringIO(raw.decode("utf-8")))  # not splitlines, which knows more ends


def _labels(path: Path) -> list[int] | None:
    for ending in ENDINGS:
        beside = path.with_name(f"{path.name.removesuffix(ending)}-labels.lst")
        if path.name.endswith(ending) and beside.is_file():
            lines = beside.read_text(encoding="utf-8", errors="replace").splitlines()
            return [int(line) if line.strip() in ("0", "1") else -1 for line in lines]
    return None
