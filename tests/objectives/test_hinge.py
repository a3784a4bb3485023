from __future__ import annotations

from dataclasses import replace

import pytest

from equipoise.objectives.hinge import Hinge

from .pairs import worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 1 − 0.1·3
        (Hinge(beta=0.1), 0.7),
        # 1 − 0.5·3 < 0
        (Hinge(beta=0.5), 0.0),
    ],
)
def test_worked_by_hand(objective: Hinge, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_at_the_reference() -> None:
    view = worked_pair()
    # h = 0
    assert Hinge()(replace(view, reference=view.policy)).sum.item() == pytest.approx(1.0, rel=1e-12)
