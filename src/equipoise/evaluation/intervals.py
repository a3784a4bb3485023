"""Estimates and their intervals: how far a figure computed on these prompts may lie from the figure on all such prompts.

Every estimate here is a weighted sum of means over prompts: a rate, a mean, CAS (the mean of two samples' rates), or a
difference of these. Prompts are the units that are sampled; several seeds are averaged per prompt beforehand.

=====================  ==========================================================================================
figure                 interval (95 % unless told otherwise)
=====================  ==========================================================================================
a rate                 Wilson's score interval (1927)
a mean                 bootstrap over prompts, BCa (Efron 1987), or Student's t: at each end, the wider of the two
a mean of rates (CAS)  stratified bootstrap, BCa; where a sample is all equal, Wilson intervals combined by MOVER
a paired difference    paired bootstrap over prompts, BCa, or Student's t: at each end, the wider of the two
of means
a paired difference    Bonett and Price (2012): Wald after adding one prompt won and one lost to each sample, so that no
of rates, or of means  discordant prompt still leaves doubt; recommended by Fagerland, Lydersen and Laake (2014)
of rates
=====================  ==========================================================================================

A bootstrap of few values is too narrow: in 4,000 simulated samples of n normal values, BCa's 95 % intervals held the mean in
51, 83, 91, 92 and 95 % at n = 2, 5, 10, 20 and 50; of exponential values in 45, 79, 87, 91 and 94 %. With Student's t as the
least reach they hold normal means in 95 %, exponential ones in 91, 88, 91 and 94 % at n = 2, 5, 10 and 20. Where four in five
of n differences are zero and the others normal, BCa holds the mean in 85, 90 and 93 % at n = 50, 100 and 200, with Student's t in
95 or 96 %; from n = 50 on that makes an interval 2 to 12 % wider. Rates do not need it: Wilson and Bonett–Price allow for few
prompts, and the stratified bootstrap of two samples of 5 to 50 verdicts held the true CAS in 93 % or more. A difference of CAS it
held in 80 to 90 % only where one sample was much the smaller or few prompts differed (10 and 100 prompts, a fifth of them
differing: 82 %; 50 and 400, one in 25: 83 %); Bonett–Price held those in 99 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtrit

from equipoise.core.errors import UsageError

Floats = NDArray[np.float64]
Interval = tuple[float, float]

_CELLS = 4_000_000  # random numbers drawn in one go: keeps memory flat at some tens of megabytes


@dataclass(frozen=True)
class Estimate:
    """A figure with its doubt.

    value, low, high: in `unit`; None where there is nothing to estimate from (n = 0), low and high also where one prompt
    says nothing about spread. n: prompts that count. missing: prompts without a verdict, never counted as zero.
    per_seed: the same figure seed by seed.
    """

    value: float | None
    unit: str
    n: int
    low: float | None
    high: float | None
    missing: int = 0
    per_seed: tuple[float | None, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data, six decimals."""
        return {
            "value": rounded(self.value),
            "unit": self.unit,
            "n": self.n,
            "low": rounded(self.low),
            "high": rounded(self.high),
            "missing": self.missing,
            "per_seed": [rounded(value) for value in self.per_seed],
        }

    def __str__(self) -> str:
        """`42.0 (29.4 to 55.8)`, or `–` where there is no figure."""
        if self.value is None:
            return "–"
        digits = 1 if self.unit == "%" else 3
        doubt = "" if self.low is None or self.high is None else f" ({self.low:.{digits}f} to {self.high:.{digits}f})"
        return f"{self.value:.{digits}f}{doubt}"


def rounded(value: float | None, digits: int = 6) -> float | None:
    """A plain float of `digits` decimals; None and NaN are None. Minus zero becomes zero."""
    return None if value is None or math.isnan(value) else round(float(value), digits) + 0.0


