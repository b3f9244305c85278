"""How a file of prompts becomes a file of results: `bitjax batch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitjax.config.fields import check_fields, require

BatchOrder = Literal["input", "done"]


@dataclass(frozen=True)
class BatchConfig:
    """What decides the results, beside input, model and settings of sampling."""

    field: str = "prompt"  # of JSON objects and table columns, that holds prompts
    keep: tuple[str, ...] = ()  # fields that are copied to the output
    order: BatchOrder = "input"  # of the output: the input's, or as requests are done
    seed: int = 0  # lines without a seed draw with one made of this and their number

    def __post_init__(self) -> None:
        check_fields(self)
        require(bool(self.field), "batch.field is empty")
        require(0 <= self.seed < 2**32, f"batch.seed={self.seed} is not in [0, 2**32)")
        clash = {"index", "error"} & {*self.keep}
        require(not clash, f"batch.keep has {', '.join(sorted(clash))}, which results have anyway")
