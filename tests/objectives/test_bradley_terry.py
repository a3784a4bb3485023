from __future__ import annotations

import math

import pytest
import torch

from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored
from equipoise.objectives.bradley_terry import BradleyTerry


def scores(chosen: float, rejected: float, **facts: float) -> Scored:
    role = torch.tensor([REPLY_ROLES.index("chosen"), REPLY_ROLES.index("rejected")])
    return Scored(
        None,
        None,
        torch.ones(2, 1, dtype=torch.bool),
        torch.zeros(2, dtype=torch.long),
        role,
        score=torch.tensor([chosen, rejected], dtype=torch.float64),
        facts={name: torch.tensor([value, value], dtype=torch.float64) for name, value in facts.items()},
    )


def test_worked_by_hand() -> None:
    # −log σ(3 − 1) = log(1 + e⁻²)
    losses = BradleyTerry()(scores(3.0, 1.0))
    assert losses.sum.item() == pytest.approx(math.log1p(math.exp(-2)), abs=1e-12)
    assert losses.meters["rewards/accuracies"].item() == 1.0


def test_a_tie_is_half_right() -> None:
    losses = BradleyTerry()(scores(0.5, 0.5))
    assert losses.sum.item() == pytest.approx(math.log(2))
    assert losses.meters["rewards/accuracies"].item() == 0.5


def test_margin_and_centring() -> None:
    # margin 2 − 0.5 = 1.5; centring 0.1 · (3 + 1)² = 1.6
    losses = BradleyTerry(center_rewards_coefficient=0.1)(scores(3.0, 1.0, margin=0.5))
    assert losses.sum.item() == pytest.approx(math.log1p(math.exp(-1.5)) + 1.6, abs=1e-12)


def test_a_missing_margin_is_no_margin() -> None:
    assert BradleyTerry()(scores(3.0, 1.0, margin=math.nan)).sum.item() == pytest.approx(math.log1p(math.exp(-2)))
