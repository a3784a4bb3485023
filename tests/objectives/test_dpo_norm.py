from __future__ import annotations

import math
from dataclasses import replace

import pytest

from equipoise.objectives.dpo_norm import DPONorm

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 5·(1 + 0.25)
        (DPONorm(), minus_log_sigmoid(6.25)),
        # 0.4·1.25
        (DPONorm(beta=0.4), minus_log_sigmoid(0.5)),
    ],
)
def test_worked_by_hand(objective: DPONorm, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_at_the_reference() -> None:
    view = worked_pair()
    # no margin: ln 2
    assert DPONorm()(replace(view, reference=view.policy)).sum.item() == pytest.approx(math.log(2), rel=1e-12)
