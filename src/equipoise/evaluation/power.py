"""How much a comparison can see: the smallest detectable difference before a run, the prompts it would take after one.

Two-sided tests at α with the given power, paired by prompt. For rates, the power of the exact McNemar test is computed in
full for a given *discordance*, the share of prompts on which the two models differ; for means, by the normal
approximation for a given standard deviation of the per-prompt difference. Differences of rates are fractions here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy.special import ndtri
from scipy.stats import binom

from equipoise.core.errors import UsageError
from equipoise.evaluation.intervals import rounded
from equipoise.evaluation.metrics._base import Metric, metrics

DISCORDANCE = 0.5
"""Assumed before a run: two models whose 0-or-1 verdicts on a prompt are unrelated coin flips differ on half of the prompts."""

_LARGE = 20_000  # from so many prompts on the exact power and its approximation are the same to the third digit


def mcnemar_power(n: int, difference: float, discordance: float = DISCORDANCE, alpha: float = 0.05) -> float:
    """Probability that the exact McNemar test on n prompts finds a true `difference` of rates. Raises UsageError out of range."""
    _check(alpha=alpha)
    if not 0 < discordance <= 1 or abs(difference) > discordance + 1e-12:
        raise UsageError(f"A difference of {difference:g} needs a discordance between it and 1, found {discordance:g}.")
    if n < 1:
        return 0.0
    share = min(1.0, (1 + abs(difference) / discordance) / 2)
    spread = 7 * math.sqrt(n * discordance * (1 - discordance)) + 7
    counts = np.arange(max(1, math.floor(n * discordance - spread)), min(n, math.ceil(n * discordance + spread)) + 1)
    # The largest number of losses (or wins) that still rejects, for every number of discordant prompts; −1: none does.
    critical = binom.ppf(alpha / 2, counts, 0.5)
    critical = np.where(binom.cdf(critical, counts, 0.5) * 2 <= alpha + 1e-12, critical, critical - 1)
    rejects = binom.cdf(critical, counts, share) + binom.sf(counts - critical - 1, counts, share)
    return float(np.sum(binom.pmf(counts, n, discordance) * rejects))


def detectable_rate(n: int, discordance: float = DISCORDANCE, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest difference of rates (a fraction) that n prompts detect; None where even all discordant prompts on one side would not."""
    _check(alpha=alpha, power=power)
    if mcnemar_power(n, discordance, discordance, alpha) < power:
        return None
    low, high = 0.0, discordance
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if mcnemar_power(n, middle, discordance, alpha) >= power else (middle, high)
    return high


def detectable_mean(n: int, deviation: float = 1.0, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest mean difference that n prompts detect, in units of `deviation` (1: standard deviations). None for n < 2."""
    _check(alpha=alpha, power=power)
    return _quantiles(alpha, power) * deviation / math.sqrt(n) if n >= 2 else None


def needed_rate(difference: float, discordance: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Prompts it takes to detect a difference of rates, with that share of discordant prompts. None for no difference.

    Starts from Connor's formula (1987) and walks to the first n with the exact power.
    """
    _check(alpha=alpha, power=power)
    size = min(abs(difference), discordance)
    if size == 0:
        return None
    z_alpha, z_power = float(ndtri(1 - alpha / 2)), float(ndtri(power))
    guess = ((z_alpha * math.sqrt(discordance) + z_power * math.sqrt(max(0.0, discordance - size**2))) / size) ** 2
    if guess > _LARGE:
        return math.ceil(guess)
    low, high = 1, max(8, math.ceil(guess))
    while mcnemar_power(high, size, discordance, alpha) < power:
        low, high = high, math.ceil(high * 1.2) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if mcnemar_power(middle, size, discordance, alpha) >= power else (middle, high)
    return high


def needed_mean(difference: float, deviation: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Prompts it takes to detect a mean difference when per-prompt differences have that standard deviation. None for no difference."""
    _check(alpha=alpha, power=power)
    if difference == 0:
        return None
    return max(2, math.ceil((_quantiles(alpha, power) * deviation / difference) ** 2))


def detectable(
    name: str,
    metric: Metric,
    counts: Mapping[str, int],
    alpha: float = 0.05,
    power: float = 0.8,
    noise: Mapping[str, float] | None = None,
    family: int = 1,
) -> dict[str, Any] | None:
    """One entry of `detectable`: the smallest difference of a metric that `counts` (axis → prompts) can show, and what that assumes.

    noise: `noise`, `discordance` and `n` (prompts that have both verdicts; else all count) as `comparisons.median_noise` finds them
    after a run. Without it (before a run) rates are taken to differ on half of the prompts, and means are given in standard
    deviations of the per-prompt difference. family: contrasts that share α; the first that Holm looks at has to meet α ÷ family.
    None where the prompts are too few for any difference.
    """
    sizes = [sum(counts.get(axis, 0) for axis in part.axes) for part in metric.parts]
    if min(sizes) < 2:
        return None
    alpha, found = alpha / family, dict(noise or {})
    n = round(found.get("n", sum(sizes)))
    unit = metric.difference_unit
    if metric.kind == "rate" and len(sizes) == 1 and (not found or "discordance" in found):
        discordance = found.get("discordance", DISCORDANCE)
        fraction = detectable_rate(n, discordance, alpha, power)
        difference = None if fraction is None else 100 * fraction
        assumes = f"{'assumed' if not found else 'as found,'} the models differ on {100 * discordance:.0f} % of the prompts"
    elif "noise" in found:
        difference = detectable_mean(n, found["noise"], alpha, power)
        assumes = f"as found, a standard deviation of {found['noise']:.3g} a prompt"
    elif metric.kind == "rate":
        spread = math.sqrt(sum(part.weight**2 * DISCORDANCE / size for part, size in zip(metric.parts, sizes, strict=True)))
        difference = 100 * _quantiles(alpha, power) * spread
        assumes = f"assumed the models differ on {100 * DISCORDANCE:.0f} % of the prompts of each sample"
    else:
        difference, unit = detectable_mean(n, 1.0, alpha, power), "standard deviations"
        assumes = "in standard deviations of the per-prompt difference, which is not known before"
    if difference is None:
        return None
    if family > 1:
        assumes += f"; at p < {alpha:.2g}, the level Holm asks of the first of {family} contrasts"
    return {"metric": name, "title": metric.title, "n": n, "difference": rounded(difference, 4), "unit": unit, "assumes": assumes}


def detectable_differences(
    counts: Mapping[str, int], alpha: float = 0.05, power: float = 0.8, names: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """What metrics could show, before anything is run. counts: axis (helpful, harmful, benign) → prompts; names: None is all."""
    asked = set(metrics()) if names is None else set(names)
    rows = [detectable(name, metric, counts, alpha, power) for name, metric in metrics().items() if name in asked]
    return [row for row in rows if row is not None]


def _quantiles(alpha: float, power: float) -> float:
    return float(ndtri(1 - alpha / 2) + ndtri(power))


def _check(alpha: float, power: float = 0.8) -> None:
    if not 0 < alpha < 1 or not 0 < power < 1:
        raise UsageError(f"alpha and power must lie between 0 and 1, found {alpha:g} and {power:g}.")
