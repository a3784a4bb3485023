from __future__ import annotations

from dataclasses import replace

import pytest

from equipoise.objectives.dpop import DPOP

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # r_w = 2 > 0: no penalty
        (DPOP(beta=0.1), minus_log_sigmoid(0.3)),
    ],
)
def test_worked_by_hand(objective: DPOP, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_penalty_where_the_chosen_reply_lost_probability() -> None:
    view = worked_pair()
    flipped = replace(view, role=view.role.flip(0))
    # now r_w = −1, r_l = 2: β(h − λ·1) = 0.1·(−3 − 5) = −0.8
    losses = DPOP(beta=0.1, penalty=5)(flipped)
    assert losses.sum.item() == pytest.approx(minus_log_sigmoid(-0.8), rel=1e-12)
    assert losses.meters["rewards/chosen"].item() == pytest.approx(-0.1)
