from __future__ import annotations

import math
from dataclasses import replace

import pytest

from equipoise.objectives.nca import NCA

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # βr: 1 and −0.5
        (NCA(beta=0.5), minus_log_sigmoid(1.0) + 0.5 * minus_log_sigmoid(-1.0) + 0.5 * minus_log_sigmoid(0.5)),
    ],
)
def test_worked_by_hand(objective: NCA, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_at_the_reference() -> None:
    view = worked_pair()
    # (1 + ½ + ½) ln 2
    assert NCA()(replace(view, reference=view.policy)).sum.item() == pytest.approx(2 * math.log(2), rel=1e-12)
