"""Two models on one metric: the paired difference, its interval, its p-value, and the word for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.evaluation.intervals import Estimate, Floats, about_mean, bonett_price, present, rate, rounded
from equipoise.evaluation.metrics._base import Metric, preferred
from equipoise.evaluation.paired import Word, holm, mcnemar, sign_flip, verdict
from equipoise.evaluation.power import needed_mean, needed_rate
from equipoise.evaluation.scores import ModelReplies, ScoreTable, over_seeds
from equipoise.evaluation.settings import EvaluateSettings

_SAME = 1e-5  # so little a reward may change by rounding, in a batch of another shape


@dataclass(frozen=True)
class Comparison:
    """`a` minus `b` on one metric, paired by prompt.

    n: prompts with a value of both. missing: prompts without. difference, low, high, margin in `unit`. noise: standard
    error of the difference times √n, in `unit`: what one prompt adds. discordance: share of prompts that differ, where the
    test is McNemar's. differing: how many prompts differ, for means. by_seed: the difference seed by seed, where there are several.
    """

    a: str
    b: str
    metric: str
    unit: str
    primary: bool = False
    n: int = 0
    missing: int = 0
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    test: str = ""
    margin: float | None = None
    by_seed: tuple[float | None, ...] = ()
    prob_a_better: Estimate | None = None
    noise: float | None = None
    discordance: float | None = None
    differing: int | None = None
    verdict: Word = "undecided"
    reason: str = "no prompt has a verdict of both"
    n_needed: int | None = field(default=None)

    def as_json(self) -> dict[str, Any]:
        """One entry of `comparisons` in evaluation.json."""
        better = self.prob_a_better
        figures = ("difference", "low", "high", "margin")
        return {
            **{name: getattr(self, name) for name in ("a", "b", "metric", "primary", "n", "missing", "unit")},
            **{name: rounded(getattr(self, name)) for name in figures},
            **{name: None if (p := getattr(self, name)) is None else float(f"{p:.6g}") for name in ("p", "p_holm")},
            "per_seed": [rounded(value) for value in self.by_seed],
            **{name: getattr(self, name) for name in ("test", "verdict", "reason", "n_needed")},
            "prob_a_better": better and {name: rounded(getattr(better, name)) for name in ("value", "low", "high")},
        }


def compare(table: ScoreTable, name: str, metric: Metric, a: str, b: str, settings: EvaluateSettings, primary: bool = False) -> Comparison:
    """The difference of two models on a metric, not yet a verdict. A model that is not in the table leaves all of it missing."""
    margin = settings.margins.get(name, settings.rate_margin if metric.kind == "rate" else None)
    empty = Comparison(a, b, name, metric.difference_unit, primary, margin=margin)
    absent = [model for model in (a, b) if model not in table.models]
    if absent:
        return replace(empty, reason=f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not among the models evaluated")
    values_a, values_b = table.values(metric, a), table.values(metric, b)
    all_pairs = [over_seeds(left) - over_seeds(right) for left, right in zip(values_a, values_b, strict=True)]
    samples, weights = [present(part) for part in all_pairs], [part.weight for part in metric.parts]
    n = sum(len(sample) for sample in samples)
    counted = replace(empty, n=n, missing=sum(len(part) for part in all_pairs) - n)
    if any(not len(sample) for sample in samples):
        return counted
    low, high, by_interval = _interval(metric, samples, weights, settings)
    p, by_test, discordance = _test(metric, samples, weights, settings)
    scale = metric.scale
    variance = sum(
        weight**2 * float(sample.var(ddof=1)) / len(sample) for sample, weight in zip(samples, weights, strict=True) if len(sample) > 1
    )
    return replace(
        counted,
        difference=scale * _figure(samples, weights),
        low=None if low is None else scale * low,
        high=None if high is None else scale * high,
        p=p,
        test=f"{by_test}; {by_interval}",
        by_seed=_by_seed(metric, table.models[a], table.models[b], values_a, values_b),
        prob_a_better=_prob_a_better(table, metric, a, b, ~np.isnan(all_pairs[0]), settings.confidence) if metric.preference else None,
        noise=scale * math.sqrt(variance * n),
        discordance=discordance,
        differing=None if metric.kind == "rate" else sum(int((np.abs(sample) > _SAME).sum()) for sample in samples),
    )


def decide(comparisons: Iterable[Comparison], settings: EvaluateSettings) -> list[Comparison]:
    """Give every comparison its word: primary ones by Holm's p over all primary ones, the rest (exploratory) by their own."""
    comparisons = list(comparisons)
    adjusted = holm({index: item.p for index, item in enumerate(comparisons) if item.primary})
    return [_decided(replace(item, p_holm=adjusted.get(index)), settings) for index, item in enumerate(comparisons)]


