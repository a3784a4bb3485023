from __future__ import annotations

import pytest

from equipoise.objectives.tpo import TPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 0.01·10; gold 1.5 a token
        (TPO(), minus_log_sigmoid(0.1) + 1.5),
        # preference alone
        (TPO(sft_weight=0), minus_log_sigmoid(0.1)),
    ],
)
def test_worked_by_hand(objective: TPO, expected: float) -> None:
    assert objective(worked_pair("chosen", "rejected", "gold")).sum.item() == pytest.approx(expected, rel=1e-12)
