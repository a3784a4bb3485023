from __future__ import annotations

import math

import pytest

from equipoise.objectives.exo import EXO

from .pairs import sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # KL of (σ(1.5), σ(−1.5)) from (0.9, 0.1)
        (EXO(beta=0.5, label_smoothing=0.1), sigmoid(1.5) * math.log(sigmoid(1.5) / 0.9) + sigmoid(-1.5) * math.log(sigmoid(-1.5) / 0.1)),
    ],
)
def test_worked_by_hand(objective: EXO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_no_loss_where_the_model_agrees_with_the_smoothed_label() -> None:
    # σ(3β) = 0.9 at 3β = log 9
    assert EXO(beta=math.log(9) / 3, label_smoothing=0.1)(worked_pair()).sum.item() == pytest.approx(0, abs=1e-15)
