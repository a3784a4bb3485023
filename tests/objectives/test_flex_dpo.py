from __future__ import annotations

import pytest

from equipoise.objectives.flex_dpo import FlexDPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 0.2·2 + 0.1·1
        (FlexDPO(beta_chosen=0.2, beta_rejected=0.1), minus_log_sigmoid(0.5)),
        # equal strengths are DPO
        (FlexDPO(beta_chosen=0.1, beta_rejected=0.1), minus_log_sigmoid(0.3)),
    ],
)
def test_worked_by_hand(objective: FlexDPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)
