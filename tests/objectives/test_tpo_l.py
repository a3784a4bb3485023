from __future__ import annotations

import pytest

from equipoise.objectives.tpo_l import TPOL

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 2.5·2 − 0.5; gold 1.5 a token
        (TPOL(), minus_log_sigmoid(4.5) + 0.05 * 1.5),
    ],
)
def test_worked_by_hand(objective: TPOL, expected: float) -> None:
    assert objective(worked_pair("chosen", "rejected", "gold")).sum.item() == pytest.approx(expected, rel=1e-12)
