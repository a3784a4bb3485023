from __future__ import annotations

import pytest

from equipoise.objectives.cpo import CPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 0.1·10; −ℓ_w/n_w = 1
        (CPO(), minus_log_sigmoid(1.0) + 1),
        # 0.2·10; −ℓ_w = 2
        (CPO(beta=0.2, sft_weight=0.5, sft_reduction="sum"), minus_log_sigmoid(2.0) + 0.5 * 2),
    ],
)
def test_worked_by_hand(objective: CPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)
