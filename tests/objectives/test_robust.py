from __future__ import annotations

from dataclasses import replace

import pytest

from equipoise.objectives.robust import Robust

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # βh = 0.3, ε = 0.1
        (Robust(beta=0.1), (0.9 * minus_log_sigmoid(0.3) - 0.1 * minus_log_sigmoid(-0.3)) / 0.8),
        # ε = 0 is DPO
        (Robust(beta=0.1, label_smoothing=0), minus_log_sigmoid(0.3)),
    ],
)
def test_worked_by_hand(objective: Robust, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_unbiased_under_flipped_labels() -> None:
    # With labels flipped at rate ε: (1−ε) L(h) + ε L(−h) is the DPO loss of the true label.
    view = worked_pair()
    flipped = replace(view, role=view.role.flip(0))
    objective = Robust(beta=0.1, label_smoothing=0.2)
    mean = 0.8 * objective(view).sum.item() + 0.2 * objective(flipped).sum.item()
    assert mean == pytest.approx(minus_log_sigmoid(0.3), rel=1e-12)
