from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from equipoise.core.errors import DataError
from equipoise.objectives._base import Scored
from equipoise.objectives.dpo import DPO
from equipoise.objectives.modpo import MODPO

from .pairs import minus_log_sigmoid, worked_pair


def rewarded(**facts: tuple[float, float]) -> Scored:
    return replace(worked_pair(), facts={name: torch.tensor(values, dtype=torch.float64) for name, values in facts.items()})


def test_worked_by_hand() -> None:
    # β = ½: βr_w = 1, βr_l = −½. Rewards 0.2·3 + 0.4·(−1) = 0.2 and 0.2·1 + 0.4·0.5 = 0.4; w = 0.4.
    # Implied rewards (1 − 0.2)/0.4 = 2 and (−0.5 − 0.4)/0.4 = −2.25.
    objective = MODPO(beta=0.5, weights={"safety": 0.2, "brevity": 0.4})
    losses = objective(rewarded(safety=(3, 1), brevity=(-1, 0.5)))
    assert objective.facts() == ("safety", "brevity")
    assert losses.sum.item() == pytest.approx(minus_log_sigmoid(4.25))
    assert losses.meters["rewards/chosen"].item() == pytest.approx(2.0)
    assert losses.meters["rewards/rejected"].item() == pytest.approx(-2.25)
    assert losses.meters["logps/chosen"].item() == -2.0


def test_hinge_by_hand() -> None:
    # β = 0.1, w = ½: (0.1·3 − ½·ΔR)/½ = 0.6 − ΔR.
    assert MODPO(link="hinge")(rewarded(score=(0, 0))).sum.item() == pytest.approx(0.4)
    assert MODPO(link="hinge")(rewarded(score=(2, 0))).sum.item() == pytest.approx(2.4)
    assert MODPO(link="hinge")(rewarded(score=(0, 2))).sum.item() == 0.0


def test_another_reward_that_agrees_asks_more_of_the_policy() -> None:
    # βh is to carry the weighted sum of both rewards' differences: less of it where the other reward prefers the rejected reply.
    against, alike = (MODPO()(rewarded(score=score)).sum.item() for score in ((0, 1), (1, 0)))
    assert against < MODPO()(rewarded(score=(0, 0))).sum.item() < alike


def test_without_weight_on_others_it_is_dpo() -> None:
    assert MODPO(weights={"score": 0})(rewarded(score=(7, -7))).sum.item() == pytest.approx(DPO()(worked_pair()).sum.item())


def test_missing_rewards_and_weights_that_leave_nothing_raise() -> None:
    for facts in ({}, {"score": (1.0, math.nan)}):
        with pytest.raises(DataError, match="needs the fact 'score'"):
            MODPO()(rewarded(**facts))
    for weights in ({"a": 0.5, "b": 0.5}, {"a": 1.0}, {"a": -0.1}, {}):
        with pytest.raises(ValidationError):
            MODPO(weights=weights)
