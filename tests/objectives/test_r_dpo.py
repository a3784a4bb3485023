from __future__ import annotations

from dataclasses import replace

import pytest

from equipoise.objectives.r_dpo import RDPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 0.3 + 0.05·(2 − 4)
        (RDPO(beta=0.1), minus_log_sigmoid(0.2)),
        # α = 0 is DPO
        (RDPO(beta=0.1, alpha=0), minus_log_sigmoid(0.3)),
    ],
)
def test_worked_by_hand(objective: RDPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_a_longer_chosen_reply_is_pushed_less() -> None:
    view = worked_pair()
    # Roles exchanged, the chosen reply is the longer one: −0.3 + 0.05·2 = −0.2, a smaller loss than DPO's at −0.3.
    longer = RDPO(beta=0.1)(replace(view, role=view.role.flip(0))).sum.item()
    assert longer == pytest.approx(minus_log_sigmoid(-0.2), rel=1e-12)
    assert longer < minus_log_sigmoid(-0.3)
