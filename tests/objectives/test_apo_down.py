from __future__ import annotations

from dataclasses import replace

import pytest

from equipoise.objectives.apo_down import APODown

from .pairs import sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # βr_w = 1, βh = 1.5
        (APODown(beta=0.5), sigmoid(1.0) + (1 - sigmoid(1.5))),
    ],
)
def test_worked_by_hand(objective: APODown, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_at_the_reference() -> None:
    view = worked_pair()
    # ½ + ½
    assert APODown()(replace(view, reference=view.policy)).sum.item() == pytest.approx(1.0, rel=1e-12)
