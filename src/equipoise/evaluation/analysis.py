"""From judged replies to `evaluation.json`: estimates, comparisons, sweeps, flags and warnings. Suites only read files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from equipoise.core.errors import UsageError, nearest
from equipoise.data.prompts import AXES
from equipoise.evaluation import sweep as sweeps
from equipoise.evaluation.comparisons import Comparison, compare, decide, median_noise
from equipoise.evaluation.independence import Independence
from equipoise.evaluation.intervals import Estimate, Floats, mean, mean_of_rates, per_seed, rate
from equipoise.evaluation.metrics._base import Metric, metrics
from equipoise.evaluation.power import detectable
from equipoise.evaluation.scores import ScoreTable, over_seeds
from equipoise.evaluation.settings import Contrast, EvaluateSettings

THRESHOLD_JUDGE = "reward-model-deberta-v3-large-v2"
"""The judge for which the default thresholds of HmR and HpR were chosen."""


@dataclass(frozen=True)
class Source:
    """What a suite read: the table, what was decided beforehand, the judge, and anything its reader must be told.

    metrics: the metrics the files can answer; None: every one that has a value.
    """

    table: ScoreTable
    independence: Independence
    primary: tuple[Contrast, ...] = ()
    judge: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    metrics: tuple[str, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def analyse(source: Source, settings: EvaluateSettings) -> dict[str, Any]:
    """Everything of `evaluation.json` but the suite's name. Raises UsageError for metrics or models that do not exist."""
    table = source.table
    _check_names(source, settings)
    asked = {name: metric for name, metric in metrics().items() if source.metrics is None or name in source.metrics}
    estimates = {name: {model: estimate(table, metric, model, settings) for model in table.models} for name, metric in asked.items()}
    shown = {name: metric for name, metric in asked.items() if any(item.n for item in estimates[name].values())}
    compared = comparisons(source, shown, settings)
    swept = {name: sweeps.sweep(table, metric, settings.sweep_points) for name, metric in shown.items() if metric.threshold}
    flags = {name: flag(metric, estimates[name], table) for name, metric in shown.items()}
    return {
        "schema_version": 1,
        "baseline": table.baseline,
        "confidence": settings.confidence,
        "headline": None if source.independence.withheld else _headline(compared, shown, table),
        "metrics": {name: _described(metric, flags[name], table) for name, metric in shown.items()},
        "models": {
            name: {"kind": model.kind, "seeds": list(model.seeds), "estimates": {key: estimates[key][name].as_json() for key in shown}}
            for name, model in table.models.items()
        },
        "comparisons": [item.as_json() for item in compared],
        "detectable": _detectable(shown, table, compared, settings),
        "sweep": {name: rows for name, rows in swept.items() if rows},
        "judge": dict(source.judge),
        "independence": source.independence.as_json(),
        "warnings": [*source.independence.warnings(), *source.warnings, *_warnings(source, shown, estimates, swept, settings.alpha)],
        **source.extra,
    }


def estimate(table: ScoreTable, metric: Metric, model: str, settings: EvaluateSettings) -> Estimate:
    """One model's figure on one metric: the mean over seeds per prompt, its interval over prompts, and every seed's own figure."""
    values = table.values(metric, model)
    if metric.against_baseline and model == table.baseline:
        return Estimate(None, metric.unit, 0, None, None)
    samples, weights = [over_seeds(part) for part in values], [part.weight for part in metric.parts]

    def figure(parts: Sequence[Floats]) -> float | None:
        if any(not len(part) for part in parts):
            return None
        return metric.scale * sum(weight * float(part.mean()) for weight, part in zip(weights, parts, strict=True))

    if len(samples) > 1:
        found = mean_of_rates(samples, weights, metric.unit, settings.confidence, settings.resamples, settings.seed)
    elif metric.kind == "rate":
        found = rate(samples[0], metric.unit, settings.confidence)
    else:
        found = mean(samples[0], metric.unit, settings.confidence, settings.resamples, settings.seed)
    return Estimate(found.value, found.unit, found.n, found.low, found.high, found.missing, per_seed(values, figure))


