"""What was said of every reply, by prompt, model and seed: the table that metrics read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from equipoise.evaluation.intervals import Floats
from equipoise.evaluation.metrics._base import Case, Judged, Metric
from equipoise.evaluation.settings import PassSettings
from equipoise.generation._base import Prompt


@dataclass(frozen=True)
class ModelReplies:
    """One model's replies: `replies[s]` maps prompt ids to what was said of the reply under `seeds[s]`."""

    name: str
    kind: Literal["arm", "null"]
    seeds: tuple[int, ...]
    replies: tuple[Mapping[str, Judged], ...]

    def of(self, prompt_id: str) -> tuple[Judged, ...]:
        """The replies to one prompt, of the seeds that have one."""
        return tuple(replies[prompt_id] for replies in self.replies if prompt_id in replies)


@dataclass(frozen=True)
class ScoreTable:
    """Prompts and the judged replies of all models, in the order they are shown."""

    prompts: tuple[Prompt, ...]
    models: Mapping[str, ModelReplies]
    baseline: str | None = None
    passing: PassSettings = field(default=PassSettings())

    @cached_property
    def floors(self) -> dict[str, float]:
        """Prompt id → the lowest reward any arm's reply to it got; what an invalid reply is worth at most.

        Null policies have no say in it, so that an arm's figures do not depend on which of them stand beside it.
        """
        floors: dict[str, float] = {}
        for name in self.arms():
            for replies in self.models[name].replies:
                for prompt_id, reply in replies.items():
                    if reply.reward is not None:
                        floors[prompt_id] = min(reply.reward, floors.get(prompt_id, reply.reward))
        return floors

    def arms(self) -> list[str]:
        """Models that are no null policies, in order."""
        return [name for name, model in self.models.items() if model.kind == "arm"]

    def count(self, axes: Sequence[str]) -> int:
        """How many prompts these axes have."""
        return sum(prompt.axis in axes for prompt in self.prompts)

    @cached_property
    def cases(self) -> list[tuple[str, Case]]:
        """Every prompt's axis, and what metrics may know of it."""
        baseline = self.models.get(self.baseline) if self.baseline else None
        return [
            (prompt.axis, Case(prompt.id, self.passing, self.floors.get(prompt.id), baseline.of(prompt.id) if baseline else ()))
            for prompt in self.prompts
        ]

    @cached_property
    def _known(self) -> dict[tuple[Metric, str], list[Floats]]:
        return {}

    def values(self, metric: Metric, name: str) -> list[Floats]:
        """A metric's value of every reply of a model: one [seeds, prompts] array per part of the metric; NaN is missing."""
        key = (metric, name)
        if key not in self._known:
            self._known[key] = self._values(metric, name)
        return self._known[key]

    def _values(self, metric: Metric, name: str) -> list[Floats]:
        model = self.models[name]
        arrays = []
        for part in metric.parts:
            cases = [case for axis, case in self.cases if axis in part.axes]
            rows = [[_number(part.value, replies.get(case.id), case) for case in cases] for replies in model.replies]
            arrays.append(np.asarray(rows, dtype=np.float64).reshape(len(model.replies), len(cases)))
        return arrays

    def pairs(self, axes: Sequence[str], a: str, b: str) -> Iterator[list[tuple[Judged, Judged]]]:
        """For each prompt of these axes, every reply of `a` beside every reply of `b` (seeds crossed)."""
        for prompt in self.prompts:
            if prompt.axis in axes:
                yield [(left, right) for left in self.models[a].of(prompt.id) for right in self.models[b].of(prompt.id)]


def over_seeds(values: Floats) -> Floats:
    """[seeds, prompts] → [prompts]: the mean over the seeds that have a value; NaN where none has."""
    known = ~np.isnan(values)
    counts = known.sum(axis=0)
    sums = np.where(known, values, 0.0).sum(axis=0)
    return np.divide(sums, counts, out=np.full(values.shape[1], np.nan), where=counts > 0)


def _number(value: Any, reply: Judged | None, case: Case) -> float:
    found = None if reply is None else value(reply, case)
    return float("nan") if found is None else float(found)
