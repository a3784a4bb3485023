from __future__ import annotations

import pytest

from equipoise.objectives.simpo import SimPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 2·(−1 + 3) − 1 = 3
        (SimPO(), minus_log_sigmoid(3.0)),
        # 10·2 − 5
        (SimPO(beta=10, gamma=5), minus_log_sigmoid(15.0)),
    ],
)
def test_worked_by_hand(objective: SimPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)
