from __future__ import annotations

import math
from dataclasses import replace

import pytest

from equipoise.objectives.rpo import RPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 0.5·3; −ℓ_w/n_w = 1
        (RPO(), minus_log_sigmoid(1.5) + 0.2),
        # −ℓ_w = 2
        (RPO(beta=0.1, sft_weight=0.5, sft_reduction="sum"), minus_log_sigmoid(0.3) + 1),
    ],
)
def test_worked_by_hand(objective: RPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_at_the_reference() -> None:
    view = worked_pair()
    # ln 2 and the SFT term
    assert RPO(sft_weight=0.2)(replace(view, reference=view.policy)).sum.item() == pytest.approx(math.log(2) + 0.2, rel=1e-12)
