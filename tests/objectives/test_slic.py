from __future__ import annotations

import pytest

from equipoise.objectives.slic import SLiC

from .pairs import worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 1 − 10 < 0; −ℓ_w = 2
        (SLiC(), 0.0 + 0.1 * 2),
        # 12 − 10; −ℓ_w/n_w = 1
        (SLiC(margin=12, sft_weight=1, sft_reduction="mean"), 2.0 + 1.0),
    ],
)
def test_worked_by_hand(objective: SLiC, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)