def _decided(item: Comparison, settings: EvaluateSettings) -> Comparison:
    if item.difference is None or item.p is None:
        return item
    p = item.p if item.p_holm is None else item.p_holm
    word, reason = verdict(item.low, item.high, item.n, item.margin, p, settings.alpha, item.by_seed, item.differing, settings.confidence)
    # More prompts do not make seeds agree, so only a p that is too large asks for them.
    needed = _needed(item, settings) if word == "undecided" and p >= settings.alpha else None
    return replace(item, verdict=word, reason=reason, n_needed=needed)


def _needed(item: Comparison, settings: EvaluateSettings) -> int | None:
    """Prompts it would take if the true difference and noise were as found, at the level this contrast had to meet."""
    assert item.difference is not None
    if not item.difference or not item.noise:
        return None
    alpha = settings.alpha if item.p_holm is None or not item.p else settings.alpha * min(1.0, item.p / item.p_holm)
    if item.discordance is not None:
        needed = needed_rate(item.difference / 100, item.discordance, alpha, settings.power)
    else:
        needed = needed_mean(item.difference, item.noise, alpha, settings.power)
    return None if needed is None else max(item.n + 1, needed)


def _figure(samples: Sequence[Floats], weights: Sequence[float]) -> float:
    return sum(weight * float(sample.mean()) for sample, weight in zip(samples, weights, strict=True))


def _interval(
    metric: Metric, samples: Sequence[Floats], weights: Sequence[float], settings: EvaluateSettings
) -> tuple[float | None, float | None, str]:
    if metric.kind == "rate":
        return *bonett_price(samples, weights, settings.confidence), "Bonett-Price interval"
    (sample,) = samples  # no mean has several parts
    low, high = about_mean(sample, settings.confidence, settings.resamples, settings.seed) or (None, None)
    return low, high, "paired bootstrap (BCa), no narrower than Student's t"


def _test(
    metric: Metric, samples: Sequence[Floats], weights: Sequence[float], settings: EvaluateSettings
) -> tuple[float, str, float | None]:
    """(p, the test's name, discordance for McNemar's)."""
    if metric.kind == "rate" and len(samples) == 1 and np.isin(samples[0], (-1.0, 0.0, 1.0)).all():
        wins, losses = int((samples[0] > 0).sum()), int((samples[0] < 0).sum())
        return mcnemar(wins, losses), f"exact McNemar ({wins} to {losses})", (wins + losses) / len(samples[0])
    p, exact = sign_flip(samples, weights, settings.flips, settings.seed)
    return p, "sign-flip (all patterns)" if exact else f"sign-flip ({settings.flips:,} draws)", None


def _by_seed(
    metric: Metric, a: ModelReplies, b: ModelReplies, values_a: Sequence[Floats], values_b: Sequence[Floats]
) -> tuple[float | None, ...]:
    """The difference under every seed either model has; a model without that seed stands in with its mean over seeds."""
    seeds = sorted({*a.seeds, *b.seeds})
    if len(seeds) < 2 or max(len(a.seeds), len(b.seeds)) < 2:
        return ()

    def row(model: ModelReplies, values: Floats, seed: int) -> Floats:
        return values[model.seeds.index(seed)] if seed in model.seeds else over_seeds(values)

    found: list[float | None] = []
    for seed in seeds:
        samples = [present(row(a, left, seed) - row(b, right, seed)) for left, right in zip(values_a, values_b, strict=True)]
        whole = all(len(sample) for sample in samples)
        found.append(metric.scale * _figure(samples, [part.weight for part in metric.parts]) if whole else None)
    return tuple(found)


def _prob_a_better(table: ScoreTable, metric: Metric, a: str, b: str, counts: NDArray[np.bool_], confidence: float) -> Estimate:
    """P(A better than B) by reward, ties half, averaged over the seeds of a prompt; Wilson's interval over the prompts that count.

    counts: prompts whose difference is known. An invalid reply loses without a verdict too, but not beside figures of other prompts.
    """
    values = []
    for pairs in compress(table.pairs(metric.parts[0].axes, a, b), counts):
        outcomes = [outcome for outcome in (preferred(left, right, table.passing) for left, right in pairs) if outcome is not None]
        values.append(sum(outcomes) / len(outcomes))
    return rate(values, unit="", confidence=confidence)


def median_noise(comparisons: Iterable[Comparison], metric: str) -> Mapping[str, float]:
    """The middle `noise` and `discordance` of a metric's comparisons, where there are any, and their middle `n`."""
    rows = [item for item in comparisons if item.metric == metric and (item.noise or item.discordance)]
    found = {name: [value for item in rows if (value := getattr(item, name))] for name in ("noise", "discordance", "n")}
    return {name: float(np.median(values)) for name, values in found.items() if values}
