from __future__ import annotations

import pytest

from equipoise.objectives.mpo import MPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # βh = 1.5; βr: 1 and −0.5; −ℓ_w/n_w = 1
        (MPO(beta=0.5), 0.8 * minus_log_sigmoid(1.5) + 0.2 * (minus_log_sigmoid(1.0) + minus_log_sigmoid(0.5)) + 1),
    ],
)
def test_worked_by_hand(objective: MPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)