def comparisons(source: Source, shown: Mapping[str, Metric], settings: EvaluateSettings) -> list[Comparison]:
    """The primary contrasts, as they were named, then every other pair of arms on every metric (the later minus the earlier one)."""
    table = source.table
    chosen = source.primary if settings.primary is None else settings.primary
    rows = [compare(table, item.metric, metrics()[item.metric], item.a, item.b, settings, primary=True) for item in chosen]
    named = {(frozenset((item.a, item.b)), item.metric) for item in chosen}
    for name, metric in shown.items():
        arms = [arm for arm in table.arms() if not (metric.against_baseline and arm == table.baseline)]
        # The baseline comes first, so that it is what others are compared with.
        arms.sort(key=lambda arm: arm != table.baseline)
        pairs = [(b, a) for a, b in combinations(arms, 2) if (frozenset((a, b)), name) not in named]
        rows += [compare(table, name, metric, a, b, settings) for a, b in pairs]
    return decide(rows, settings)


def flag(metric: Metric, estimates: Mapping[str, Estimate], table: ScoreTable) -> str:
    """Why a metric cannot be taken at its word: a null policy does as well as the best arm, or better. Empty: none does."""
    if metric.better == "none":
        return ""
    sign = 1 if metric.better == "higher" else -1
    known = {name: item.value for name, item in estimates.items() if item.value is not None}
    arms = {name: value for name, value in known.items() if table.models[name].kind == "arm"}
    nulls = {name: value for name, value in known.items() if table.models[name].kind == "null"}
    if not arms or not nulls:
        return ""
    best = max(arms, key=lambda name: sign * arms[name])
    winners = [name for name, value in nulls.items() if sign * value >= sign * arms[best] - 1e-9]
    if not winners:
        return ""
    listed = ", ".join(f"{name} ({nulls[name]:.4g} {metric.unit})" for name in winners)
    verb = "does" if len(winners) == 1 else "do"
    return f"{listed} {verb} as well as the best arm, {best} ({arms[best]:.4g} {metric.unit}), or better, without being of use"


def _described(metric: Metric, reason: str, table: ScoreTable) -> dict[str, Any]:
    entry = metric.as_json() | {"flagged": bool(reason), "flag_reason": reason}
    return entry | ({"threshold": getattr(table.passing, metric.threshold)} if metric.threshold else {})


def _headline(compared: Sequence[Comparison], shown: Mapping[str, Metric], table: ScoreTable) -> list[dict[str, Any]]:
    """The primary contrasts, or, where none was named, every arm against the baseline on the headline metrics."""
    rows = [item for item in compared if item.primary]
    if not rows:
        rows = [item for item in compared if item.b == table.baseline and item.metric in shown and shown[item.metric].role == "headline"]
    names = ("a", "b", "metric", "difference", "low", "high", "unit", "p", "p_holm", "prob_a_better", "primary", "verdict", "n_needed")
    return [{name: item.as_json()[name] for name in names} for item in rows]


def _detectable(
    shown: Mapping[str, Metric], table: ScoreTable, compared: Sequence[Comparison], settings: EvaluateSettings
) -> list[dict[str, Any]]:
    """The smallest detectable difference of every metric, with the noise found in its comparisons; of a primary one at Holm's level."""
    primary = [item.metric for item in compared if item.primary]
    counts = {axis: table.count((axis,)) for axis in AXES}
    rows = [
        detectable(
            name, metric, counts, settings.alpha, settings.power, median_noise(compared, name), len(primary) if name in primary else 1
        )
        for name, metric in shown.items()
    ]
    return [row for row in rows if row is not None]


