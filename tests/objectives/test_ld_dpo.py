from __future__ import annotations

import pytest

from equipoise.objectives.ld_dpo import LDDPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # rejected log-ratios 1, 0 | −1, −1: r_l = 1 + 0.5·(−2) = 0; 0.1·(2 − 0)
        (LDDPO(beta=0.1), minus_log_sigmoid(0.2)),
        # α = 1 is DPO
        (LDDPO(beta=0.1, alpha=1), minus_log_sigmoid(0.3)),
        # common length alone: 2 − 1
        (LDDPO(beta=0.1, alpha=0), minus_log_sigmoid(0.1)),
    ],
)
def test_worked_by_hand(objective: LDDPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)
