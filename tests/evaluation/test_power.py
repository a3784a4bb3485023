"""Power and sample sizes against textbook values, full enumeration and simulation."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from equipoise.core.errors import UsageError
from equipoise.evaluation.metrics._base import metrics
from equipoise.evaluation.paired import mcnemar
from equipoise.evaluation.power import (
    detectable,
    detectable_differences,
    detectable_mean,
    detectable_rate,
    mcnemar_power,
    needed_mean,
    needed_rate,
)


def by_enumeration(n: int, wins: float, losses: float, alpha: float = 0.05) -> float:
    """The power of McNemar's test from every possible table."""
    total = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            if mcnemar(b, c) <= alpha:
                total += comb(n, b) * comb(n - b, c) * wins**b * losses**c * (1 - wins - losses) ** (n - b - c)
    return total


@pytest.mark.parametrize(
    ("n", "difference", "discordance"), [(12, 0.4, 0.6), (25, 0.2, 0.3), (40, 0.3, 0.5), (30, 0.25, 0.25), (20, 0.0, 0.5)]
)
def test_mcnemar_power_by_enumeration(n: int, difference: float, discordance: float) -> None:
    wins, losses = (discordance + difference) / 2, (discordance - difference) / 2
    assert mcnemar_power(n, difference, discordance) == pytest.approx(by_enumeration(n, wins, losses), abs=1e-9)
    assert mcnemar_power(n, -difference, discordance) == pytest.approx(mcnemar_power(n, difference, discordance))


def test_mcnemar_power_at_the_extremes() -> None:
    assert mcnemar_power(0, 0.1) == 0.0
    assert mcnemar_power(5, 0.5, 0.5) == 0.0  # five discordant prompts never reach p <= 0.05
    assert mcnemar_power(200, 1.0, 1.0) == pytest.approx(1.0)
    for wrong in ({"difference": 0.4, "discordance": 0.3}, {"difference": 0.1, "discordance": 0.0}, {"difference": 0.1, "alpha": 0.0}):
        with pytest.raises(UsageError):
            mcnemar_power(50, **wrong)


def test_detectable_rate_has_the_power_it_says() -> None:
    for n, discordance in ((50, 0.5), (80, 0.3), (500, 0.2)):
        difference = detectable_rate(n, discordance)
        assert mcnemar_power(n, difference, discordance) == pytest.approx(0.8, abs=0.001)
    assert detectable_rate(5) is None
    assert detectable_rate(1) is None


def test_detectable_rate_in_simulation() -> None:
    """50 prompts, discordance 0.5: the power of the real test at the smallest detectable difference."""
    generator = np.random.default_rng(0)
    difference = detectable_rate(50)
    wins = generator.multinomial(50, [(0.5 + difference) / 2, (0.5 - difference) / 2, 0.5], size=2000)
    assert np.mean([mcnemar(int(b), int(c)) <= 0.05 for b, c, _ in wins]) == pytest.approx(0.8, abs=0.03)


def test_means_from_the_textbook() -> None:
    # (1.959964 + 0.841621)² = 7.848880; for a standardised difference of 0.5: 31.4 → 32; of 0.1: 784.9 → 785.
    assert needed_mean(0.5, 1.0) == 32
    assert needed_mean(-0.1, 1.0) == 785
    assert needed_mean(0.0, 1.0) is None
    assert detectable_mean(785) == pytest.approx(0.1, abs=1e-4)
    assert detectable_mean(100, deviation=3.0) == pytest.approx(3 * 0.2801585, abs=1e-6)
    assert detectable_mean(1) is None


@pytest.mark.parametrize(("difference", "discordance"), [(0.1, 0.22), (0.3, 0.5), (-0.05, 0.1), (0.2, 0.2)])
def test_needed_rate_reaches_its_power(difference: float, discordance: float) -> None:
    n = needed_rate(difference, discordance)
    assert mcnemar_power(n, abs(difference), discordance) >= 0.8
    assert mcnemar_power(int(0.85 * n), abs(difference), discordance) < 0.8


def test_needed_rate_at_the_extremes() -> None:
    assert needed_rate(0.0, 0.2) is None
    # Far beyond enumeration Connor's formula: ((1.959964 √ψ + 0.841621 √(ψ − d²)) / d)², ψ = 0.2, d = 0.001
    assert needed_rate(0.001, 0.2) == pytest.approx(7.848880 * 0.2 / 1e-6, rel=1e-4)


def test_before_a_run_every_metric_says_what_it_could_show() -> None:
    rows = {row["metric"]: row for row in detectable_differences({"helpful": 80, "harmful": 80, "benign": 80})}
    assert set(rows) == set(metrics())
    assert rows["hmr"]["unit"] == "percentage points"
    assert rows["hmr"]["difference"] == pytest.approx(100 * detectable_rate(80), abs=1e-3)
    assert rows["reward_benign"]["difference"] == pytest.approx(2.801585 / 80**0.5, abs=1e-3)
    assert rows["reward_benign"]["unit"] == "standard deviations"
    assert rows["length"]["n"] == 240
    # CAS: half of each of two independent samples of 80; standard error √(2 · ¼ · 0.5 / 80)
    assert rows["cas"]["difference"] == pytest.approx(280.1585 * (0.25 / 80) ** 0.5, abs=0.01)


def test_axes_without_prompts_show_nothing() -> None:
    rows = [row["metric"] for row in detectable_differences({"helpful": 50})]
    assert "hpr" in rows
    assert not {"hmr", "cas", "over_refusal", "win_rate"} & set(rows)
    assert detectable_differences({"harmful": 50}, names=["hmr", "length"])[0]["metric"] == "hmr"


def test_after_a_run_the_noise_found_is_used() -> None:
    hmr, reward = metrics()["hmr"], metrics()["reward_harmful"]
    found = detectable("hmr", hmr, {"harmful": 50}, noise={"noise": 44.0, "discordance": 0.22})
    assert found["difference"] == pytest.approx(100 * detectable_rate(50, 0.22), abs=1e-3)
    found = detectable("reward_harmful", reward, {"harmful": 50}, noise={"noise": 1.5})
    assert (found["difference"], found["unit"]) == (pytest.approx(2.801585 * 1.5 / 50**0.5, abs=1e-3), "reward")
    found = detectable("reward_harmful", reward, {"harmful": 50}, noise={"noise": 1.5, "n": 20.0})
    assert (found["difference"], found["n"]) == (pytest.approx(2.801585 * 1.5 / 20**0.5, abs=1e-3), 20)