def _warnings(
    source: Source,
    shown: Mapping[str, Metric],
    estimates: Mapping[str, Mapping[str, Estimate]],
    swept: Mapping[str, list[sweeps.Row]],
    alpha: float,
) -> list[str]:
    table, found = source.table, []
    for name, metric in shown.items():
        # Of the baseline and of null policies nobody asks everything: the base has no divergence from itself.
        asked = [model for model in table.arms() if model != table.baseline]
        gaps = {model: item for model, item in estimates[name].items() if item.missing and (item.n or model in asked)}
        lacking = [f"{model} {item.missing}" for model, item in gaps.items()]
        if lacking:
            found.append(f"{metric.title}: prompts without a verdict, left out of the figure: {', '.join(lacking)}.")
        if swept.get(name):
            used = float(getattr(table.passing, str(metric.threshold)))
            found += sweeps.rank_changes(swept[name], used, table.arms(), metric.title)
    if swept and THRESHOLD_JUDGE not in f"{source.judge.get('name')} {source.judge.get('weights')}":
        limits = f"{table.passing.harmful_threshold:g} and {table.passing.helpful_threshold:g}"
        found.append(
            f"HmR, HpR and CAS: the thresholds {limits} were chosen for {THRESHOLD_JUDGE}; on another judge's scale they mean little."
        )
    if table.baseline is None:
        found.append("There is no baseline among these models: no win rate is given, and no headline but the contrasts named beforehand.")
    if not any(model.kind == "null" for model in table.models.values()):
        found.append("No null policy (always refuse, echo, empty, a random reply) stands in this table, so no metric could be flagged.")
    if not table.passing.reproduction:
        found += _unchecked(table)
    return found + _few_seeds(table, alpha) + _uneven(table, shown)


def _few_seeds(table: ScoreTable, alpha: float) -> list[str]:
    """That seeds too few for a sign test of their own leave a difference to chance, which no p over prompts counts."""
    seeds = max((len(table.models[name].seeds) for name in table.arms()), default=0)
    chance = 2.0 ** (1 - seeds)
    if seeds == 1:
        return ["One seed per arm: a difference found here is one of these trained models; another seed may turn it around."]
    if seeds and chance >= alpha:
        return [
            f"{seeds} seeds per arm: intervals and p-values are over prompts, not over seeds. Where nothing but its seeds sets an arm "
            f"apart, all {seeds} agree in sign in {100 * chance:.3g} % of comparisons."
        ]
    return []


def _unchecked(table: ScoreTable) -> list[str]:
    counts = {
        name: sum(reply.invalid is None and not reply.is_invalid for replies in model.replies for reply in replies.values())
        for name, model in table.models.items()
    }
    listed = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    return [f"Replies nobody checked for being invalid, taken as valid: {listed}."] if listed else []


def _uneven(table: ScoreTable, shown: Mapping[str, Metric]) -> list[str]:
    """Prompts for which some seeds have a verdict and others none: their mean is over fewer seeds."""
    found = []
    for metric in shown.values():
        for model in table.models:
            partly = 0
            for values in table.values(metric, model):
                known = (values == values).sum(axis=0)
                partly += int(((known > 0) & (known < values.shape[0])).sum())
            if partly:
                found.append(f"{metric.title}: {partly} prompts of {model} have a verdict under some seeds only; their mean is over those.")
    return found


def _check_names(source: Source, settings: EvaluateSettings) -> None:
    known = metrics()
    chosen = source.primary if settings.primary is None else settings.primary
    for name in [*settings.margins, *(item.metric for item in chosen)]:
        if name not in known:
            raise UsageError(f"There is no metric named {name!r}.{nearest(name, known)}")
    models = [source.table.baseline] if source.table.baseline else []
    models += [name for item in settings.primary or () for name in (item.a, item.b)]
    for name in models:
        if name not in source.table.models:
            raise UsageError(f"There is no model named {name!r} in {settings.source}.{nearest(name, source.table.models)}")


def replies_of(table: ScoreTable) -> list[dict[str, Any]]:
    """The lines of `replies.jsonl`: every prompt with the replies of all models side by side (first seed)."""
    rows = []
    for prompt in table.prompts:
        replies = {}
        for name, model in table.models.items():
            reply = model.replies[0].get(prompt.id)
            if reply is not None:
                replies[name] = {"text": reply.text, "reward": reply.reward, "invalid": reply.is_invalid, "refusal": reply.refusal}
        turns = [message.as_dict() for message in prompt.messages]
        rows.append({"id": prompt.id, "prompt": turns, "axis": prompt.axis, "topic": prompt.topic, "replies": replies})
    return rows
