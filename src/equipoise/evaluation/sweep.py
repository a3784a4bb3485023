"""What a pass rate would be under other thresholds: thresholds are chosen by people, and re-rank models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, groupby
from typing import Any

import numpy as np

from equipoise.evaluation.intervals import present, rounded
from equipoise.evaluation.metrics._base import Metric
from equipoise.evaluation.scores import ScoreTable, over_seeds

Row = dict[str, Any]


def sweep(table: ScoreTable, metric: Metric, points: int) -> list[Row]:
    """`[{"threshold", "values": {model: percent}}]`, ascending: about `points` round thresholds, and the one used."""
    assert metric.threshold is not None
    used = float(getattr(table.passing, metric.threshold))
    rows = []
    for threshold in thresholds(_rewards(table, metric), used, points):
        moved = replace(table, passing=table.passing.model_copy(update={metric.threshold: threshold}))
        rows.append({"threshold": threshold, "values": {name: _percent(moved, metric, name) for name in table.models}})
    return rows


def thresholds(rewards: Sequence[float], used: float, points: int) -> list[float]:
    """Round thresholds from the 5 % to the 95 % quantile of rewards, and the one used. None where there is nothing to sweep."""
    if points <= 0 or not len(rewards):
        return []
    low, high = (float(value) for value in np.quantile(np.asarray(rewards, dtype=np.float64), (0.05, 0.95)))
    if high - low <= 0:
        return [used]
    step = _round_step((high - low) / points)
    grid = np.arange(math.floor(low / step), math.ceil(high / step) + 1) * step
    return sorted({round(float(value), 10) + 0.0 for value in (*grid, used)})


def rank_changes(rows: Sequence[Row], used: float, arms: Sequence[str], title: str) -> list[str]:
    """Warnings where the leading arm, or the order of two arms, is not the same under all thresholds."""
    values = [{name: row["values"][name] for name in arms if row["values"].get(name) is not None} for row in rows]
    if len(arms) < 2 or not values or any(len(row) < 2 for row in values):
        return []
    leaders = [(row["threshold"], _leaders(value)) for row, value in zip(rows, values, strict=True)]
    ranges = [(leader, [at for at, _ in group]) for leader, group in groupby(leaders, key=lambda item: item[1])]
    warnings = []
    chosen = next((leader for at, leader in leaders if at == used), None)
    clear = {leader for leader, _ in ranges if len(leader) == 1}
    if len(clear) > 1 and chosen:
        elsewhere = [f"{' and '.join(leader)} {_span(at)}" for leader, at in ranges if len(leader) == 1 and leader != chosen]
        here = " and ".join(chosen)
        warnings.append(f"{title}: the leading arm depends on the threshold. At {used:g} it is {here}; elsewhere {', '.join(elsewhere)}.")
    swapped = [f"{a} and {b}" for a, b in combinations(arms, 2) if _swap(values, a, b)]
    if swapped:
        how_many = "two arms" if len(swapped) == 1 else f"{len(swapped)} pairs of arms"
        span = f"{rows[0]['threshold']:g} and {rows[-1]['threshold']:g}"
        warnings.append(f"{title}: between thresholds {span} the order of {how_many} turns around: {', '.join(swapped)}.")
    return warnings


def _swap(values: Sequence[Mapping[str, float]], a: str, b: str) -> bool:
    differences = [value[a] - value[b] for value in values if a in value and b in value]
    return any(item > 1e-9 for item in differences) and any(item < -1e-9 for item in differences)


def _leaders(values: Mapping[str, float]) -> tuple[str, ...]:
    best = max(values.values())
    return tuple(name for name, value in values.items() if value > best - 1e-9)


def _span(at: Sequence[float]) -> str:
    return f"at {at[0]:g}" if len(at) == 1 else f"from {at[0]:g} to {at[-1]:g}"


def _percent(table: ScoreTable, metric: Metric, name: str) -> float | None:
    samples = [present(over_seeds(values)) for values in table.values(metric, name)]
    if any(not len(sample) for sample in samples):
        return None
    return rounded(metric.scale * sum(part.weight * float(sample.mean()) for part, sample in zip(metric.parts, samples, strict=True)))


def _rewards(table: ScoreTable, metric: Metric) -> list[float]:
    axes = {axis for part in metric.parts for axis in part.axes}
    found = []
    for prompt in table.prompts:
        if prompt.axis in axes:
            found += [reply.reward for name in table.arms() for reply in table.models[name].of(prompt.id) if reply.reward is not None]
    return found


def _round_step(step: float) -> float:
    """The nearest of 1, 2, 2.5 and 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= step * (1 - 1e-9))
