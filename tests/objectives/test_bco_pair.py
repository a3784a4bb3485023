from __future__ import annotations

import math
from dataclasses import replace

import pytest

from equipoise.objectives.bco_pair import BCOPair

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # βr: 1 and −0.5
        (BCOPair(beta=0.5), minus_log_sigmoid(1.0) + minus_log_sigmoid(0.5)),
    ],
)
def test_worked_by_hand(objective: BCOPair, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_at_the_reference() -> None:
    view = worked_pair()
    # one ln 2 a side
    assert BCOPair()(replace(view, reference=view.policy)).sum.item() == pytest.approx(2 * math.log(2), rel=1e-12)
