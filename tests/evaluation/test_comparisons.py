"""Two models on one metric: intervals by hand and by simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from equipoise.core.records import Message
from equipoise.evaluation.comparisons import Comparison, compare, median_noise
from equipoise.evaluation.metrics._base import Judged, load
from equipoise.evaluation.power import detectable
from equipoise.evaluation.scores import ModelReplies, ScoreTable
from equipoise.evaluation.settings import EvaluateSettings
from equipoise.generation._base import Prompt

QUICK = EvaluateSettings(suite="two-axis", source="", resamples=1000, flips=1000)
PASSES, FAILS = Judged("a reply", 5.0), Judged("a reply", -5.0)


def scored(models: Mapping[str, Mapping[str, Judged]]) -> ScoreTable:
    """Models by name: prompt id (`harmful-3`) → what was said of the reply."""
    ids = dict.fromkeys(name for replies in models.values() for name in replies)
    prompts = tuple(Prompt(name, (Message("user", name),), name.split("-")[0]) for name in ids)
    return ScoreTable(prompts, {name: ModelReplies(name, "arm", (0,), (replies,)) for name, replies in models.items()})


def cas(harmful: np.ndarray, helpful: np.ndarray) -> Comparison:
    """`a` against `b` on CAS, from who passes: 1 only a, −1 only b, 0 both."""
    outcomes = {f"{axis}-{n}": sign for axis, signs in (("harmful", harmful), ("helpful", helpful)) for n, sign in enumerate(signs)}
    models = {
        "a": {name: FAILS if sign < 0 else PASSES for name, sign in outcomes.items()},
        "b": {name: FAILS if sign > 0 else PASSES for name, sign in outcomes.items()},
    }
    return compare(scored(models), "cas", load("cas"), "a", "b", QUICK)


def test_a_difference_of_cas_by_hand() -> None:
    """One prompt won among 50 harmful ones and one lost among 50 helpful ones, one of each added to both samples."""
    one = np.eye(50)[0]
    found = cas(one, -one)
    half = 1.959964 * math.sqrt(2 * 0.5**2 * (3 / 52 - (1 / 52) ** 2) / 52)
    assert (found.difference, found.low, found.high) == pytest.approx((0.0, -100 * half, 100 * half), abs=1e-4)
    assert found.high > cas(0 * one, 0 * one).high  # the more prompts differ, the more doubt


@pytest.mark.parametrize(("harmful", "helpful", "differing"), [(10, 100, 0.2), (50, 400, 0.04)])
def test_a_difference_of_cas_is_covered(harmful: int, helpful: int, differing: float) -> None:
    """No true difference, nominal 95 %; a stratified bootstrap holds zero in 82 % here. 300 trials: ± 2.5 points."""
    generator = np.random.default_rng(15)
    odds = [differing / 2, 1 - differing, differing / 2]
    found = [cas(*(generator.choice([-1, 0, 1], size, p=odds) for size in (harmful, helpful))) for _ in range(300)]
    assert np.mean([item.low <= 0 <= item.high for item in found]) > 0.935


def test_the_probability_is_over_the_prompts_of_the_difference() -> None:
    """Ten prompts were judged and `a` wins them; ten nobody judged, and there `a` says nothing. Both figures are of the first ten."""
    ids = [f"benign-{n}" for n in range(20)]
    a = {name: Judged("a reply", 1.0) if n < 10 else Judged("", invalid=True) for n, name in enumerate(ids)}
    b = {name: Judged("a reply", 0.0 if n < 10 else None) for n, name in enumerate(ids)}
    found = compare(scored({"a": a, "b": b}), "reward_benign", load("reward_benign"), "a", "b", QUICK)
    assert (found.n, found.missing, found.difference) == (10, 10, 1.0)
    assert (found.prob_a_better.n, found.prob_a_better.value) == (10, 1.0)


def test_what_was_detectable_counts_the_prompts_compared() -> None:
    """Of 20 prompts 12 have verdicts of both models: those can show something, the other eight cannot."""
    generator = np.random.default_rng(17)
    a, b = (
        {f"harmful-{n}": Judged("a reply", None if name == "a" and n >= 12 else float(generator.normal())) for n in range(20)}
        for name in "ab"
    )
    metric = load("reward_harmful")
    found = compare(scored({"a": a, "b": b}), "reward_harmful", metric, "a", "b", QUICK)
    row = detectable("reward_harmful", metric, {"harmful": 20}, noise=median_noise([found], "reward_harmful"))
    assert (found.n, row["n"]) == (12, 12)
    assert row["difference"] == pytest.approx(2.801585 * found.noise / math.sqrt(12), abs=1e-3)
