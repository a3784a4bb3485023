from __future__ import annotations

import pytest

from equipoise.objectives.sppo import SPPO

from .pairs import worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 1/(2·0.001) = 500: 2 − 500 and −1 + 500
        (SPPO(), 498.0**2 + 499.0**2),
        # target 2: 2 − 2 and −1 + 2
        (SPPO(beta=0.25), 0.0 + 1.0),
    ],
)
def test_worked_by_hand(objective: SPPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)
