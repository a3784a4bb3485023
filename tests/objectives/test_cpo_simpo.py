from __future__ import annotations

import pytest

from equipoise.objectives.cpo_simpo import CPOSimPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 10·2 − 5.4 = 14.6; 0.05·1
        (CPOSimPO(), minus_log_sigmoid(14.6) + 0.05),
    ],
)
def test_worked_by_hand(objective: CPOSimPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)
