"""Two models on the same prompts: is there a difference, and which of three words describes it.

real        p < α (adjusted by Holm among the contrasts named as primary beforehand), and where there are several seeds,
            every seed's difference has the same sign
equivalent  the whole interval of the difference (95 %, unless `confidence` says otherwise; below 90 % it is refused) lies
            inside ± a margin set beforehand. At 95 % this is two one-sided tests at 2.5 % each, stricter than the usual 5 %
            (a 90 % interval), so that the interval shown is the one that decides. Where there are several seeds, every seed's
            difference lies inside the margin too: two that are far apart may have a mean of nothing. Fewer than ten prompts
            never suffice; for means (rewards, lengths, KL) ten must differ, since a bootstrap of almost equal values has
            hardly any width. It comes before `real`: a difference may be beyond chance and still be too small to matter
undecided   neither: then `power.py` says how many prompts it would take
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy.stats import binom

from equipoise.core.errors import UsageError
from equipoise.evaluation.intervals import Floats

Word = Literal["real", "equivalent", "undecided"]

MINIMUM = 10
"""Prompts below which no two models are called equivalent: an interval from so few is not to be trusted. For means, prompts that differ."""

_EXACT = 14  # up to so many prompts that differ, all 2^n sign patterns are counted
_CELLS = 4_000_000


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided McNemar p (1947): of the discordant prompts, is half won? No discordant prompt: 1."""
    if wins < 0 or losses < 0:
        raise UsageError(f"Counts of prompts cannot be negative: {wins}, {losses}.")
    discordant = wins + losses
    return float(min(1.0, 2 * binom.cdf(min(wins, losses), discordant, 0.5))) if discordant else 1.0


def sign_flip(samples: Sequence[Floats], weights: Sequence[float], draws: int = 20_000, seed: int = 0) -> tuple[float, bool]:
    """Two-sided p of Σ weight · mean(paired differences) under random exchange of the two models, prompt by prompt.

    Fisher's randomisation test. Returns (p, whether all sign patterns were counted); otherwise `draws` of them, and p is
    (1 + as extreme) / (1 + draws), which is never too small. No prompt that differs: 1. With differences of −1, 0 and 1 in
    one sample it is McNemar's test.
    """
    shares = np.concatenate([weight * sample / max(1, len(sample)) for sample, weight in zip(samples, weights, strict=True)])
    shares = shares[shares != 0]
    if not len(shares):
        return 1.0, True
    found = abs(float(shares.sum())) - 1e-12 * float(np.abs(shares).sum())
    if len(shares) <= _EXACT:
        patterns = 1 - 2 * ((np.arange(2 ** len(shares))[:, None] >> np.arange(len(shares))) & 1)
        return float((np.abs(patterns @ shares) >= found).mean()), True
    generator = np.random.default_rng(seed)
    extreme, step, width = 0, max(1, _CELLS // len(shares)), -(-len(shares) // 8)
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        drawn = np.frombuffer(generator.bytes(rows * width), dtype=np.uint8).reshape(rows, width)
        flipped = np.unpackbits(drawn, axis=1, count=len(shares)).astype(np.float64)
        # Σ ±share = Σ share − 2 Σ shares that are flipped
        extreme += int((np.abs(shares.sum() - 2 * (flipped @ shares)) >= found).sum())
    return (1 + extreme) / (1 + draws), False


def holm(p_values: Mapping[Any, float | None]) -> dict[Any, float | None]:
    """Holm's step-down adjustment (1979). A contrast without p still counts as one of the family, and stays None."""
    family = len(p_values)
    known = sorted((p, position, key) for position, (key, p) in enumerate(p_values.items()) if p is not None)
    adjusted: dict[Any, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, _, key) in enumerate(known):
        largest = max(largest, min(1.0, (family - rank) * p))
        adjusted[key] = largest
    return adjusted


def agree(differences: Sequence[float | None]) -> bool:
    """Whether every seed's difference has the same sign; none may be zero or missing. Fewer than two seeds: nothing to ask."""
    if len(differences) < 2:
        return True
    return all(value is not None and value > 0 for value in differences) or all(value is not None and value < 0 for value in differences)


def verdict(
    low: float | None,
    high: float | None,
    n: int,
    margin: float | None,
    p: float | None,
    alpha: float = 0.05,
    differences: Sequence[float | None] = (),
    differing: int | None = None,
    confidence: float = 0.95,
) -> tuple[Word, str]:
    """The word, and the reason for it in a sentence. low, high and margin in the same unit; p already adjusted if primary.

    differing: prompts on which the models differ, for a mean; None for rates, whose interval does not take its width from them.
    """
    if low is None or high is None or p is None:
        return "undecided", "too few prompts with both verdicts"
    doubt = "" if margin is None else _doubt(low, high, n, margin, differences, differing)
    if margin is not None and not doubt:
        beyond = " (and differs from zero beyond chance)" if p < alpha else ""
        return "equivalent", f"the {100 * confidence:g} % interval lies inside ±{margin:g}, the margin set beforehand{beyond}"
    if p >= alpha:
        return "undecided", f"p = {p:.2g} is not below {alpha:g}" + (f", and {doubt}" if doubt else "")
    if not agree(differences):
        return "undecided", f"p = {p:.2g}, but the seeds do not agree in sign"
    return "real", f"p = {p:.2g} is below {alpha:g}" + (", and every seed agrees in sign" if len(differences) > 1 else "")


def _doubt(low: float, high: float, n: int, margin: float, differences: Sequence[float | None], differing: int | None) -> str:
    """Why two models cannot be called equivalent; empty where they can."""
    if not (-margin < low and high < margin):
        return f"the interval leaves ±{margin:g}"
    if not all(value is not None and abs(value) < margin for value in differences):
        return f"not every seed lies inside ±{margin:g}"
    if n < MINIMUM:
        return f"{n} prompts are too few to call them equivalent"
    if differing is not None and differing < MINIMUM:
        few = "no prompt differs" if not differing else "only 1 prompt differs" if differing == 1 else f"only {differing} prompts differ"
        return f"{few}, too few to know the spread"
    return ""