def present(values: ArrayLike) -> Floats:
    """The values that are there, as float64: None and NaN are left out."""
    array = np.asarray(values, dtype=np.float64)
    return array[~np.isnan(array)]


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a rate, as fractions. n = 0 gives (0, 1): nothing is known.

    `successes` may be fractional: a prompt's mean over seeds. Such a mean varies at most as much between prompts as a
    single 0-or-1 verdict of the same rate, so the interval is then on the wide side. Raises UsageError outside 0..n.
    """
    if not 0 <= successes <= n + 1e-9:
        raise UsageError(f"{successes} successes of {n} are not possible.")
    if n == 0:
        return 0.0, 1.0
    z = _z(confidence)
    rate = min(1.0, successes / n)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the formula gives exactly 0 or 1 up to rounding.
    return (0.0 if rate == 0 else max(0.0, centre - half)), (1.0 if rate == 1 else min(1.0, centre + half))


def mover(values: Sequence[float], intervals: Sequence[Interval], weights: Sequence[float]) -> Interval:
    """Interval of Σ weight · value from independent intervals, weights positive (Zou and Donner 2008)."""
    centre = sum(weight * value for weight, value in zip(weights, values, strict=True))
    below = sum((weight * (value - low)) ** 2 for weight, value, (low, _) in zip(weights, values, intervals, strict=True))
    above = sum((weight * (high - value)) ** 2 for weight, value, (_, high) in zip(weights, values, intervals, strict=True))
    return centre - math.sqrt(below), centre + math.sqrt(above)


def bonett_price(samples: Sequence[Floats], weights: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of Σ weight · mean(sample), where samples hold paired differences of rates in [-1, 1], none missing.

    One prompt at +1 and one at −1 are added to every sample before the Wald interval is taken. One sample of −1, 0 and 1
    is Bonett and Price's equation; fractional differences (several seeds) and several samples follow from it.
    """
    centre, variance = 0.0, 0.0
    for sample, weight in zip(samples, weights, strict=True):
        count = len(sample) + 2
        mean = float(sample.sum()) / count
        centre += weight * mean
        variance += weight**2 * ((float(np.square(sample).sum()) + 2) / count - mean**2) / count
    half, reach = _z(confidence) * math.sqrt(max(0.0, variance)), sum(weights)
    return max(-reach, centre - half), min(reach, centre + half)


