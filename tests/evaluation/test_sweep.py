"""Thresholds of a sweep, and the warnings where they re-rank arms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from equipoise.evaluation.sweep import rank_changes, thresholds


def row(threshold: float, **values: float | None) -> dict:
    return {"threshold": threshold, "values": values}


def test_thresholds_are_round_and_hold_the_one_used() -> None:
    found = thresholds(np.linspace(-8, 3, 200).tolist(), used=-3.1, points=20)
    assert -3.1 in found
    assert found == sorted(set(found))
    steps = {round(b - a, 6) for a, b in itertools.pairwise(found) if -3.1 not in (a, b)}
    assert steps == {0.5}  # (2.45 + 7.45) / 20 = 0.495, rounded up
    assert found[0] <= -7.45 <= found[1]
    assert found[-2] <= 2.45 <= found[-1]


@pytest.mark.parametrize(("rewards", "points", "expected"), [([], 20, []), ([1.0, 2.0], 0, []), ([2.0] * 9, 20, [-3.0])])
def test_nothing_to_sweep(rewards: list[float], points: int, expected: list[float]) -> None:
    assert thresholds(rewards, -3.0, points) == expected


def test_no_warning_where_the_order_stays() -> None:
    rows = [row(-4, a=90.0, b=80.0), row(-3, a=50.0, b=40.0), row(-2, a=10.0, b=10.0)]
    assert rank_changes(rows, -3, ["a", "b"], "HmR") == []
    assert rank_changes(rows, -3, ["a"], "HmR") == []
    assert rank_changes([], -3, ["a", "b"], "HmR") == []
    assert rank_changes([row(-3, a=50.0, b=None)], -3, ["a", "b"], "HmR") == []


def test_a_change_of_leader_is_told_with_its_range() -> None:
    rows = [row(-5, a=90.0, b=95.0), row(-4, a=80.0, b=90.0), row(-3, a=50.0, b=40.0), row(-2, a=10.0, b=20.0)]
    leader, order = rank_changes(rows, -3, ["a", "b"], "HmR")
    assert leader == "HmR: the leading arm depends on the threshold. At -3 it is a; elsewhere b from -5 to -4, b at -2."
    assert order == "HmR: between thresholds -5 and -2 the order of two arms turns around: a and b."


def test_null_policies_do_not_lead() -> None:
    rows = [row(-4, a=90.0, b=80.0, null=100.0), row(-3, a=50.0, b=40.0, null=0.0)]
    assert rank_changes(rows, -3, ["a", "b"], "HmR") == []
