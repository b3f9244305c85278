"""Many machines: an actor for Ray Data, whose lines give what `bitjax batch` gives on one.

    import ray
    from bitjax.cluster import Answer, prompts

    found = prompts("in.jsonl").map_batches(
        Answer,
        fn_constructor_kwargs={"path": "/shared/a.safetensors", "settings": {"max_tokens": 100}},
        batch_size=64,
        num_cpus=15,                                  # of a node's 16: one actor on each,
        compute=ray.data.ActorPoolStrategy(size=4),   # and a core left for Ray's own tasks
    )
    found.sort("index").write_parquet("out")

An actor reads the model where it lies: a model file of bitjax is mapped, so actors of one node
share its pages, and each takes no memory of its own but the cache. Every node must find the file
under the path. A row's text depends on its index, prompt and settings alone, not on the actor, the
batch or the machine, where all have one kernel (`BITJAX_KERNEL` forces one).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitjax import api
from bitjax.batch.lines import Line, Source, from_json
from bitjax.batch.requests import Item, Reader, record_of
from bitjax.config import BatchConfig, EngineConfig
from bitjax.engine import Completion, Engine
from bitjax.ops import Impl
from bitjax.protocol import Encoder

Columns = dict[str, Any]
TEXTS = ("id", "text", "finish_reason", "error", "choices")
NUMBERS = ("prompt_tokens", "completion_tokens")


class Answer:
    """Answers the rows of a batch, columns as NumPy arrays or lists.

    A row has "index", which no other has, and either "line", the JSON of a line of `bitjax batch`,
    and maybe "error", what is wrong with it, or columns of its fields. What comes has "index",
    "id", "text", "finish_reason", "error" (empty without one), "choices" (JSON, of several
    samples), "prompt_tokens", "completion_tokens".

    Args:
        path: of the model, on every node.
        settings: of sampling, by their names in OpenAI's bodies.
        config: of the job.
        engine: sizes.
        template: for chats, in the place of the model's.
        impl: of the packed products.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any] | None = None,
        config: BatchConfig | None = None,
        engine: EngineConfig | None = None,
        template: str | None = None,
        impl: Impl = "auto",
    ) -> None:
        model = api.load(path, impl)
        self._engine = Engine(model, engine)
        self._encoder = Encoder(model.tokenizer, model.config, self._engine.context, template)
        # A batch that Ray runs again holds ids that were here before.
        self._reader = Reader(
            self._encoder, config or BatchConfig(), settings or {}, unique=False
        )  # fmt: skip

    def __call__(self, batch: Columns) -> Columns:
        """The columns of results, in the rows' order."""
        items = self._reader.items(list(_lines(batch)))
        found: dict[str, Completion] = {}
        requests = [request for item in items if item.error is None for request in item.requests()]
        for completion in self._engine.generate(requests):
            found[completion.id] = completion
        rows = [self._row(item, found) for item in items]
        made: Columns = {"index": np.array([item.index for item in items], np.int64)}
        for name in (*TEXTS, *NUMBERS):
            kind = np.int64 if name in NUMBERS else object
            made[name] = np.array([row[name] for row in rows], kind)
        return made

    def _row(self, item: Item, found: Mapping[str, Completion]) -> dict[str, Any]:
        completions = [found[f"{item.index}.{i}"] for i in range(len(item.tokens))]
        record = record_of(item, completions, "bitjax", self._encoder)
        row = dict.fromkeys(TEXTS, "") | dict.fromkeys(NUMBERS, 0) | {"id": item.id or ""}
        error = next((c.error for c in completions if c.error), "") or str(item.error or "")
        if error:
            return row | {"error": error}
        body = record["response"]["body"] if item.openai else record
        choices = body.get("choices", [body])
        if len(choices) > 1:
            row["choices"] = json.dumps(choices, ensure_ascii=False)
        first = choices[0]
        return row | {
            "text": first["message"]["content"] if "message" in first else first["text"],
            "finish_reason": first["finish_reason"],
            **{name: body["usage"][name] for name in NUMBERS},
        }


def _lines(batch: Columns) -> list[Line]:
    if "index" not in batch:
        raise ValueError(f"the rows have no 'index'; their columns are {', '.join(batch)}")
    lines = []
    for row, index in enumerate(batch["index"]):
        if "line" in batch:
            error = str(batch["error"][row]) if "error" in batch else ""
            lines.append(
                Line(int(index), None, error) if error
                else from_json(int(index), str(batch["line"][row]))
            )  # fmt: skip
            continue
        fields = {name: _plain(batch[name][row]) for name in batch if name != "index"}
        lines.append(Line(int(index), {k: v for k, v in fields.items() if v is not None}))
    return lines


def _plain(value: Any) -> Any:
    """A cell as JSON has it: Arrow gives arrays for lists, and NaN for numbers left out."""
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and value != value else value


def prompts(path: str | Path, config: BatchConfig | None = None) -> Any:
    """A file of prompts as a Ray dataset of "index", "line" and "error", for `Answer`.

    Lines that `bitjax batch` could not read are rows whose answer is an error.
    """
    import ray.data

    config = config or BatchConfig()
    source = Source(Path(path), config.field, config.keep)
    rows = [{"index": line.index, "line": json.dumps(line.value), "error": line.error}
            for line in source.read()]  # fmt: skip
    return ray.data.from_items(rows)