def bootstrap(
    samples: Sequence[Floats], weights: Sequence[float] = (1.0,), confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval | None:
    """BCa interval of Σ weight · mean(sample): each sample is resampled over its own prompts. None where a sample has < 2.

    Bias correction: the share of resampled figures below the figure, ties half. Acceleration: the skewness of the
    influence values over all samples (Efron 1987; for several samples Davison and Hinkley 1997, section 5.3.2).
    Samples that are all equal give an interval of no width. The same seed gives the same interval.
    """
    if any(len(sample) < 2 for sample in samples):
        return None
    figure = sum(weight * float(sample.mean()) for sample, weight in zip(samples, weights, strict=True))
    influences = [weight * (sample - sample.mean()) / len(sample) for sample, weight in zip(samples, weights, strict=True)]
    squares = sum(float(np.square(part).sum()) for part in influences)
    if squares <= (1e-12 * max(1.0, abs(figure))) ** 2:
        return figure, figure
    drawn = _resampled(samples, weights, resamples, seed)
    acceleration = sum(float((part**3).sum()) for part in influences) / (6 * squares**1.5)
    tolerance = 1e-9 * max(1.0, abs(figure))  # sums of the same values in another order are the same figure
    below = float((drawn < figure - tolerance).mean() + 0.5 * (np.abs(drawn - figure) <= tolerance).mean())
    bias = float(ndtri(min(max(below, 0.5 / resamples), 1 - 0.5 / resamples)))
    tails = []
    for z in (-_z(confidence), _z(confidence)):
        shifted = bias + z
        tails.append(float(ndtr(bias + shifted / max(1e-9, 1 - acceleration * shifted))))
    low, high = np.quantile(drawn, tails)
    return float(low), float(high)


def about_mean(sample: Floats, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval | None:
    """Interval of a mean: at each end, the wider of BCa and Student's t. None for fewer than 2."""
    drawn = bootstrap([sample], (1.0,), confidence, resamples, seed)
    if drawn is None:
        return None
    centre, error = float(sample.mean()), float(sample.std(ddof=1)) / math.sqrt(len(sample))
    half = float(stdtrit(len(sample) - 1, 0.5 + confidence / 2)) * error
    return min(drawn[0], centre - half), max(drawn[1], centre + half)


def _resampled(samples: Sequence[Floats], weights: Sequence[float], resamples: int, seed: int) -> Floats:
    """[resamples] figures, drawn in chunks."""
    generator = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    for sample, weight in zip(samples, weights, strict=True):
        step = max(1, _CELLS // len(sample))
        for start in range(0, resamples, step):
            stop = min(resamples, start + step)
            index = generator.integers(0, len(sample), (stop - start, len(sample)), dtype=np.uint16 if len(sample) <= 65_536 else np.int64)
            drawn[start:stop] += weight * sample[index].mean(axis=1)
    return drawn


def rate(values: ArrayLike, unit: str = "%", confidence: float = 0.95) -> Estimate:
    """The mean of values in [0, 1] (NaN or None: missing), in percent for unit `%`, with Wilson's interval."""
    array = np.asarray(values, dtype=np.float64)
    known = present(array)
    missing, scale = len(array) - len(known), 100.0 if unit == "%" else 1.0
    if not len(known):
        return Estimate(None, unit, 0, None, None, missing)
    low, high = wilson(float(known.sum()), len(known), confidence)
    return Estimate(scale * float(known.mean()), unit, len(known), scale * low, scale * high, missing)


def mean(values: ArrayLike, unit: str, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """The mean of values (NaN or None: missing) with its interval over prompts."""
    array = np.asarray(values, dtype=np.float64)
    known = present(array)
    missing = len(array) - len(known)
    if not len(known):
        return Estimate(None, unit, 0, None, None, missing)
    low, high = about_mean(known, confidence, resamples, seed) or (None, None)
    return Estimate(float(known.mean()), unit, len(known), low, high, missing)


def mean_of_rates(
    samples: Sequence[ArrayLike],
    weights: Sequence[float],
    unit: str = "%",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Σ weight · rate over samples in [0, 1], as CAS is; None where one sample is empty (a mean of one is not CAS).

    Stratified bootstrap, BCa; where a sample has one value only, resampling it shows no doubt, so MOVER is used.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    known = [present(array) for array in arrays]
    missing = sum(len(array) for array in arrays) - sum(len(sample) for sample in known)
    n, scale = sum(len(sample) for sample in known), 100.0 if unit == "%" else 1.0
    if any(not len(sample) for sample in known):
        return Estimate(None, unit, n, None, None, missing)
    rates = [float(sample.mean()) for sample in known]
    drawn = None if any(np.ptp(sample) == 0 for sample in known) else bootstrap(known, weights, confidence, resamples, seed)
    parts = [wilson(float(sample.sum()), len(sample), confidence) for sample in known]
    low, high = drawn or mover(rates, parts, weights)
    value = sum(weight * part for weight, part in zip(weights, rates, strict=True))
    return Estimate(scale * value, unit, n, scale * low, scale * high, missing)


def per_seed(samples: Sequence[NDArray[np.float64]], combine: Callable[[Sequence[Floats]], float | None]) -> tuple[float | None, ...]:
    """`combine` applied to each seed's samples; samples are [seeds, prompts] arrays."""
    return tuple(combine([present(sample[seed]) for sample in samples]) for seed in range(samples[0].shape[0]))


def _z(confidence: float) -> float:
    """The two-sided normal quantile. Raises UsageError outside (0, 1)."""
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, found {confidence}.")
    return float(ndtri(0.5 + confidence / 2))
