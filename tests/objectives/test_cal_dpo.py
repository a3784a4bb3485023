from __future__ import annotations

import pytest

from equipoise.objectives.cal_dpo import CalDPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 1/(2·0.002) = 250: 2 − 250 and −1 + 250
        (CalDPO(), minus_log_sigmoid(3.0) + 0.5 * (248.0**2 + 249.0**2)),
        # target 1: 2 − 1 and −1 + 1
        (CalDPO(beta=0.5, calibration_weight=1), minus_log_sigmoid(3.0) + 1.0 + 0.0),
    ],
)
def test_worked_by_hand(objective: CalDPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)
