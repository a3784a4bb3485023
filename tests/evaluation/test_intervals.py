"""Intervals against scipy, published figures, arithmetic by hand, and simulated data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from equipoise.core.errors import UsageError
from equipoise.evaluation.intervals import (
    Estimate,
    about_mean,
    bonett_price,
    bootstrap,
    mean,
    mean_of_rates,
    mover,
    present,
    rate,
    wilson,
)

NAN = float("nan")


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(counts: tuple[int, int], confidence: float) -> None:
    successes, n = counts
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_at_the_extremes() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 50)[0] == 0.0
    assert wilson(50, 50)[1] == 1.0
    # n = 1: z² / (1 + z²) with z = 1.959964
    assert wilson(0, 1) == (0.0, pytest.approx(3.841459 / 4.841459))
    for wrong in ((-1, 5), (6, 5), (1, 0)):
        with pytest.raises(UsageError):
            wilson(*wrong)


@pytest.mark.parametrize("confidence", [0.0, 1.0, NAN])
def test_confidence_out_of_range(confidence: float) -> None:
    with pytest.raises(UsageError, match="confidence"):
        wilson(1, 2, confidence)


def test_rate_leaves_missing_out_and_never_counts_it_as_zero() -> None:
    found = rate([1, 0, None, NAN, 1, 1], "%")
    assert (found.value, found.n, found.missing) == (75.0, 4, 2)
    assert (found.low, found.high) == pytest.approx(tuple(100 * side for side in wilson(3, 4)))


@pytest.mark.parametrize("values", [[], [None, NAN]])
def test_nothing_to_estimate_from(values: list[float | None]) -> None:
    for found in (rate(values, "%"), mean(values, "reward"), mean_of_rates([values, [1.0]], (0.5, 0.5))):
        assert (found.value, found.low, found.high, found.missing) == (None, None, None, len(values))
    assert str(rate(values, "%")) == "–"


def test_one_value_has_no_spread() -> None:
    found = mean([2.5], "reward")
    assert (found.value, found.n, found.low, found.high) == (2.5, 1, None, None)
    assert bootstrap([np.asarray([1.0])]) is None


def test_all_equal_values_give_an_interval_of_no_width_for_means_but_not_for_rates() -> None:
    found = mean([2.0] * 20, "reward")
    assert (found.low, found.high) == (2.0, 2.0)
    assert rate([0.0] * 50, "%").high == pytest.approx(7.13, abs=0.01)


def test_json_is_plain_and_rounded() -> None:
    assert Estimate(42.0000000004, "%", 50, -0.0, None, 1, (41.0, None)).as_json() == {
        "value": 42.0,
        "unit": "%",
        "n": 50,
        "low": 0.0,
        "high": None,
        "missing": 1,
        "per_seed": [41.0, None],
    }
    assert str(Estimate(42.0, "%", 50, 29.375, 55.767)) == "42.0 (29.4 to 55.8)"
    assert str(Estimate(0.5, "reward", 1, None, None)) == "0.500"


SKEWED = np.random.default_rng(3).gamma(1.0, 1.0, 60)
COIN = (np.random.default_rng(4).random(50) < 0.3).astype(float)


@pytest.mark.parametrize(
    ("samples", "weights", "statistic"),
    [
        ((SKEWED,), (1.0,), lambda a, axis=-1: a.mean(axis=axis)),
        ((COIN,), (1.0,), lambda a, axis=-1: a.mean(axis=axis)),
        ((SKEWED, COIN), (0.5, 0.5), lambda a, b, axis=-1: (a.mean(axis=axis) + b.mean(axis=axis)) / 2),
    ],
    ids=["skewed mean", "rate", "two samples"],
)
def test_bca_bootstrap_agrees_with_scipy(samples, weights, statistic) -> None:
    expected = stats.bootstrap(samples, statistic, method="BCa", n_resamples=20_000, rng=np.random.default_rng(0)).confidence_interval
    width = expected.high - expected.low
    low, high = bootstrap(samples, weights, resamples=20_000)
    assert low == pytest.approx(expected.low, abs=0.04 * width)
    assert high == pytest.approx(expected.high, abs=0.04 * width)


def test_bootstrap_is_seeded_and_holds_its_figure() -> None:
    assert bootstrap([SKEWED], seed=5) == bootstrap([SKEWED], seed=5) != bootstrap([SKEWED], seed=6)
    low, high = bootstrap([SKEWED], seed=5)
    assert low < SKEWED.mean() < high
    shifted = bootstrap([SKEWED + 100], seed=5)
    assert shifted == pytest.approx((low + 100, high + 100))


def test_cas_interval_where_one_sample_is_all_equal_uses_both_wilson_intervals() -> None:
    found = mean_of_rates([[0.0] * 50, [1.0] * 10 + [0.0] * 40], (0.5, 0.5))
    # By hand: Wilson of 0/50 is 0 to 7.135 %, of 10/50 it is 11.244 to 33.036 %.
    assert found.value == pytest.approx(10.0)
    assert found.low == pytest.approx(10 - math.hypot(0, (20 - 11.244) / 2), abs=0.01)
    assert found.high == pytest.approx(10 + math.hypot(7.135 / 2, (33.036 - 20) / 2), abs=0.01)
    nothing = mean_of_rates([[0.0] * 50, [0.0] * 50], (0.5, 0.5))
    assert (nothing.value, nothing.low) == (0.0, 0.0)
    assert nothing.high == pytest.approx(7.135 / math.sqrt(2), abs=0.01)


def test_a_mean_of_rates_needs_both_samples() -> None:
    found = mean_of_rates([[1.0, 0.0], [NAN]], (0.5, 0.5))
    assert (found.value, found.n, found.missing) == (None, 2, 1)


def test_mover_by_hand() -> None:
    assert mover([0.2, 0.6], [(0.1, 0.4), (0.5, 0.7)], [1.0, 1.0]) == pytest.approx((0.8 - math.sqrt(0.02), 0.8 + math.sqrt(0.05)))


def test_bonett_price_on_the_airway_data() -> None:
    # Bentur et al. 2009, the paired table 1, 1, 7, 12 (n = 21) used by Fagerland, Lydersen and Laake (2014). By hand:
    # (1 + 1) / 23 and (7 + 1) / 23; difference −6/23; variance (10/23 − (6/23)²) / 23.
    differences = np.asarray([1.0] * 1 + [-1.0] * 7 + [0.0] * 13)
    half = 1.959964 * math.sqrt((10 / 23 - (6 / 23) ** 2) / 23)
    assert bonett_price([differences], [1.0]) == pytest.approx((-6 / 23 - half, -6 / 23 + half), abs=1e-6)


def test_bonett_price_still_doubts_where_no_prompt_differs() -> None:
    low, high = bonett_price([np.zeros(50)], [1.0])
    assert low == -high
    assert high == pytest.approx(1.959964 * math.sqrt(2 / 52 / 52))
    assert bonett_price([np.ones(3)], [1.0])[1] == 1.0


def test_present_reads_none_and_nan_as_missing() -> None:
    assert present([1, None, 2.5, NAN]).tolist() == [1.0, 2.5]


def test_bootstrap_coverage_on_skewed_data() -> None:
    """Exponential rewards, 60 prompts, nominal 95 %. 400 trials have a standard error of 1.1 points; BCa falls a little short here."""
    generator = np.random.default_rng(11)
    trials = [bootstrap([generator.exponential(1.0, 60)], resamples=1000, seed=trial) for trial in range(400)]
    assert 0.90 < np.mean([low <= 1.0 <= high for low, high in trials]) < 0.98


@pytest.mark.parametrize("n", [2, 5, 10, 20])
def test_means_of_few_prompts_are_covered(n: int) -> None:
    """Normal rewards, nominal 95 %; the bootstrap alone holds the mean in 51, 83, 91 and 92 % here. 500 trials: ± 2 points."""
    generator = np.random.default_rng(14)
    trials = [about_mean(generator.normal(0.0, 1.0, n), resamples=1000, seed=trial) for trial in range(500)]
    assert 0.925 < np.mean([low <= 0.0 <= high for low, high in trials]) < 0.98


@pytest.mark.parametrize("n", [50, 100])
def test_means_of_differences_that_are_mostly_zero_are_covered(n: int) -> None:
    """Two models that answer four prompts in five alike, nominal 95 %; the bootstrap alone holds zero in 85 and 90 % here."""
    generator = np.random.default_rng(16)
    drawn = (generator.normal(0.0, 1.0, n) * (generator.random(n) < 0.2) for _ in range(500))
    trials = [about_mean(sample, resamples=1000, seed=trial) for trial, sample in enumerate(drawn)]
    assert 0.925 < np.mean([low <= 0.0 <= high for low, high in trials]) < 0.98


def test_a_mean_reaches_at_least_as_far_as_student() -> None:
    expected = stats.ttest_1samp(SKEWED, 0.0).confidence_interval(0.9)
    drawn = bootstrap([SKEWED], confidence=0.9)
    assert about_mean(SKEWED, 0.9) == pytest.approx((min(expected.low, drawn[0]), max(expected.high, drawn[1])))
    assert expected.low < drawn[0]  # skewed to the right: the one end is Student's, the other the bootstrap's
    assert drawn[1] > expected.high
    assert about_mean(np.asarray([1.0])) is None
    found = mean(SKEWED, "reward")
    assert (found.low, found.high) == about_mean(SKEWED)


def test_stratified_coverage_of_cas() -> None:
    """Two samples of 50 prompts, true rates 0.42 and 0.66."""
    generator = np.random.default_rng(12)
    covered = []
    for trial in range(300):
        samples = [(generator.random(50) < p).astype(float) for p in (0.42, 0.66)]
        found = mean_of_rates(samples, (0.5, 0.5), resamples=1000, seed=trial)
        covered.append(found.low <= 54.0 <= found.high)
    assert 0.90 < np.mean(covered) < 0.985


def test_bonett_price_coverage() -> None:
    """Paired verdicts on 50 prompts, discordance 0.22, true difference 0.1."""
    generator = np.random.default_rng(13)
    covered = []
    for _ in range(2000):
        low, high = bonett_price([generator.choice([1.0, -1.0, 0.0], size=50, p=[0.16, 0.06, 0.78])], [1.0])
        covered.append(low <= 0.1 <= high)
    assert 0.935 < np.mean(covered) < 0.975
