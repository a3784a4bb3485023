from __future__ import annotations

import math

import pytest

from equipoise.objectives.alpha_po import AlphaPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # means −1 and −3
        (AlphaPO(alpha=0.5), minus_log_sigmoid(2.5 * ((1 - math.exp(0.5)) / 0.5 - (1 - math.exp(1.5)) / 0.5) - 0.1)),
        # α = −1: s = p̄ − 1
        (AlphaPO(alpha=-1), minus_log_sigmoid(2.5 * (math.exp(-1) - math.exp(-3)) - 0.1)),
        # α = 0 is SimPO: 2.5·2 − 0.1
        (AlphaPO(alpha=0), minus_log_sigmoid(4.9)),
    ],
)
def test_worked_by_hand(objective: AlphaPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)
