from __future__ import annotations

import math
from dataclasses import replace

import pytest

from equipoise.objectives.discopop import DiscoPOP

from .pairs import minus_log_sigmoid, sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # z = 0.3, m = σ(0.6)
        (DiscoPOP(beta=0.1, temperature=0.5), (1 - sigmoid(0.6)) * minus_log_sigmoid(0.3) + sigmoid(0.6) * math.exp(-0.3)),
    ],
)
def test_worked_by_hand(objective: DiscoPOP, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_at_the_reference() -> None:
    view = worked_pair()
    # ½ ln 2 + ½
    assert DiscoPOP()(replace(view, reference=view.policy)).sum.item() == pytest.approx(0.5 * math.log(2) + 0.5, rel=1e-12)
