"""Paired tests against scipy and published p-values; the three words, case by case."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from equipoise.core.errors import UsageError
from equipoise.evaluation.paired import MINIMUM, agree, holm, mcnemar, sign_flip, verdict

counts = st.integers(0, 40)


@given(counts, counts)
def test_mcnemar_agrees_with_the_binomial_test(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected)
    assert mcnemar(wins, losses) == mcnemar(losses, wins)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 2**5)
    assert mcnemar(8, 3) == pytest.approx(2 * (1 + 11 + 55 + 165) / 2**11)  # SFT+DPO over SFT in HpR: 0.2266
    with pytest.raises(UsageError):
        mcnemar(-1, 3)


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=12))
def test_sign_flip_of_binary_differences_is_mcnemar(differences: list[float]) -> None:
    p, exact = sign_flip([np.asarray(differences)], [1.0])
    assert exact
    assert p == pytest.approx(mcnemar(differences.count(1.0), differences.count(-1.0)))


def test_sign_flip_agrees_with_scipy() -> None:
    generator = np.random.default_rng(0)
    small = generator.normal(0.4, 1, 12)
    expected = stats.permutation_test((small,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip([small], [1.0]) == (pytest.approx(expected), True)
    large = generator.normal(0.25, 1, 80)
    expected = stats.permutation_test((large,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1).pvalue
    p, exact = sign_flip([large], [1.0])
    assert not exact
    assert p == pytest.approx(expected, abs=0.006)
    assert p == sign_flip([large], [1.0])[0]


def test_sign_flip_weighs_samples_by_their_means() -> None:
    # Two samples of different size: the statistic is ½ mean + ½ mean, not the pooled mean. 2^3 patterns by hand:
    # shares ½·3/1 = 1.5 and ½·(1, 1)/2 = 0.25, 0.25; found 2; only both signs of (1.5, .25, .25) reach it: 2 of 8.
    assert sign_flip([np.asarray([3.0]), np.asarray([1.0, 1.0])], [0.5, 0.5]) == (pytest.approx(2 / 8), True)


def test_sign_flip_at_the_extremes() -> None:
    assert sign_flip([np.zeros(50)], [1.0]) == (1.0, True)
    assert sign_flip([np.zeros(0)], [1.0]) == (1.0, True)
    p, exact = sign_flip([np.ones(500)], [1.0], draws=1000)
    assert (p, exact) == (pytest.approx(1 / 1001), False)


def test_sign_flip_holds_its_level() -> None:
    generator = np.random.default_rng(2)
    found = [sign_flip([generator.normal(0, 1, 40)], [1.0], draws=1000, seed=trial)[0] for trial in range(400)]
    assert 0.02 < np.mean([p < 0.05 for p in found]) < 0.085


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({}) == {}
    assert holm({"only": 0.04}) == {"only": 0.04}


def test_holm_counts_contrasts_without_a_p() -> None:
    assert holm({"a": 0.02, "b": None, "c": 0.9}) == {"a": pytest.approx(0.06), "b": None, "c": 1.0}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_and_keeps_the_order(values: list[float]) -> None:
    adjusted = holm(dict(enumerate(values)))
    assert all(p <= adjusted[index] <= 1 for index, p in enumerate(values))
    ranked = sorted(range(len(values)), key=lambda index: values[index])
    assert all(adjusted[a] <= adjusted[b] for a, b in itertools.pairwise(ranked))


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((), True),
        ((0.5,), True),
        ((0.5, 0.1), True),
        ((-1, -2, -3), True),
        ((1, -1), False),
        ((1, 0), False),
        ((1, None), False),
        ((None, None), False),
    ],
)
def test_seeds_agree(differences, expected: bool) -> None:
    assert agree(differences) is expected


@pytest.mark.parametrize(
    ("case", "word"),
    [
        ({"low": 2.0, "high": 9.0, "p": 0.01}, "real"),
        ({"low": 2.0, "high": 9.0, "p": 0.01, "differences": (3.0, 4.0)}, "real"),
        ({"low": 2.0, "high": 9.0, "p": 0.01, "differences": (3.0, -1.0)}, "undecided"),
        ({"low": -2.0, "high": 9.0, "p": 0.2}, "undecided"),
        ({"low": -2.0, "high": 3.0, "p": 0.6, "margin": 5.0}, "equivalent"),
        ({"low": -2.0, "high": 5.0, "p": 0.6, "margin": 5.0}, "undecided"),  # touching the margin is not inside
        ({"low": 1.0, "high": 3.0, "p": 0.001, "margin": 5.0}, "equivalent"),  # beyond chance, and too small to matter
        ({"low": -2.0, "high": 3.0, "p": 0.6}, "undecided"),  # no margin was set beforehand
        ({"low": 0.0, "high": 0.0, "p": 1.0, "margin": 5.0, "n": MINIMUM - 1}, "undecided"),
        ({"low": -0.1, "high": 0.1, "p": 1.0, "margin": 5.0, "differing": MINIMUM - 1}, "undecided"),  # of means: too few that differ
        ({"low": -0.1, "high": 0.1, "p": 1.0, "margin": 5.0, "differing": MINIMUM}, "equivalent"),
        ({"low": 0.01, "high": 0.1, "p": 0.03, "margin": 5.0, "differing": 6}, "real"),
        ({"low": -1.0, "high": 1.0, "p": 0.9, "margin": 5.0, "differences": (-4.0, 4.0)}, "equivalent"),
        ({"low": -1.0, "high": 1.0, "p": 0.9, "margin": 5.0, "differences": (-8.0, 8.0)}, "undecided"),  # a mean of nothing
        ({"low": -1.0, "high": 1.0, "p": 0.9, "margin": 5.0, "differences": (0.0, None)}, "undecided"),
        ({"low": 1.0, "high": 4.5, "p": 0.01, "margin": 5.0, "differences": (0.5, 5.5)}, "real"),
        ({"low": None, "high": None, "p": 1.0, "margin": 5.0}, "undecided"),
        ({"low": 1.0, "high": 2.0, "p": 0.05}, "undecided"),  # not below alpha
    ],
)
def test_words(case: dict, word: str) -> None:
    given_case = {"n": 50, "margin": None} | case
    found, reason = verdict(**given_case)
    assert found == word
    assert reason


def test_the_reason_names_what_stands_in_the_way_of_equivalence() -> None:
    def reason(**case: object) -> str:
        return verdict(**{"low": -1.0, "high": 1.0, "n": 50, "margin": 5.0, "p": 0.5} | case)[1]

    assert reason() == "the 95 % interval lies inside ±5, the margin set beforehand"
    assert reason(confidence=0.99).startswith("the 99 % interval")
    assert reason(high=6.0) == "p = 0.5 is not below 0.05, and the interval leaves ±5"
    assert reason(n=9) == "p = 0.5 is not below 0.05, and 9 prompts are too few to call them equivalent"
    assert reason(differing=3) == "p = 0.5 is not below 0.05, and only 3 prompts differ, too few to know the spread"
    assert reason(differences=(6.0, -6.0)) == "p = 0.5 is not below 0.05, and not every seed lies inside ±5"
