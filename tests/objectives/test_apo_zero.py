from __future__ import annotations

from dataclasses import replace

import pytest

from equipoise.objectives.apo_zero import APOZero

from .pairs import sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # βr: 1 and −0.5
        (APOZero(beta=0.5), (1 - sigmoid(1.0)) + sigmoid(-0.5)),
    ],
)
def test_worked_by_hand(objective: APOZero, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_at_the_reference() -> None:
    view = worked_pair()
    # ½ + ½
    assert APOZero()(replace(view, reference=view.policy)).sum.item() == pytest.approx(1.0, rel=1e-12)
