"""What is written of a run: its row, its settings, its curve, the code's commit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitjax.config import RunConfig
from bitjax.scaling.arms import ARMS, configuration, embedding, non_embedding, shape
from bitjax.scaling.plan import Plan, PlannedRun
from bitjax.scaling.score import HeldOut, held_out
from bitjax.scaling.table import Row
from bitjax.train.flops import flops_per_token


class Recorder:
    """Knows what a plan's runs are.

    Args:
        plan: of `bitjax scale plan`.
        data: path of its corpus.
        directory: of the study.

    Raises:
        ValueError: another corpus than the plan's.
    """

    def __init__(self, plan: Plan, data: str, directory: Path) -> None:
        self.base = dataclasses.replace(
            plan.recipe, data=dataclasses.replace(plan.recipe.data, text=data)
        )
        self._plan, self._directory = plan, directory
        self._held: HeldOut = held_out(self.base)
        self._by_name = {run.run: run for run in plan.runs}
        for name, found in (("data", self._held.data), ("validation", self._held.identity)):
            if plan.corpus[name] != found:
                raise ValueError(
                    f"{data or 'the packaged text'} is not the plan's corpus "
                    f"{plan.corpus['name']!r}: its {name} identity is {found[:12]}, the plan's "
                    f"{plan.corpus[name][:12]}"
                )

    def folder(self, run: PlannedRun) -> Path:
        """Where the run is trained."""
        return (self._directory / "runs" / run.run).resolve()

    def config(self, run: PlannedRun, rate: float) -> RunConfig:
        """Of a run that is trained."""
        start = str(self.folder(self._by_name[run.after])) if run.after else ""
        return configuration(
            self.base, self._plan.study, run.arm, run.size, run.steps, run.seed, rate, start
        )

    def _settings(self, run: PlannedRun, rate: float) -> dict[str, Any]:
        """What a row says of its run: no path of this machine."""
        arm = ARMS[run.arm]
        trained = self._by_name[run.after] if arm.rounded else run
        held = dataclasses.asdict(self.config(trained, rate))
        held["data"]["text"] = self._plan.corpus["name"]
        held["train"]["start_from"] = "" if arm.rounded else run.after
        if arm.rounded:
            held["rounded"] = {"run": run.after, "to": arm.rounded}
        found: dict[str, Any] = json.loads(json.dumps(held))  # lists for tuples, as in a row
        return found

    def row(self, run: PlannedRun, rate: float, made: Mapping[str, Any]) -> Row:
        """The row of a run.

        Args:
            run: that is finished.
            rate: its learning rate.
            made: the worker's result.
        """
        model, T = shape(self.base.model, run.size), self.base.train.seq_len
        return Row(
            run=run.run, arm=run.arm, hidden_size=model.hidden_size, num_layers=model.num_layers,
            N=non_embedding(model), embedding_parameters=embedding(model), D=run.tokens,
            flops=flops_per_token(model, T) * run.tokens, seed=run.seed, learning_rate=rate,
            loss=made["loss"], loss_se=made["error"], bits_per_byte=made["bits_per_byte"],
            tokenizer=self._held.tokenizer, data=self._held.data,
            validation=self._held.identity, ended=True, status="finished",
            seconds=round(made["seconds"], 1), commit=made["commit"],
            config=json.dumps(self._settings(run, rate), separators=(",", ":")),
            curve=f"curves/{run.run}.json",
        )  # fmt: skip

    def require_same_settings(self, row: Row) -> None:
        """Refuse a row of the plan's name that was made otherwise.

        Raises:
            ValueError: naming what differs.
        """
        wanted = self._settings(self._by_name[row.run], row.learning_rate)
        differing = [
            f"{section}.{name}"
            for section, values in wanted.items()
            for name, value in values.items()
            if row.settings.get(section, {}).get(name) != value
        ]
        if differing or (row.data, row.validation) != (self._held.data, self._held.identity):
            said = ", ".join(differing[:5]) or "data"
            raise ValueError(
                f"the table's run {row.run} was made with other settings than the plan has "
                f"({said}); use its plan or another directory"
            )


def curve(made: Mapping[str, Any]) -> str:
    """The file of a result's curve; five digits are more than its noise."""
    rounded = {
        name: [float(f"{x:.5g}") if isinstance(x, float) else x for x in values]
        for name, values in made["curve"].items()
        if any(x is not None for x in values)
    }
    documents = {"tokens": made["tokens"], "nats": [round(x, 2) for x in made["nats"]]}
    return json.dumps({**rounded, "documents": documents}, separators=(",", ":")) + "\n"


def code_commit() -> str:
    """Of the code that runs, with + if it was changed since; "unknown" outside a repository."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            made = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return made.stdout.strip() if made.returncode == 0 else None

    if not (found := git("rev-parse", "--short=10", "HEAD")):
        return "unknown"
    return found + ("+" if git("status", "--porcelain", "--", str(folder.parent)) else "")
